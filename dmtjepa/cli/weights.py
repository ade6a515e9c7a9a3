"""`dmtjepa show`, `export` and `verify`: what a checkpoint holds, and its weights for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmtjepa.arguments import describe_command
from dmtjepa.cli.exit_status import run_command
from dmtjepa.errors import UserError

SOURCE = (
    "a run folder (its latest weights), a checkpoints/step-N folder, a .pth.tar file, a folder of timm or Hugging "
    "Face, or a name such as facebook/ijepa_vith14_1k"
)
ALIASES = {"released": "official"}  # the name in earlier versions; `--help` says so
LOADING = {
    "timm": ("timm", 'timm.create_model("local-dir:{out}", pretrained=True)'),
    "hf": ("transformers", 'transformers.IJepaModel.from_pretrained("{out}")'),
    "onnx": ("onnxruntime", 'onnxruntime.InferenceSession("{out}").run(["patches", "pooled"], {{"images": images}})'),
    "pt2": ("torch", 'torch.export.load("{out}").module()(images)'),
    "safetensors": ("dmtjepa", 'dmtjepa.load("{out}").features(images)'),
    "official": ("torch", 'torch.load("{out}", weights_only=True)["target_encoder"]'),
}
"""Format -> the library that loads it, and how."""
FOLDERS = ("timm", "hf")  # the other formats are files


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m dmtjepa.interop") -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments, prog)
    work = {"show": _show, "export": _export, "verify": _verify}[options.command]
    return run_command(lambda: work(options), errors=(UserError, OSError))


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description="Show, export or verify a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "show",
        help="print what a checkpoint holds",
        **describe_command(
            "Print what a checkpoint holds.", "dmtjepa show runs/mine", "dmtjepa show facebook/ijepa_vith14_1k"
        ),
    )
    show.add_argument("source", type=Path, metavar="SOURCE", help=SOURCE)
    _add_export(commands)
    verify = commands.add_parser(
        "verify",
        help="compare a checkpoint with its manifest",
        **describe_command(
            "Compare every file of a checkpoint with the sizes and digests in its manifest.",
            "dmtjepa verify runs/mine",
        ),
    )
    verify.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run folder (its newest checkpoint) or a checkpoints/step-N folder",
    )
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse would show the usage of all commands
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command == "export":
        options.format = ALIASES.get(options.format, options.format)
    return options


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write weights for timm, Hugging Face, ONNX, torch.export, safetensors, or the official code"
    export = commands.add_parser(
        "export",
        help=text,
        **describe_command(
            f"{text[0].upper()}{text[1:]}.",
            "dmtjepa export runs/mine --format timm --out mine-timm",
            "dmtjepa export runs/mine --format onnx --out mine.onnx --image-size 224",
        ),
    )
    export.add_argument("source", type=Path, metavar="SOURCE", help=SOURCE)
    export.add_argument(
        "--format",
        choices=(*LOADING, *ALIASES),
        metavar="FORMAT",
        required=True,
        help="timm; hf, of Hugging Face; onnx; pt2, of torch.export; safetensors, one file; official, the .pth.tar "
        "layout of the official code, which earlier versions called released",
    )
    export.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        required=True,
        help="folder to write for timm and hf, otherwise the file to write",
    )
    export.add_argument(
        "--part",
        choices=("target_encoder", "encoder"),
        metavar="PART",
        default="target_encoder",
        help="target_encoder, the teacher (default), or encoder, the student",
    )
    export.add_argument(
        "--image-size",
        type=_parse_size,
        metavar="SIZE",
        help="height and width that the encoder is written for, 448 or 448x320 (default: those of the training)",
    )


def _parse_size(text: str) -> tuple[int, int]:
    """Height and width from `448` or `448x320`."""
    try:
        height, _, width = text.partition("x")
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write 448, or 448x320 for height x width") from None


def _show(options: argparse.Namespace) -> int:
    from dmtjepa.interop import read_checkpoint
    from dmtjepa.interop.sources import find_source

    path = find_source(options.source)
    print(f"{path}\n{summarize(read_checkpoint(path))}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from dmtjepa import interop
    from dmtjepa.files import write_atomically
    from dmtjepa.interop.sources import find_image_size, find_source

    path, out = find_source(options.source), options.out
    card = out / "README.md" if options.format in FOLDERS else out.with_name(f"{out.name}.md")
    if options.format in FOLDERS and out.is_dir():
        taken = [out] if any(out.iterdir()) else []
    else:
        taken = [file for file in (out, card) if file.exists()]
    if taken:
        raise interop.WeightsError(f"{taken[0]} already exists; choose another --out")
    if options.format == "official" and out.suffix in (".safetensors", ".onnx", ".pt2"):
        raise interop.WeightsError(f"{out}: a file of this format has a name such as {out.stem}.pth.tar")
    checkpoint = interop.read_checkpoint(path)
    size = options.image_size or find_image_size(options.source)
    parts: tuple[str, ...] = (options.part,)
    if options.format == "official":
        if options.image_size is not None:
            raise interop.WeightsError("--format official keeps the image size of the training; omit --image-size")
        parts = tuple(part for part in ("target_encoder", "encoder") if part in checkpoint) or parts
    weights = interop.get_part(checkpoint, parts[0], path)
    library, call = LOADING[options.format]
    text = interop.format_card(
        interop.describe_encoder(weights, path),
        size,
        interop.find_origin(path, checkpoint),
        parts,
        f"import {library}\n\n{call.format(out=out.name)}",
        library if options.format in FOLDERS else None,
        interop.find_normalization(checkpoint),
    )
    if options.format != "official":
        interop.check_finite(weights, f"{options.part} of {path}")
        encoder = interop.build_encoder(
            weights, path, image_size=size, normalization=interop.find_normalization(checkpoint)
        )
        {
            "timm": interop.export_timm,
            "hf": interop.export_huggingface,
            "onnx": interop.export_onnx,
            "pt2": interop.export_program,
            "safetensors": interop.export_safetensors,
        }[options.format](encoder, out)
    elif path.is_dir():
        interop.export_checkpoint(path, out)
    else:
        interop.export_official(checkpoint, out)
    write_atomically(card, text)
    print(f"wrote {out}, and {card} about it\nload it with:\n  {call.format(out=out)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dmtjepa.checkpoint_format import CheckpointError, find_checkpoint, find_fault, step_of
    from dmtjepa.checkpoint_reader import TensorReader

    if options.source.is_file():
        raise CheckpointError(f"{options.source} has no manifest; give a run folder or a step-N folder")
    checkpoint = find_checkpoint(options.source)
    fault = find_fault(checkpoint)
    if fault is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {fault}")
    TensorReader(checkpoint).read_metadata()  # raises if the folder holds anything but tensors
    print(f"{checkpoint} is whole: step {step_of(checkpoint)}")
    return 0


def summarize(checkpoint: dict[str, Any]) -> str:
    """Parts of a checkpoint with their parameter counts, and its numbers, one a line."""
    from torch import Tensor

    from dmtjepa.interop import describe_encoder
    from dmtjepa.interop.weights import is_encoder

    lines = []
    for name, value in checkpoint.items():
        if isinstance(value, dict) and value and all(isinstance(item, Tensor) for item in value.values()):
            count = sum(item.numel() for item in value.values())
            kind = f": {describe_encoder(value)}" if name in ("encoder", "target_encoder") and is_encoder(value) else ""
            lines.append(f"  {name}: {count / 1e6:.1f} M values in {len(value)} tensors{kind}")
        elif isinstance(value, (int, float, str)):
            lines.append(f"  {name}: {value}")
    single = [name for name, value in checkpoint.items() if isinstance(value, Tensor)]
    if single:
        lines.append(f"  {len(single)} tensors of no part, such as {single[0]}")
    return "\n".join(lines)
