"""The config of a run: its fields (`schema`), how it is read (`loading`), its errors."""

from fastpref.config.fields import Section
from fastpref.config.loading import load, parse
from fastpref.config.messages import ConfigError
from fastpref.config.schema import (
    Adapter,
    Calibration,
    Config,
    Data,
    Model,
    Monitor,
    Optim,
    Parallel,
    ReferenceMode,
    Training,
    section_of,
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
    "Section",
    "Training",
    "load",
    "parse",
    "section_of",
]
