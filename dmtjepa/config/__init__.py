"""The settings of a run: their schema (`settings`), how they are read (`loading`), the texts of faults (`errors`)."""

from dmtjepa.config.errors import ConfigError
from dmtjepa.config.loading import load_config, parse_config
from dmtjepa.config.resume import Resume, changed_settings, resume_rules
from dmtjepa.config.settings import (
    Config,
    DataSettings,
    EvaluationSettings,
    LoggingSettings,
    MaskSettings,
    MetaSettings,
    OptimizationSettings,
    PatchSettings,
    RuntimeSettings,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataSettings",
    "EvaluationSettings",
    "LoggingSettings",
    "MaskSettings",
    "MetaSettings",
    "OptimizationSettings",
    "PatchSettings",
    "Resume",
    "RuntimeSettings",
    "changed_settings",
    "load_config",
    "parse_config",
    "resume_rules",
]
