"""Configs of reward models: that under examples/ and that of their page."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fastpref import config as configs

ROOT = Path(__file__).parents[2]


def test_the_configs_of_reward_models_are_valid() -> None:
    page = (ROOT / "docs" / "reward-models.md").read_text("utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    example = (ROOT / "examples" / "rewards" / "demo.yaml").read_text("utf-8")
    for text in (block, example):
        config = configs.parse(yaml.safe_load(text))
        assert config.build_loss().of_rewards and config.reference_mode == "none"
        assert config.build_loss().center_rewards_coefficient == 0.01  # type: ignore[union-attr]
