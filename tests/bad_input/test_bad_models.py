"""Models, tokenizers, adapters and runs; packages and memory that are not there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bad_input.command import Case, Shell
from tests.bad_input.models import CASES, LORA, PAIRS, TRAIN

MISSING = {
    "adapter.quantize: nf4 needs bitsandbytes; pip install bitsandbytes": {
        "adapter": {**LORA, "quantize": "nf4"}
    },
    "optim.name: adamw_8bit needs bitsandbytes; pip install bitsandbytes": {
        "optim": {"name": "adamw_8bit"}
    },
    "model.attn_implementation: flash_attention_2 needs flash-attn; pip install flash-attn": {
        "model": {"attn_implementation": "flash_attention_2"}
    },
}
OUT_OF_MEMORY = "out of memory; lower training.micro_batch_tokens or data.max_length, or train an *"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_is_refused(shell: Shell, case: Case) -> None:
    shell.meet(case)


@pytest.mark.parametrize("says", MISSING)
def test_a_package_that_is_missing(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    monkeypatch.setattr("fastpref.utils.optional_packages.has", lambda package: False)
    shell.meet(Case("a package", says, MISSING[says], PAIRS, arguments=TRAIN))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: not enough memory"),
        type("OutOfMemoryError", (RuntimeError,), {})(
            "CUDA out of memory. Tried to allocate 2 GiB"
        ),
    ],
)
def test_memory_that_is_short(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("fastpref.training.trainer.train", fails)
    shell.meet(Case("memory", OUT_OF_MEMORY, {}, PAIRS, arguments=TRAIN))


def test_a_run_that_diverges(shell: Shell) -> None:
    """What it has written by then is its log, and says which rows to look at."""
    shell.prepare(
        Case("diverges", None, {"optim": {"lr": 1e30}, "data": {"cache": "cache"}}, PAIRS)
    )
    outcome = shell(*TRAIN, "training.epochs=9", "training.log_every=1")
    assert outcome.code == 2 and "(all in run/nonfinite.json); look at them or l" in outcome.err
    assert outcome.err.count("\n") == 1 and all(name.startswith("run") for name in outcome.changed)


def test_another_error_is_a_bug_and_shows_where(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fastpref.training.trainer.train", fails)
    shell.prepare(Case("a bug", None, {}, PAIRS))
    with pytest.raises(RuntimeError, match="a bug"):
        shell(*TRAIN)
