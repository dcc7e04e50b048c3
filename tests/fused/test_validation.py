"""Arguments that an objective needs, and those that it refuses, by name."""

from __future__ import annotations

import pytest
import torch

from fastpref import losses
from fastpref.fused import FusedPreferenceLoss
from tests.helpers.fused_batches import batch

HIDDEN, WEIGHT, LABELS = batch()
BIAS = torch.zeros(len(WEIGHT), dtype=torch.float64)
REFERENCE = {"ref_hidden": HIDDEN, "ref_weight": WEIGHT}
SUMS = {"ref_logps": torch.zeros(6)}
DESIRABLE = {"desirable": torch.ones(6).bool()}
GROUPS = {"cu_groups": torch.tensor([0, 2, 6]), "scores": torch.ones(6)}
TOKENS = torch.ones(LABELS.shape)
POINT = {"reference_point": torch.zeros(())}


class Sharded(torch.Tensor):
    """A tensor with the mark of a DTensor, which needs a process group."""

    device_mesh = "mesh"


def sharded(tensor):
    return tensor.clone().as_subclass(Sharded)


@pytest.mark.parametrize(
    ("objective", "given", "message"),
    [
        ("dpo", SUMS | DESIRABLE, r"desirable: dpo has no use for it; it takes preference, ref"),
        ("dpo", SUMS | {"token_weights": TOKENS}, r"token_weights: dpo has no use for it"),
        ("dpo", {"ref_token_logps": TOKENS}, r"ref_token_logps: dpo has no use for it"),
        ("dpo", SUMS | {"ref_bias": BIAS}, r"ref_bias: belongs to ref_hidden and ref_weight"),
        ("kto", SUMS | POINT, r"desirable: kto needs which responses .*got None"),
        ("kto", SUMS | DESIRABLE, r"reference_point: kto needs the mean log-ratio.*got None"),
        ("kto_simple", SUMS | DESIRABLE | POINT, r"reference_point: kto_simple has no use for it"),
        ("bco", SUMS | DESIRABLE | POINT, r"reference_point: bco has no use for it"),
        ("bco", SUMS | DESIRABLE | {"preference": torch.ones(3)}, r"preference: bco has no use"),
        ("bco", SUMS | {"desirable": torch.ones(6)}, r"desirable: expected bool"),
        ("bco", DESIRABLE, r"ref_logps: bco needs a reference.*got neither"),
        ("nca", SUMS | {"scores": torch.ones(6)}, r"cu_groups: nca needs the offsets"),
        ("nca", SUMS | GROUPS | {"scores": torch.ones(4)}, r"scores: expected shape \(6,\)"),
        (
            "nca",
            SUMS | GROUPS | {"cu_groups": torch.tensor([0, 4, 5])},
            r"cu_groups: must rise from 0 to 6, the number of responses, got 5 as the last",
        ),
        ("nca", SUMS | GROUPS | {"importance": TOKENS}, r"importance: nca has no use for it"),
        ("tdpo2", SUMS, r"ref_logps: tdpo2 has no use for it; .* ref_token_logps"),
        ("tdpo2", {"ref_token_logps": TOKENS}, r"ref_hidden: tdpo2 needs the divergence"),
        ("tdpo2", REFERENCE | {"bias": BIAS}, r"bias: tdpo2 needs a divergence"),
        ("tdpo2", REFERENCE | {"ref_bias": BIAS}, r"ref_bias: tdpo2 needs a divergence"),
        ("tdpo2", REFERENCE | {"importance": TOKENS}, r"importance: tdpo2 has no use for it"),
        ("ti_dpo", REFERENCE, r"importance: ti_dpo needs how much each token matters"),
        ("ti_dpo", REFERENCE | {"importance": TOKENS[:2]}, r"importance: expected shape \(6, 5\)"),
        ("ti_dpo", REFERENCE | {"importance": TOKENS, "ref_token_logps": TOKENS}, r"got both"),
    ],
)
def test_arguments_that_are_refused(objective, given, message):
    module = FusedPreferenceLoss(objective)
    with pytest.raises(ValueError, match=message):
        module(HIDDEN, WEIGHT, LABELS, **given)


@pytest.mark.parametrize("name", ["kto_simple", "nca"])
def test_single_responses_and_groups_need_no_even_number_of_sequences(name):
    given = {"desirable": torch.ones(5).bool()} if name == "kto_simple" else {}
    if name == "nca":
        given = {"cu_groups": torch.tensor([0, 2, 5]), "scores": torch.rand(5)}
    given |= {"ref_logps": torch.zeros(5)}
    module = FusedPreferenceLoss(name)
    loss, _ = module(HIDDEN[:5], WEIGHT, LABELS[:5], **given)
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"hidden: expected shape \(S, L, D\) or \(T, D\)"):
        module(HIDDEN[:0], WEIGHT, LABELS[:0], **given)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected S \+ 1 offsets"):
        module(HIDDEN[0], WEIGHT, LABELS[0], torch.tensor([0]), **given)


def test_an_option_that_looks_at_tokens_takes_the_arguments_of_tokens():
    module = FusedPreferenceLoss(losses.build("simpo", ld_alpha=0.5))
    loss, _ = module(HIDDEN, WEIGHT, LABELS, token_weights=TOKENS)
    assert loss == module(HIDDEN, WEIGHT, LABELS)[0]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 5], r"cu_seqlens: must rise from 0 to 5, the number of tokens, got 1 as the first"),
        ([0, 2, 4], "got 4 as the last"),
        ([0, 6, 5], "got 5 after 6"),
        ([0.0, 2.0, 5.0], "cu_seqlens: expected an int32 or int64 vector"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(offsets, message, shift):
    with pytest.raises(ValueError, match=message):
        FusedPreferenceLoss("simpo")(
            HIDDEN[0], WEIGHT, LABELS[0], torch.tensor(offsets), shift=shift
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS.clamp(min=len(WEIGHT))}, r"labels: expected -100 or"),
        ({"weight": sharded(WEIGHT)}, r"^weight: got a DTensor.*inside the forward of the FSDP"),
        ({"ref_weight": sharded(WEIGHT)}, r"^ref_weight: got a DTensor.*inside the forward"),
        ({"hidden": sharded(HIDDEN)}, r"^hidden: got a DTensor.*its to_local\(\)"),
        ({"attention_mask": sharded(LABELS)}, r"^attention_mask: got a DTensor"),
        ({"ref_logps": sharded(torch.zeros(6))}, r"^ref_logps: got a DTensor"),
    ],
)  # fmt: skip
def test_labels_out_of_range_and_sharded_tensors_are_refused(change, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | SUMS | change
    with pytest.raises(ValueError, match=message):
        FusedPreferenceLoss("dpo")(**arguments)
