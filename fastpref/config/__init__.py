"""The config of a run: its fields (`schema`), how it is read (`loading`), its errors."""

from fastpref.config.data_section import Data
from fastpref.config.errors import ConfigError
from fastpref.config.fields import Section
from fastpref.config.loading import load, parse, parse_section
from fastpref.config.optim import Optim
from fastpref.config.rounds_section import RoundJudge, Rounds, RoundSampling, RoundScorer
from fastpref.config.schema import Config, ReferenceMode, inner_section, section_of
from fastpref.config.sections import (
    Adapter,
    Calibration,
    Model,
    Monitor,
    Parallel,
    Training,
)

__all__ = [
    "Adapter",
    "Calibration",
    "Config",
    "ConfigError",
    "Data",
    "Model",
    "Monitor",
    "Optim",
    "Parallel",
    "ReferenceMode",
    "RoundJudge",
    "RoundSampling",
    "RoundScorer",
    "Rounds",
    "Section",
    "Training",
    "inner_section",
    "load",
    "parse",
    "parse_section",
    "section_of",
]
