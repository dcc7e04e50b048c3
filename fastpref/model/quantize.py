"""A frozen base whose linear layers, but not the head, are kept in 4 bits (QLoRA).

NF4 with double quantisation, arXiv:2305.14314, by bitsandbytes through transformers.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from fastpref.utils.errors import ModelError
from fastpref.utils.optional_packages import require

OPTION = "adapter.quantize: nf4"


def check_quantization(path: str, config: PreTrainedConfig, wanted: bool) -> None:
    """Refuse a model that is quantised already, unless as it is `wanted`."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    if found.get("bnb_4bit_quant_type") != "nf4" or not found.get("load_in_4bit"):
        kind = found.get("quant_method", "in an unknown way")
        raise ModelError(
            f"model.path: {path} is quantised ({kind}), which is not supported; name the model "
            "that it was made of"
        )
    if not wanted:
        raise ModelError(
            f"model.path: {path} is quantised, and only an adapter can be trained on it; set "
            f"{OPTION}"
        )


def load_in_4bit(
    source: str, config: PreTrainedConfig, device: torch.device, options: dict[str, Any]
) -> Any:
    """`from_pretrained`, with `options`, onto the device; the linear layers in 4 bits.

    Raises ModelError or MissingPackage where that cannot be had.
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
        )
    options["device_map"] = {"": device}
    causal_lm = AutoModelForCausalLM.from_pretrained(source, config=config, **options)
    module: Any
    for module in causal_lm.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
            # On some CPUs it would lay weights out for inference, which then give no gradient.
            module.support_avx512bf16_for_cpu = False
    return causal_lm


def reloaded_in_4bit(causal_lm: Any, device: torch.device, options: dict[str, Any]) -> Any:
    """A model that was built here, as if it had been loaded."""
    with TemporaryDirectory() as folder:
        causal_lm.save_pretrained(folder)
        loaded = load_in_4bit(folder, causal_lm.config, device, options)
    loaded.name_or_path = loaded.config._name_or_path = ""
    return loaded
