"""`python -m dmtjepa.interop`: show, export or verify a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dmtjepa.checkpoint_format import CheckpointError, find_checkpoint, find_fault, is_checkpoint, read_meta, step_of
from dmtjepa.checkpoint_reader import TensorReader
from dmtjepa.config import parse_config
from dmtjepa.errors import UserError
from dmtjepa.interop.huggingface import export_huggingface
from dmtjepa.interop.official import export_checkpoint, export_official
from dmtjepa.interop.timm import export_timm
from dmtjepa.interop.weights import (
    WeightsError,
    build_encoder,
    check_finite,
    describe_encoder,
    get_part,
    read_checkpoint,
)
from dmtjepa.output import protect_output
from dmtjepa.run_folder import open_run

SOURCE = "a run folder (its latest export), a checkpoints/step-N folder, or a .pth.tar file"
ALIASES = {"released": "official"}  # the name in earlier versions
LOADING = {
    "timm": 'timm.create_model("local-dir:{out}", pretrained=True)',
    "hf": 'transformers.IJepaModel.from_pretrained("{out}")',
    "official": 'torch.load("{out}", weights_only=True)["target_encoder"]',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    protect_output()
    options = _parse(arguments)
    try:
        return {"show": _show, "export": _export, "verify": _verify}[options.command](options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dmtjepa.interop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print what a checkpoint holds")
    show.add_argument("source", type=Path, help=SOURCE)
    export = commands.add_parser("export", help="write weights for timm, Hugging Face, or the official code")
    export.add_argument("source", type=Path, help=SOURCE)
    export.add_argument("--format", choices=(*LOADING, *ALIASES), required=True)
    export.add_argument("--out", type=Path, required=True, help="folder to write; for `official` the file to write")
    export.add_argument(
        "--part",
        choices=("target_encoder", "encoder"),
        default="target_encoder",
        help="the teacher (default) or student",
    )
    verify = commands.add_parser("verify", help="compare a checkpoint with its manifest")
    verify.add_argument("source", type=Path, help="a run folder (its newest checkpoint) or a checkpoints/step-N folder")
    options = parser.parse_args(arguments)
    if options.command == "export":
        options.format = ALIASES.get(options.format, options.format)
    return options


def _show(options: argparse.Namespace) -> int:
    path = _find_source(options.source)
    print(f"{path}\n{summarize(read_checkpoint(path))}")
    return 0


def _export(options: argparse.Namespace) -> int:
    path, out = _find_source(options.source), options.out
    if out.exists() and (options.format == "official" or any(out.iterdir())):
        raise WeightsError(f"{out} already exists; choose another --out")
    if options.format == "official" and path.is_dir():
        export_checkpoint(path, out)
    elif options.format == "official":
        export_official(read_checkpoint(path), out)
    else:
        weights = get_part(read_checkpoint(path), options.part, path)
        check_finite(weights, f"{options.part} of {path}")
        encoder = build_encoder(weights, path, image_size=_find_image_size(options.source))
        {"timm": export_timm, "hf": export_huggingface}[options.format](encoder, out)
    print(f"wrote {out}\nload it with:\n  {LOADING[options.format].format(out=out)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.source.is_file():
        raise CheckpointError(f"{options.source} has no manifest; give a run folder or a step-N folder")
    checkpoint = find_checkpoint(options.source)
    fault = find_fault(checkpoint)
    if fault is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {fault}")
    TensorReader(checkpoint).read_metadata()  # raises if the folder holds anything but tensors
    print(f"{checkpoint} is whole: step {step_of(checkpoint)}")
    return 0


def _find_source(source: Path) -> Path:
    """The file or checkpoint folder to read."""
    if not source.is_dir():
        return source
    if not is_checkpoint(source):
        run, _ = open_run(source)
        return run.latest_export
    fault = find_fault(source)
    if fault is not None:
        raise CheckpointError(f"{source} is damaged: {fault}")
    return source


def _find_image_size(source: Path) -> tuple[int, int] | None:
    """Height and width of the images that were trained on, if settings beside the weights tell them."""
    if not source.is_dir():
        return None
    if is_checkpoint(source):
        return parse_config(read_meta(source).get("config", {}), source=str(source)).data.image_size
    _, config = open_run(source)
    return config.data.image_size


def summarize(checkpoint: dict[str, Any]) -> str:
    """Parts of a checkpoint with their parameter counts, and its numbers, one a line."""
    lines = []
    for name, value in checkpoint.items():
        if isinstance(value, dict) and value and all(isinstance(item, Tensor) for item in value.values()):
            count = sum(item.numel() for item in value.values())
            kind = f": {describe_encoder(value)}" if name in ("encoder", "target_encoder") else ""
            lines.append(f"  {name}: {count / 1e6:.1f} M values in {len(value)} tensors{kind}")
        elif isinstance(value, (int, float, str)):
            lines.append(f"  {name}: {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
