"""The settings of a run: their schema (`settings`), how they are read (`loading`), the texts of faults (`faults`)."""

from dmtjepa.config.errors import ConfigError
from dmtjepa.config.loading import change_settings, load_config, parse_config, read_yaml
from dmtjepa.config.paths import as_file_name, expand_path
from dmtjepa.config.resume import Resume, changed_settings, different_settings, resume_rules
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
from dmtjepa.config.shipped import find_settings, list_shipped

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
    "as_file_name",
    "change_settings",
    "changed_settings",
    "different_settings",
    "expand_path",
    "find_settings",
    "list_shipped",
    "load_config",
    "parse_config",
    "read_yaml",
    "resume_rules",
]
