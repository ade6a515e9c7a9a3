"""What the compiler makes of every kernel at the shapes of training, without a GPU: registers, spills, loads.

Each operator is started with the arguments of its benchmark, for sm_80, sm_90 and sm_100; instead of being launched,
its kernels are compiled. Exits with 1 if a kernel spills registers or needs more shared memory than an A100 has.

    python -m benchmarks.operators.compiled_code [--workloads vit_huge:128] [--architectures 80 90 100] [--out FOLDER]

`loads` and `stores` are those of global memory in the machine code, as count x bytes per thread: each instruction
counts once, also in a loop; so do `barriers`, at which the warps of a program wait for each other. Where architectures
differ, a cell has a value for each.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.machine import environment
from benchmarks.operators import OPERATORS
from benchmarks.workloads import OFFICIAL_WORKLOADS, Workload, add_workloads, chosen_workloads
from dmtjepa.kernels.launch import OPTIONS

# What a program may use on an A100, the smallest of the three.
SHARED_MEMORY_LIMIT = 163 * 1024


class OfflineDriver:
    """Stands in for a GPU while kernels are compiled, not run. Triton keeps one cache per device number."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def resources(kernel: triton.compiler.CompiledKernel, architecture: int) -> dict:
    """Registers, spills, shared memory, barriers, and global loads and stores of a compiled kernel."""
    ptxas = get_ptxas(architecture)  # the one that compiled the kernel: Triton has two, which know different PTX
    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        command = [ptxas.path, "-v", f"--gpu-name={name}", ptx, "-o", Path(folder) / "again.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def number(pattern: str) -> int:
        return int(re.search(pattern, report).group(1))

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "shared_bytes": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "barriers": len(re.findall(r"\bBAR\.", sass)),
        "load_threads": load_threads(kernel.asm["ttgir"]),
        "load_bytes": access_widths(sass, "LDG"),
        "store_bytes": access_widths(sass, "STG"),
    }


def load_threads(ttgir: str) -> list[list[int]]:
    """How the 32 threads of a warp are spread over the axes of each block that is loaded."""
    layouts = dict(re.findall(r"^(#blocked\d*) = .*threadsPerWarp = \[([\d, ]+)\]", ttgir, re.MULTILINE))
    loaded = re.findall(r"= tt\.load .*: tensor<[^#]*, (#blocked\d*)>", ttgir)
    return [[int(number) for number in layouts[name].split(",")] for name in loaded]


def access_widths(sass: str, opcode: str) -> dict[int, int]:
    """How many global loads (LDG) or stores (STG) of each width in bytes, widest first."""
    widths = Counter()
    for modifiers in re.findall(rf"\b{opcode}((?:\.\w+)+)", sass):
        width = re.search(r"\.(256|128|64|U16|S16|16|U8|S8|8)\b", modifiers)
        widths[int(width.group(1).strip("US")) // 8 if width else 4] += 1
    return dict(sorted(widths.items(), reverse=True))


def compile_kernels(workload: Workload, architecture: int, dtype: torch.dtype) -> list[dict]:
    """One row per kernel that the operators launch on this workload."""
    triton.runtime.driver.set_active(OfflineDriver(architecture))
    launched = []

    def compile_instead(kernel, num_programs, *arguments, **constants):
        launched.append(kernel.warmup(*arguments, grid=(num_programs,), **OPTIONS, **constants))

    rows = []
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("dmtjepa.kernels.") and hasattr(module, "launch"):
                stack.enter_context(patch.object(module, "launch", compile_instead))
        for cases in OPERATORS.values():
            for case in cases(workload, "cpu", dtype):
                launched.clear()
                case.launch(*case.arguments)
                rows += [
                    {
                        "case": case.name,
                        "kernel": kernel.name.strip("_").removesuffix("_kernel"),
                        "model": workload.model,
                        "dtype": str(dtype).removeprefix("torch."),
                        "architecture": f"sm_{architecture}",
                        **resources(kernel, architecture),
                    }
                    for kernel in launched
                ]
    return rows


COLUMNS = {
    "warps": lambda row: str(row["num_warps"]),
    "registers": lambda row: str(row["registers"]),
    "spilled bytes": lambda row: str(row["spill_bytes"]),
    "shared bytes": lambda row: str(row["shared_bytes"]),
    "barriers": lambda row: str(row["barriers"]),
    "loads": lambda row: " ".join(f"{n}x{width}" for width, n in row["load_bytes"].items()),
    "stores": lambda row: " ".join(f"{n}x{width}" for width, n in row["store_bytes"].items()),
    "bytes of loads": lambda row: str(sum(n * width for width, n in row["load_bytes"].items())),
}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; a cell has one value per architecture, or one where they agree."""
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        grouped.setdefault((row["case"], row["kernel"], row["model"]), []).append(row)
    lines = [
        "| " + " | ".join(["operator", "kernel", "model", *COLUMNS]) + " |",
        "|" + "---|" * (3 + len(COLUMNS)),
    ]
    for names, per_architecture in grouped.items():
        values = [[column(row) for row in per_architecture] for column in COLUMNS.values()]
        cells = [column[0] if len(set(column)) == 1 else ", ".join(column) for column in values]
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, OFFICIAL_WORKLOADS)
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90, 100])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="folder for compile.json")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: there is nothing to compile; unset it")

    rows = []
    for workload in chosen_workloads(options):
        workload = replace(workload, batch_size=16)  # the code does not depend on it
        for architecture in options.architectures:
            rows += compile_kernels(workload, architecture, getattr(torch, options.dtype))
    print(table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "compile.json").write_text(json.dumps({**environment("cpu"), "rows": rows}, indent=1))
    wrong = [row for row in rows if row["spill_bytes"] or row["shared_bytes"] > SHARED_MEMORY_LIMIT]
    for row in wrong:
        print(
            f"{row['kernel']} at {row['model']} on {row['architecture']}: {row['spill_bytes']} bytes spilled, "
            f"{row['shared_bytes']} bytes of shared memory (limit {SHARED_MEMORY_LIMIT})",
            file=sys.stderr,
        )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
