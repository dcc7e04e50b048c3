"""Every Python snippet of docs/integrations.md and of the README runs as it stands."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.loops import ranks, setting, snippets
from benchmarks.loops.libraries import LOOPS
from benchmarks.loops.of_open_instruct import collate
from tests.helpers import rank_processes, snippet_names

SECTIONS = {
    heading: [code for _, code in blocks]
    for heading, blocks in itertools.groupby(snippets.of_page(), key=itemgetter(0))
}
ON_RANKS = {loop.heading for loop in LOOPS.values()}


def run(blocks: list[str], names: dict[str, Any]) -> None:
    for code in blocks:
        exec(compile(code, "snippet", "exec"), names)  # noqa: S102


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("heading", [name for name in SECTIONS if name not in ON_RANKS])
def test_a_section_runs(
    heading: str,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "DistributedDataParallel" in "".join(SECTIONS[heading]):
        request.getfixturevalue("alone")
    run(SECTIONS[heading], snippet_names.of_integrations(tokenizer))


@pytest.mark.parametrize(
    "name", [name for name in LOOPS if name not in ("torchtune", "open-instruct")]
)
def test_on_two_ranks_a_loop_trains_what_plain_pytorch_trains(name: str, tmp_path: Path) -> None:
    loop = LOOPS[name]
    for package in loop.packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; run python -m benchmarks.loops {name}")
    rank_processes.start(ranks.work, setting.RANKS, loop, True, tmp_path)
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors["between_ranks"] == 0.0
    assert errors["parameters"] < 1e-5 and errors.get("loss", 0.0) < 1e-6


def test_the_method_of_a_torchtune_recipe_returns_its_log_probs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "my_dpo", snippet_names.torchtune_recipe())
    names: dict[str, Any] = {}
    run(SECTIONS["torchtune"], names)
    model, batch = snippet_names.Decoder(), setting.collate(setting.examples()[:2])
    columns = batch["input_ids"], batch["labels"]
    chosen, rejected, *no_logits = names["FusedDPORecipe"]().concatenated_forward(model, columns)
    expected = setting.sequence_logps(model, batch, lambda model, batch: model(batch["input_ids"]))
    torch.testing.assert_close(torch.cat([chosen, rejected]), expected)
    assert all(value.isnan() for value in no_logits)


@pytest.mark.parametrize("average", [False, True])
def test_the_function_of_open_instruct_returns_its_log_probs(
    average: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = snippet_names.open_instruct()
    monkeypatch.setitem(sys.modules, "open_instruct", package)
    run(SECTIONS["open-instruct"], {})
    model, rows = setting.causal_model(), setting.examples()[:2]
    chosen, rejected, auxiliary = package.dpo_utils.concatenated_forward(
        model, collate(list(enumerate(rows))), average_log_prob=average
    )
    batch = setting.collate(rows)
    expected = setting.sequence_logps(model, batch, setting.causal_logits)
    if average:
        expected = expected / (batch["labels"] != -100).sum(1)
    torch.testing.assert_close(torch.cat([chosen, rejected]), expected)
    assert auxiliary is None
    with pytest.raises(ValueError, match="packing"):
        package.dpo_utils.concatenated_forward(model, {}, packing=True)


def test_the_snippet_of_the_readme_computes_gradients() -> None:
    names = snippet_names.of_readme()
    (code,) = (code for _, code in snippets.of_page(snippets.ROOT / "README.md"))
    run([code], names)
    assert names["token_logps"].shape == (14,) and names["logps"].shape == (4,)
    gradients = torch.stack([names["chosen"].grad, names["rejected"].grad])
    assert gradients.isfinite().all() and (gradients != 0).all()
