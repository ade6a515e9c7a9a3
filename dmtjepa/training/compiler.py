"""What torch.compile and Triton need of a machine: a compiler, and a folder for what it makes."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dmtjepa.config import Config, ConfigError
from dmtjepa.training.compute_plan import ComputePlan


def check_compiler(config: Config, device_type: str) -> None:
    """Refuse settings that need a compiler where there is none, or where its cache cannot be used. Nothing is left.

    Raises:
        ConfigError: with the program that was not found, or the folder and the environment variable that moves it.
    """
    compiled = ComputePlan.from_config(config, device_type).compiled
    triton = device_type == "cuda" and (compiled or config.runtime.kernels == "triton")
    if device_type == "cpu" and compiled:
        given = os.environ.get("CXX")
        if not shutil.which(given or "g++"):
            raise ConfigError(
                f"runtime.compile: there is no C++ compiler ({given or 'g++'}); install it, let the environment "
                "variable CXX name one, or set runtime.compile: off"
            )
    if triton:
        given = os.environ.get("CC")
        if not any(map(shutil.which, [given] if given else ["gcc", "clang"])):
            raise ConfigError(
                f"runtime.kernels: triton needs a C compiler ({given or 'gcc or clang'}); install it, let the "
                "environment variable CC name one, or set runtime.kernels: torch and runtime.compile: off"
            )
    if compiled:
        _check_cache(_find_inductor_cache, "TORCHINDUCTOR_CACHE_DIR", "runtime.compile: off")
        if device_type == "cpu":  # compiled headers of C++ are kept in the default cache, whatever the variable says
            _check_cache(_find_default_cache, "TMPDIR", "runtime.compile: off")
    # The Triton kernels of torch.compile are kept in its own cache, unless the variable names another folder.
    if triton and (config.runtime.kernels == "triton" or "TRITON_CACHE_DIR" in os.environ):
        _check_cache(_find_triton_cache, "TRITON_CACHE_DIR", "runtime.kernels: torch and runtime.compile: off")


def _find_inductor_cache() -> str:
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return _find_default_cache() if given is None else given


def _find_default_cache() -> str:
    """As `torch._inductor` finds it, whose import takes seconds and makes the folder that the variable names."""
    user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")


def _find_triton_cache() -> str:
    from triton import knobs

    return knobs.cache.dir


def _check_cache(find: Callable[[], str], variable: str, setting: str) -> None:
    """Check that programs can be written into a cache, which need not exist yet, and run from there.

    Args:
        find: the folder of the cache.
        variable: environment variable that names another folder.
        setting: what makes the cache unnecessary.

    Raises:
        ConfigError: they cannot.
    """
    path = None
    try:
        path = Path(find() or os.devnull).absolute()  # an empty name is no folder
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        tempfile.TemporaryFile(dir=existing).close()  # permissions alone do not tell: root has all of them
        if os.statvfs(existing).f_flag & os.ST_NOEXEC:
            raise PermissionError(f"{existing} is mounted without permission to run programs (noexec)")
        if existing == path:
            _check_contents(path)
    except (OSError, KeyError) as error:  # KeyError: no HOME, and no entry in the passwd file
        place = f"the cache of compiled programs, {path}, cannot be used" if path else "there is no place for its cache"
        raise ConfigError(
            f"{setting.partition(':')[0]}: {place}: {error}. Let the environment variable {variable} name a folder "
            f"that can be written to, or set {setting}"
        ) from None


def _check_contents(cache: Path) -> None:
    """Check that this user can write to what a cache holds already: another user may have made it.

    Folders of two levels and their lock files are looked at. The files further down are only read, or replaced.

    Raises:
        PermissionError: with the first folder or file that cannot be written to, and whose it is.
    """
    for folder, folders, files in os.walk(cache):
        locks = [name for name in files if name.endswith(".lock")]
        for path in (Path(folder, name) for name in (*folders, *locks)):
            needed = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
            if not os.access(path, needed, effective_ids=True) and path.exists():  # others may remove files meanwhile
                raise PermissionError(f"{path}, of the user {_find_owner(path)}, cannot be written to")
        if Path(folder) != cache:
            folders.clear()


def _find_owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:  # no entry in the passwd file
        return str(path.stat().st_uid)
