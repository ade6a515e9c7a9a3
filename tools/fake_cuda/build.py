"""Build fake CUDA: a library, loaded before PyTorch, in place of CUDA's runtime and driver, cuBLAS, cuDNN and NCCL.

`runtime.c`, `driver.c` and `capture.c` define the functions that must return something. Every other function that
PyTorch's libraries leave undefined or that the driver's header declares becomes `int name() { return 0; }`: success.

A second library stands in for NVML, which PyTorch looks for by its name. It says that the devices have nothing special.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "fake_cuda"
SOURCES = ("runtime.c", "driver.c", "capture.c")
LIBRARY = "libcuda.so.1"  # under this name every library that looks for the driver finds it
NVML = "libnvidia-ml.so.1"
NVML_NEEDED = ("nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2")  # these succeed
NVML_ERROR_NOT_SUPPORTED = 3  # what the others return


class Unavailable(RuntimeError):
    """Fake CUDA cannot be built here; the message says what is missing."""


def build(folder: Path = FOLDER) -> dict[str, str]:
    """Build the library in `folder` unless it exists; returns the environment variables that enable it.

    The caller may set two more: FAKE_CUDA_DEVICES (1) and FAKE_CUDA_CAPABILITY (90, or 80).
    """
    if torch.cuda.is_available():
        raise Unavailable("this machine has a GPU: use it")
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if torch.version.cuda is None or missing:
        raise Unavailable(f"needs {' and '.join(missing) or 'PyTorch built for CUDA'}")
    key = hashlib.sha256(f"{torch.__version__} {torch.__file__}".encode())
    for path in sorted([*HERE.glob("*.[ch]"), Path(__file__)]):
        key.update(path.read_bytes())
    library = folder.resolve() / key.hexdigest()[:16] / LIBRARY
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            os.replace(_compile_nvml(Path(work)), library.with_name(NVML))
            os.replace(_compile(Path(work)), library)
    return {
        "LD_PRELOAD": f"{library}:{library.with_name(NVML)}",
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_INTERPRET": "0",
        # Code that was chosen by meaningless timings stays in these folders.
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(library.parent / "inductor"),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(16))),
    }


def _compile(work: Path) -> Path:
    """Compile the library into the folder `work`; returns its path."""
    headers = _headers()
    compiler = ["gcc", "-std=gnu17", "-O1", "-fPIC", *(f"-I{folder}" for folder in headers)]
    objects = [work / f"{source}.o" for source in SOURCES]
    for source, target in zip(SOURCES, objects, strict=True):
        _run([*compiler, "-Wall", "-Werror", "-c", str(HERE / source), "-o", str(target)])
    defined = set().union(*(_symbols("--defined-only", path) for path in objects))
    undefined = set().union(*(_symbols("--undefined-only", path) for path in _torch_libraries()))
    names = {name for name in undefined if re.match(r"(__)?cuda|cu|nccl", name)} | _driver_functions(headers[0])
    others = work / "others.c"
    others.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in sorted(names - defined)))
    library = work / LIBRARY
    _run([*compiler, "-w", "-shared", f"-Wl,-soname,{LIBRARY}", *map(str, objects), str(others), "-o", str(library)])
    return library


def _compile_nvml(work: Path) -> Path:
    """Compile the library that stands in for NVML into the folder `work`; returns its path."""
    asked = re.findall(rb"\bnvml[A-Z]\w+", (Path(torch.__file__).parent / "lib/libc10_cuda.so").read_bytes())
    names = {name.decode() for name in asked}
    source, library = work / "nvml.c", work / NVML
    results = {name: 0 if name in NVML_NEEDED else NVML_ERROR_NOT_SUPPORTED for name in names}
    source.write_text("".join(f"int {name}() {{ return {result}; }}\n" for name, result in sorted(results.items())))
    _run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{NVML}", str(source), "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _symbols(which: str, path: Path) -> set[str]:
    """Names of the defined or undefined symbols of an object file or a library."""
    lines = _run(["nm", *(["-D"] if path.suffix == ".so" else []), "-g", which, str(path)]).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line}


def _torch_libraries() -> list[Path]:
    return sorted((Path(torch.__file__).parent / "lib").glob("lib*.so"))


def _headers() -> list[Path]:
    """Folders of headers: the CUDA that PyTorch was built for, and what its package leaves to the compiler's."""
    nvidia = [Path(folder) for folder in importlib.util.find_spec("nvidia").submodule_search_locations]
    found = [path.parent for folder in nvidia for path in folder.glob("*/include/cuda.h")]
    triton = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    if not found or not triton.is_dir():
        raise Unavailable("needs the headers of CUDA, in the packages that PyTorch and Triton install")
    return [found[0], triton]


def _driver_functions(headers: Path) -> set[str]:
    """All functions of the driver, under the names of their versions too."""
    text = (headers / "cuda.h").read_text()
    return {*re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\s*\(", text), *re.findall(r"#define\s+cu\w+\s+(cu\w+_v\d+)\b", text)}
