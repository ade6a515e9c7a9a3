"""`python -m dmtjepa.interop`: export a run's or a published checkpoint's encoder, or show what a file holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dmtjepa.config import ConfigError
from dmtjepa.interop.checkpoint import (
    WeightsError,
    build_encoder,
    describe_encoder,
    get_part,
    open_run,
    read_checkpoint,
)
from dmtjepa.interop.export import export_huggingface, export_released, export_timm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dmtjepa.interop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write weights for timm, Hugging Face, or readers of released files")
    export.add_argument("source", type=Path, help="a run folder, or a .pth.tar file (published ones too)")
    export.add_argument("--format", choices=("timm", "hf", "released"), required=True)
    export.add_argument("--out", type=Path, required=True, help="folder to write; for `released` the file to write")
    export.add_argument(
        "--part",
        choices=("target_encoder", "encoder"),
        default="target_encoder",
        help="the teacher (default) or student",
    )
    show = commands.add_parser("show", help="say what a checkpoint holds")
    show.add_argument("source", type=Path, help="a run folder, or a .pth.tar file")
    options = parser.parse_args(arguments)
    try:
        path, image_size = options.source, None
        if path.is_dir():
            config, path = open_run(path)
            image_size = config.data.image_size
        checkpoint = read_checkpoint(path)
        if options.command == "show":
            print(f"{path}\n{summarize(checkpoint)}")
            return 0
        if options.out.exists() and (options.format == "released" or any(options.out.iterdir())):
            raise WeightsError(f"{options.out} already exists; choose another --out")
        if options.format == "released":
            export_released(checkpoint, options.out)
        else:
            weights = get_part(checkpoint, options.part, path)
            encoder = build_encoder(weights, path, image_size=image_size)
            {"timm": export_timm, "hf": export_huggingface}[options.format](encoder, options.out)
    except (WeightsError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}\nload it with:\n  {_LOADING[options.format].format(out=options.out)}")
    return 0


_LOADING = {
    "timm": 'timm.create_model("local-dir:{out}", pretrained=True)',
    "hf": 'transformers.IJepaModel.from_pretrained("{out}")',
    "released": 'torch.load("{out}", weights_only=True)["target_encoder"]',
}


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
