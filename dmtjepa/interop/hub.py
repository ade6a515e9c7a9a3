"""Weights by the name of a repository of Hugging Face, such as `facebook/ijepa_vith14_1k`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dmtjepa.interop.encoder_file import FILE_NAME
from dmtjepa.interop.errors import WeightsError

PREFIX = "hf-hub:"
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Models of timm have a tag, which names their weights.
_TIMM_NAME = re.compile(r"vit_\w+\.\w*ijepa\w*")
_FILES = (".tar", ".pth", ".pt", ".safetensors", ".yaml")


def find_hub_name(source: Path, roots: Sequence[Path] = (Path(),)) -> str | None:
    """The repository that is named, `owner/name`, or None if a path is: of something that exists, or might.

    Args:
        source: `owner/name` or `hf-hub:owner/name`, or the name of an I-JEPA model of timm, which is `timm/name` there.
        roots: folders that a path is relative to. With a folder `owner` in one of them, it is a path.
    """
    text = source.as_posix()
    if _TIMM_NAME.fullmatch(text):
        return f"timm/{text}"
    name = text.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        return None
    if name == text and (name.endswith(_FILES) or any((root / source.parent).exists() for root in roots)):
        return None
    return name


def download(name: str) -> Path:
    """The file of weights in a repository, from the cache of Hugging Face, or downloaded into it.

    Args:
        name: `owner/name`.

    Raises:
        WeightsError: it cannot be had; the message says why, and how to download it by hand.
    """
    try:
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError as error:
        raise WeightsError(
            f"there is no file or folder {name}; to load it from Hugging Face: pip install huggingface_hub"
        ) from error
    try:
        hf_hub_download(name, "config.json")
        return Path(hf_hub_download(name, FILE_NAME))
    except errors.LocalEntryNotFoundError as error:
        raise WeightsError(
            f"there is no file or folder {name}; it is not in the cache of Hugging Face ({constants.HF_HUB_CACHE}) and "
            f"cannot be downloaded from here. Run `hf download {name} config.json {FILE_NAME} --local-dir FOLDER` "
            "where there is a network, copy FOLDER, and name that"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{name} on Hugging Face has no {FILE_NAME} with a config.json") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"there is no file or folder {name}, and Hugging Face has no repository of this name, or wants to know who "
            "asks: hf auth login"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"{name} cannot be downloaded from Hugging Face: {reason[0]}") from error
