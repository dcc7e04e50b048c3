"""The loss as a part of a model: what is saved with it, cloned, cast and restored."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref import losses
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.fused import FusedPreferenceLoss
from fastpref.losses.registry import BY_NAME
from tests.helpers.fused_batches import V, batch

STATEFUL = {
    "bco": (lambda: FusedPreferenceLoss("bco"), {"mean_reward.count", "mean_reward.mean"}),
    "calibrated dpo": (
        lambda: FusedPreferenceLoss("dpo", RewardCalibration()),
        {"calibration.averages", "calibration.last"},
    ),
    "calibrated pairs": (
        lambda: FusedPreferenceLoss("dpo", PairCalibration()),
        {"calibration.averages"},
    ),
}
each_stateful = pytest.mark.parametrize("kind", STATEFUL)


class Model(nn.Module):
    """A head, and the loss beside it, as under FSDP."""

    def __init__(self, loss: FusedPreferenceLoss) -> None:
        super().__init__()
        self.head = nn.Linear(6, V, bias=False)
        self.loss = loss

    def step(self, seed: int = 0) -> Tensor:
        hidden, _, labels = batch(seed=seed, dtype=torch.float32)
        given: dict[str, Tensor] = {"ref_logps": torch.full((6,), -3.0 - seed)}
        if isinstance(self.loss.loss, losses.PointwiseLoss):
            given["desirable"] = torch.arange(6) % 2 == 0
        loss, _ = self.loss(hidden.to(self.head.weight), self.head.weight, labels, **given)
        loss.backward()
        return loss.detach()


def stateful(kind: str, steps: int = 1) -> Model:
    torch.manual_seed(0)
    model = Model(STATEFUL[kind][0]())
    for seed in range(steps):
        model.step(seed)
    return model


def test_an_objective_without_averages_adds_nothing_to_a_state_dict() -> None:
    for name in BY_NAME:
        keys = set(FusedPreferenceLoss(name).state_dict())
        assert keys == (STATEFUL["bco"][1] if name == "bco" else set()), name


@each_stateful
def test_averages_are_buffers_of_numbers(kind: str) -> None:
    model = stateful(kind)
    names = {name for name, _ in model.loss.named_buffers()}
    assert names == set(model.loss.state_dict()) == STATEFUL[kind][1]
    assert all(b.isfinite().all() and b.dtype == torch.float64 for b in model.loss.buffers())


@each_stateful
def test_a_copy_and_a_restored_model_go_on_as_the_model_itself(kind: str, tmp_path) -> None:
    model = stateful(kind, 2)
    clone = copy.deepcopy(model)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    restored, loaded = stateful(kind, 0), stateful(kind, 0)
    restored.load_state_dict(ema)
    save_model(model, tmp_path / "model.safetensors")
    load_model(loaded, tmp_path / "model.safetensors")
    for seed in (2, 3):
        expected = model.step(seed)
        assert all(torch.equal(m.step(seed), expected) for m in (clone, restored, loaded))
    for other in (clone, restored, loaded):
        pairs = zip(model.buffers(), other.buffers(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(ema[f"loss.{n}"], b) for n, b in model.loss.named_buffers())


@each_stateful
def test_a_cast_leaves_averages_in_fp64_and_a_module_without_storage_takes_them(kind: str) -> None:
    model = stateful(kind, 2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for cast in (model.to(torch.bfloat16), model.half(), model.float()):
        assert all(torch.equal(b, before[n]) for n, b in cast.named_buffers())
    meta = stateful(kind, 0).to("meta")
    meta.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(meta.step(2), model.step(2))
    assert all(map(torch.equal, meta.buffers(), model.buffers()))


@each_stateful
def test_checkpoints_with_extra_state_are_loaded(kind: str) -> None:
    model, restored = stateful(kind, 2), stateful(kind, 0)
    old = {n: v for n, v in model.state_dict().items() if not n.startswith("loss.")}
    restored.load_state_dict(old | {"loss._extra_state": model.loss.averages()})
    assert all(map(torch.equal, restored.buffers(), model.buffers()))
    plain = Model(FusedPreferenceLoss("dpo"))
    plain.load_state_dict(old | {"loss._extra_state": {}})
    plain.load_state_dict(old)  # of a model without the loss


def test_a_calibration_restored_by_itself_reaches_the_buffers() -> None:
    donor = stateful("calibrated dpo", 2)
    calibration = RewardCalibration()
    model = Model(FusedPreferenceLoss("dpo", calibration))
    model.head.load_state_dict(donor.head.state_dict())
    calibration.load_state_dict({k: v.clone() for k, v in donor.loss.averages().items()})
    assert torch.equal(model.step(2), donor.step(2))
    assert all(map(torch.equal, model.buffers(), donor.buffers()))
    assert torch.equal(calibration.averages, model.loss.calibration.averages)


def test_averages_of_another_kind_are_refused() -> None:
    averages = stateful("bco").loss.averages()
    with pytest.raises(ValueError, match="averages: dpo without a calibration has none, got count"):
        FusedPreferenceLoss("dpo").load_averages(averages)
    with pytest.raises(ValueError, match="state: expected float64 averages"):
        FusedPreferenceLoss("dpo", RewardCalibration()).load_averages(averages)


@pytest.mark.parametrize("kind", ["bco", "calibrated dpo"])
def test_a_hugging_face_model_with_the_loss_inside_is_saved(kind: str, tmp_path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=16, num_attention_heads=1, num_key_value_heads=1, **sizes)
    for loss in (FusedPreferenceLoss("dpo"), STATEFUL[kind][0]()):
        model = LlamaForCausalLM(config)
        model.loss_module = loss
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        assert all(map(torch.equal, again.parameters(), model.parameters()))
