"""Frozen base models with 4-bit linear layers, except for the head (QLoRA).

NF4 with double quantization, arXiv:2305.14314, by bitsandbytes through transformers.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from fastpref.model.pretrained import read_pretrained
from fastpref.utils.errors import ModelError
from fastpref.utils.optional_packages import require

OPTION = "adapter.quantize: nf4"


def check_quantization(path: str, config: PreTrainedConfig, allow_nf4: bool) -> None:
    """Raise ModelError for a quantized checkpoint, except for NF4 if `allow_nf4`."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    if quantization.get("bnb_4bit_quant_type") != "nf4" or not quantization.get("load_in_4bit"):
        method = quantization.get("quant_method", "by an unknown method")
        raise ModelError(
            f"model.path: {path} is quantized ({method}), which is not supported; use the model "
            "before quantization"
        )
    if not allow_nf4:
        raise ModelError(
            f"model.path: {path} is quantized, and only an adapter can be trained on it; set "
            f"{OPTION}"
        )


def load_in_4bit(
    source: str,
    config: PreTrainedConfig,
    device: torch.device,
    options: dict[str, Any],
    classifies: bool = False,
) -> Any:
    """Load a model onto the device with 4-bit linear layers; `options` are for `from_pretrained`.

    classifies: as in `read_pretrained`; its head is not quantized.

    Raises ModelError for fp64, and MissingPackage without bitsandbytes.
    """
    require("bitsandbytes", OPTION)
    dtype = options["dtype"]
    if dtype == torch.float64:
        raise ModelError(f"{OPTION} computes in bfloat16 or float32; set model.dtype to one")
    if getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["score"] if classifies else None,
        )
    options["device_map"] = {"": device}
    causal_lm = read_pretrained(source, config, options, classifies)
    module: Any
    for module in causal_lm.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
            # With AVX512-BF16, bitsandbytes repacks weights for inference, without gradients.
            module.support_avx512bf16_for_cpu = False
    return causal_lm


def reload_in_4bit(
    causal_lm: Any, device: torch.device, options: dict[str, Any], classifies: bool = False
) -> Any:
    """Quantize a model with random weights by saving it and loading it in 4 bits."""
    with TemporaryDirectory() as folder:
        causal_lm.save_pretrained(folder)
        quantized = load_in_4bit(folder, causal_lm.config, device, options, classifies)
    quantized.name_or_path = quantized.config._name_or_path = ""
    return quantized
