"""A table of runs: settings that all runs share, and variants that are compared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dmtjepa.config import Config, load_config
from dmtjepa.config.loading import read_yaml
from dmtjepa.errors import UserError

ROOT = Path(__file__).parents[1]


class TableError(UserError, ValueError):
    """A table that cannot be run."""


class Table(BaseModel):
    """A file such as `experiments/tables/scenes_queries.yaml`. Settings are written `section.key=value`.

    base: settings file, relative to the root of the project.
    settings: of all runs.
    variants: name -> what it changes. Tables list them in this order.
    seeds: of each variant. The runs of the first seed come first, so that an unfinished table compares all variants.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    settings: list[str] = []
    variants: dict[str, list[str]] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)

    @field_validator("variants")
    @classmethod
    def _folder_names(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        wrong = [name for name in value if not re.fullmatch(r"[\w.-]+", name)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is the name of a folder: use letters, digits, '_', '.' and '-'")
        return value

    def runs(self) -> list[Run]:
        """All runs, in the order in which they are computed."""
        return [
            Run(variant, seed, self.base, (*self.settings, *changes, f"runtime.seed={seed}"))
            for seed in self.seeds
            for variant, changes in self.variants.items()
        ]


@dataclass(frozen=True)
class Run:
    """A run of a table: `settings` are the overrides of the file `base`."""

    variant: str
    seed: int
    base: str
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def base_path(self) -> Path:
        return ROOT / self.base

    def overrides(self, images: Path, folder: Path) -> list[str]:
        """All overrides for a run on `images` that is written into `folder`."""
        place = {"data.root_path": images.absolute(), "data.image_folder": "", "logging.folder": folder.absolute()}
        return [*self.settings, *(f"{key}={json.dumps(str(value))}" for key, value in place.items())]

    def config(self, images: Path, folder: Path) -> Config:
        """The settings of the run. Raises ConfigError."""
        return load_config(self.base_path, self.overrides(images, folder))


def read_table(path: Path) -> Table:
    """Read a table.

    Raises:
        ConfigError: the file is missing or not YAML. TableError: it is not a table.
    """
    try:
        return Table.model_validate(read_yaml(path))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise TableError(f"{path} is not a table of runs: {faults}") from None
