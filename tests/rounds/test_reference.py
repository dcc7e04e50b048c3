"""References that follow the policy: of adapters and of all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastpref.data.collate import collate
from fastpref.data.dataset import TokenGroup
from fastpref.model.export import export
from fastpref.model.load import load_policy
from fastpref.rounds.reference import Following
from fastpref.rounds.session import Session
from fastpref.utils.progress import Display
from tests.helpers.round_runs import config_of

BATCH = collate(
    [
        TokenGroup(
            0, 0, torch.arange(3, 9).int().numpy(), (torch.arange(9, 14).int().numpy(),), (1.0,)
        )
    ],
    "pointwise",
)


def session_of(llama: str, home: Path, reference: Any, **sections: Any) -> Session:
    rounds = config_of(llama, home).rounds
    assert rounds is not None
    values = {**rounds.model_dump(mode="json", exclude_unset=True), "reference": reference}
    config = config_of(llama, home, rounds=values, **sections)
    return Session(config, Display(Console(quiet=True)), None)


def logps(model: Any) -> float:
    with torch.no_grad():
        return float(model(BATCH).logps[0])


def change_adapter(session: Session, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in session.policy.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_an_adapter_that_is_synchronized_equals_the_merged_model(
    tiny_llama: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    session = session_of(tiny_llama, tmp_path, {"every": 1}, adapter={"r": 4, **options})
    assert session.reference.copy is not None
    change_adapter(session, 1)
    (follows,) = session.reference.hooks()
    follows.before_step(0)
    follows.after_step()
    export(session.policy, session.tokenizer, tmp_path / "merged", merge=True)
    model = session.config.model.model_copy(update={"path": str(tmp_path / "merged")})
    config = session.config
    merged = load_policy(model, session.tokenizer, session.device, config.training, config.parallel)
    change_adapter(session, 2)
    synchronized = session.reference.copy.reference(BATCH)
    assert synchronized is not None
    assert float(synchronized.logps[0]) == pytest.approx(logps(merged.eval()), abs=1e-4)
    assert abs(logps(session.policy) - logps(merged)) > 0.1


def test_a_copy_of_all_weights_follows_every_second_step(tiny_llama: str, tmp_path: Path) -> None:
    session = session_of(tiny_llama, tmp_path, {"every": 2})
    copy = session.reference.copy
    assert copy is not None
    seen = []
    (follows,) = session.reference.hooks()
    for step in range(4):
        change_adapter(session, step)
        follows.before_step(step)
        follows.after_step()
        reference = copy.reference(BATCH)
        assert reference is not None
        seen.append((float(reference.logps[0]), logps(session.policy)))
    assert seen[1][0] == seen[1][1] and seen[3][0] == seen[3][1]
    assert seen[2][0] == seen[1][0] and seen[2][1] != seen[1][1]


def test_an_exponential_average_of_the_adapter(tiny_llama: str, tmp_path: Path) -> None:
    session = session_of(tiny_llama, tmp_path, {"ema": 0.75}, adapter={"r": 2})
    (follows,) = session.reference.hooks()
    assert isinstance(follows, Following)
    tensors = session.reference.tensors
    name = next(name for name in tensors if "lora_A" in name)
    start = tensors[name].clone()
    trained = dict(session.policy.named_parameters())[
        name.removeprefix("reference.").replace(".reference.", ".default.")
    ]
    with torch.no_grad():
        trained.add_(1.0)
    for step in range(2):
        follows.before_step(step)
        follows.after_step()
    # 1 - 0.75² of the way.
    torch.testing.assert_close(tensors[name], start + 0.4375, rtol=0, atol=1e-6)


def test_the_start_is_the_base_while_the_copy_follows(tiny_llama: str, tmp_path: Path) -> None:
    session = session_of(tiny_llama, tmp_path, {"every": 1}, adapter={"r": 2})
    before = logps(session.policy)
    change_adapter(session, 1)
    assert session.reference.copy is not None
    session.reference.copy.synchronize()
    with session.reference.start() as start:
        assert start is not None
        assert logps(start) == pytest.approx(before, abs=1e-5)
    assert logps(session.policy) != pytest.approx(before, abs=1e-3)
