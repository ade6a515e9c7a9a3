"""Reading JPEG files: PIL as the loader does it, torchvision.io.decode_jpeg, and TorchCodec where it is installed.

    python -m benchmarks.data.decode [--data FOLDER] [--out FOLDER]

FOLDER holds JPEG files; without it, smooth images are drawn. Each decoder is timed alone, and up to the loader's crop,
which needs an image of PIL and which the others reach for plain JPEGs only. A decoder with other pixels than PIL's is
not timed.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from benchmarks.machine import environment
from dmtjepa.data.crop import crop_and_resize
from dmtjepa.data.decode import decode_image
from dmtjepa.data.jpeg_header import read_plain_size


def draw_jpeg(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def crop(image: Image.Image) -> np.ndarray:
    width, height = image.size
    return crop_and_resize(image, (width // 10, height // 10, width * 4 // 5, height * 4 // 5), (224, 224))


def measure(files: list[bytes], rounds: int) -> tuple[list[dict], list[str]]:
    """Milliseconds of a processor per image, medians over rounds, taken in turns; and notes on what was left out."""
    decoders, notes = {"torchvision.io": torchvision.io.decode_jpeg}, []
    try:
        from torchcodec.decoders import decode_jpeg

        decoders["TorchCodec"] = decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:  # its libraries may not fit PyTorch's
        notes.append(f"TorchCodec is not measured: {type(error).__name__}")
    cases = {"PIL": decode_image, "PIL, to the crop": lambda data: crop(decode_image(data))}
    for name, function in decoders.items():

        def read(data: bytes, function=function) -> torch.Tensor:
            return function(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")

        def to_crop(data: bytes, read=read) -> np.ndarray:
            plain = read_plain_size(data) is not None  # upright, and grey or YCbCr
            return crop(Image.fromarray(read(data).permute(1, 2, 0).numpy()) if plain else decode_image(data))

        apart = sum(not np.array_equal(crop(decode_image(data)), to_crop(data)) for data in files)
        if apart:
            notes.append(f"{name} is not timed: {apart} of {len(files)} images have other pixels than with PIL")
        else:
            cases |= {name: read, f"{name}, to the crop": to_crop}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for name in [*cases] * rounds:
        start = time.process_time()
        for data in files:
            cases[name](data)
        times[name].append(1e3 * (time.process_time() - start) / len(files))
    return [{"case": name, "ms": statistics.median(taken)} for name, taken in times.items()], notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="JPEG files; default: drawn images")
    parser.add_argument("--images", type=int, default=500, help="files, evenly spaced (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each; the median counts (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a file of results there")
    args = parser.parse_args()
    if min(args.images, args.rounds) < 1:
        parser.error("--images and --rounds must be at least 1")
    torch.set_num_threads(1)
    paths = (
        [path for path in sorted(args.data.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")] if args.data else []
    )
    if args.data and not paths:
        parser.error(f"--data: {args.data} holds no JPEG file")
    files = [path.read_bytes() for path in paths[:: -(-len(paths) // args.images)]] if paths else []
    files = files or [draw_jpeg(seed) for seed in range(args.images)]
    rows, notes = measure(files, args.rounds)
    size = np.mean([Image.open(io.BytesIO(data)).size for data in files], axis=0).round().tolist()
    images = {"count": len(files), "mean_size": size, "drawn": not paths}
    known = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    versions = {name: known.get(name) for name in ("torchvision", "pillow", "torchcodec")}
    print("\n".join([*(f"{row['case']:<28}{row['ms']:>8.3f} ms per image" for row in rows), *notes]))
    if args.out:
        document = {"environment": environment("cpu") | versions, "images": images, "notes": notes, "rows": rows}
        args.out.mkdir(parents=True, exist_ok=True)
        args.out.joinpath(f"cpu-{date.today()}-decode.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
