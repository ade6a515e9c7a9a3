"""Reading settings files and `section.key=value` overrides."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dmtjepa.config.errors import ConfigError
from dmtjepa.config.faults import explain_fault
from dmtjepa.config.settings import Config


def load_config(
    path: str | os.PathLike[str],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    overrides_from: str = "the overrides",
) -> Config:
    """Read a settings file and apply overrides.

    Args:
        overrides: `section.key=value`, with values in YAML; or values by `section.key`.
        overrides_from: where they come from, for errors.

    Raises:
        ConfigError: the file is missing or not YAML, or keys are unknown (the nearest valid name is given),
            or values have a wrong type or lie out of range (the range is given). All faults are listed at once,
            below the file or `overrides_from`, whichever has them.
    """
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not sections of settings")
    return _parse_changed(values, str(path), overrides, overrides_from)


def change_settings(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Settings with other values, by `section.key`. Raises `ConfigError` as `load_config`."""
    return _parse_changed(config.model_dump(mode="json"), "the settings", overrides, "the overrides")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The values in a YAML file.

    Raises:
        ConfigError: the file is missing or not YAML, or holds a key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8: {error}") from None
    except OSError as error:
        similar = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.with_stem(similar[0])}?" if similar else ""
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}{hint}") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def parse_config(values: dict[str, Any], source: str = "settings") -> Config:
    """Validate a tree of settings; `source` names it in errors. Raises `ConfigError` as `load_config`."""
    config, faults = _validate(values)
    if config is None:
        raise ConfigError(_list_faults({source: faults}))
    return config


def _parse_changed(
    values: dict[str, Any], source: str, overrides: Iterable[str] | Mapping[str, Any], overrides_from: str
) -> Config:
    """Validate a tree of settings with overrides.

    Errors name what has the fault: `overrides_from`, if the key at fault is an override; `source`, if its settings have
    the fault by themselves; and both, if they do not fit together.
    """
    pairs = list(overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides))
    changed = copy.deepcopy(values)
    _apply_all(changed, pairs)
    config, faults = _validate(changed)
    if config is not None:
        return config
    _, earlier = _validate(values)
    replaced = [key.split(".") for key, _ in pairs]
    found: dict[str, list[str]] = {}
    for fault in faults:
        place = fault.partition(":")[0].split(".")  # a fault begins with its key
        if any(key == place[: len(key)] or place == key[: len(place)] for key in replaced):
            origin = overrides_from
        else:
            origin = source if fault in earlier else f"{source} together with {overrides_from}"
        found.setdefault(origin, []).append(fault)
    raise ConfigError(_list_faults(found))


def _validate(values: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The settings, or None and their faults."""
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        # A value of the wrong shape is one fault for each type that it could have.
        return None, list(dict.fromkeys(explain_fault(fault) for fault in error.errors()))


def _list_faults(faults: Mapping[str, Iterable[str]]) -> str:
    """Faults below the names of what has them."""
    return "\n".join("\n".join([f"{source}:", *(f"  {fault}" for fault in own)]) for source, own in faults.items())


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key twice, and reads `1e-3` as a number (YAML 1.1 wants `1.0e-3`)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value} is given twice, on lines {lines[key.value]} and {line}; remove one of them"
                )
            lines[key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _apply_all(values: dict[str, Any], pairs: Sequence[tuple[str, Any]]) -> None:
    """Set values in the tree by `section.key`."""
    for key, value in pairs:
        node, parts = values, str(key).split(".")
        if not all(parts):
            raise ConfigError(f"override {key!r}: write it as section.key, e.g. data.batch_size")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {key!r}: {part} is a value, not a section")
        node[parts[-1]] = value
    given = dict(pairs)
    if given.get("data.root_path") and "data.dataset" not in given and values["data"].get("dataset") == "shapes":
        values["data"]["dataset"] = "folder"  # whoever names images does not want the drawn ones of the file


def _parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.strip().split(".")):
        raise ConfigError(f"override {override!r}: write it as section.key=value, e.g. data.batch_size=64")
    try:
        return key.strip(), yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
