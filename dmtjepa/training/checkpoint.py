"""Checkpoints: written by all ranks in the background, published atomically, resumable on another number of ranks.

A checkpoint is a folder `step-{n}` that holds n finished steps:

    *.distcp, .metadata   the tensors, by torch.distributed.checkpoint
    meta.json             plain values: step, epoch, settings, ...
    manifest.json         size and SHA-256 of every other file

It is written as `.writing-step-{n}` and renamed when everything, the manifest last, is on disk. So a folder with the
final name is whole unless the storage lost something, and the manifest tells even that.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

logger = logging.getLogger(__name__)

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message names the folder and the remedy."""


# ---- What a training state consists of


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a training state by name, sharded as they are: weights, buffers and AdamW's two averages.

    Averages that do not exist yet (no step was made) are created as zeros, so that they can be loaded into.
    """
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        row = optimizer.state[parameter]
        if not row:
            row["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            row["exp_avg"] = torch.zeros_like(parameter)
            row["exp_avg_sq"] = torch.zeros_like(parameter)
        state[f"exp_avg.{name}"] = row["exp_avg"]
        state[f"exp_avg_sq.{name}"] = row["exp_avg_sq"]
    return state


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Updates that AdamW has made: steps without the skipped ones."""
    return int(next((row["step"] for row in optimizer.state.values()), 0))


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Continue AdamW's bias correction after `steps` updates."""
    for row in optimizer.state.values():
        row["step"].fill_(steps)


# ---- Writing


class CheckpointWriter:
    """Writes checkpoints into `folder` one at a time, in a thread on every rank.

    Args:
        folder: where `step-{n}` folders go; shared by all ranks.
        group: a gloo process group of all ranks that nothing else uses.
        keep_last: newest checkpoints that are kept; those whose meta says `keep` are never removed.
        device: where the state is.
    """

    def __init__(self, folder: Path, group: dist.ProcessGroup, keep_last: int, device: torch.device) -> None:
        self._folder, self._group, self._keep_last = folder, group, keep_last
        self._rank = dist.get_rank(group)
        self._stager = BlockingAsyncStager(cache_staged_state_dict=device.type == "cuda")  # in pinned memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def save(
        self, state: Mapping[str, Tensor], meta: Mapping[str, Any], then: Callable[[Path], None] | None = None
    ) -> None:
        """Copy `state` to host memory and write it in the background, as the checkpoint of `meta["step"]`.

        Waits first for the previous one. `then(folder)` runs on rank 0 after publication (for exports).

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        staged = self._stager.stage(dict(state))
        self._pending = self._thread.submit(self._write, staged, dict(meta), then)

    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed; never waits."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is published. Raises CheckpointError where it could not be."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _write(self, state: dict[str, Tensor], meta: dict[str, Any], then: Callable[[Path], None] | None) -> None:
        final = self._folder / f"step-{meta['step']:08d}"
        writing = self._folder / f".writing-{final.name}"
        try:
            self._on_rank_0(lambda: _prepare(writing))
            # Copies ahead are for tensors on a GPU. These are on the host, and to look for more would make this thread
            # wait for the stream that trains, and open a context on the first GPU on every rank.
            writer = dcp.FileSystemWriter(writing, sync_files=True, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=self._group)
            self._hash_and_publish(writing, final, meta)
        except (dcp.CheckpointException, OSError, RuntimeError) as error:
            if self._rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {meta['step']} could not be written to {self._folder} (is the disk full?); "
                f"earlier checkpoints are untouched: {_root_cause(error)}"
            ) from error
        if self._rank == 0:
            prune(self._folder, self._keep_last)
            if then is not None:
                try:
                    then(final)
                except OSError as error:
                    raise CheckpointError(f"{final} is whole, but what follows it failed: {error}") from error

    def _hash_and_publish(self, writing: Path, final: Path, meta: dict[str, Any]) -> None:
        """Hash the files in parallel, each rank those it wrote; rank 0 writes the manifest and renames."""
        try:
            mine: dict | str = {path.name: _describe(path) for path in writing.glob(f"__{self._rank}_*")}
        except OSError as error:
            mine = f"rank {self._rank}: {error}"
        described: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(described, mine, group=self._group)
        faults = [part for part in described if isinstance(part, str)]
        if faults:
            raise OSError("; ".join(faults))

        def publish() -> None:
            files = {name: row for part in described for name, row in part.items()}
            _write_json(writing / "meta.json", meta)
            files |= {name: _describe(writing / name) for name in (".metadata", "meta.json")}
            _write_json(writing / "manifest.json", {"format": FORMAT, "step": meta["step"], "files": files})
            _sync_folder(writing)
            if final.exists():  # the same step once more, after a resume from an earlier one
                discard(final)
            os.rename(writing, final)
            _sync_folder(self._folder)

        self._on_rank_0(publish)

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        """Run `work` on rank 0 while the others wait; its failure is raised on all."""
        outcome: list[str | None] = [None]
        if self._rank == 0:
            try:
                work()
            except OSError as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise OSError(outcome[0])


def _prepare(writing: Path) -> None:
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames and new files within `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root_cause(error: BaseException) -> str:
    """The first line that says why; torch.distributed.checkpoint wraps the failures of all ranks."""
    if isinstance(error, dcp.CheckpointException):
        causes = {f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items()}
        return "; ".join(sorted(causes))
    return str(error)


# ---- Finding and reading


def step_of(folder: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints in `folder`, newest first; not yet verified."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def find_fault(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None for a whole one. `hashes=False` compares sizes only."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files, form = manifest["files"], manifest["format"]
    except FileNotFoundError:
        return "it has no manifest.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest.json cannot be read ({error})"
    if form != FORMAT:
        return f"its format is {form}, and this version reads {FORMAT}"
    if manifest.get("step") != step_of(checkpoint):
        return f"its name says step {step_of(checkpoint)} and its manifest step {manifest.get('step')}"
    for name, row in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != row["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {row['bytes']}"
        if hashes and _describe(path)["sha256"] != row["sha256"]:
            return f"{name} has other contents than were written"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint without fault, or None; damaged ones are passed over with a warning."""
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged and passed over: %s", checkpoint, fault)
    return None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return json.loads((checkpoint / "meta.json").read_text())


def load_into(state: dict[str, Tensor], checkpoint: Path) -> None:
    """Read a checkpoint into the tensors of `state`, in place, whatever number of ranks wrote it.

    Raises CheckpointError where a tensor is missing or has another shape.
    """
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
    except (dcp.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint} does not fit this run: {_root_cause(error)}") from error


def load_full(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole and on the CPU, without any process group."""
    reader = dcp.FileSystemReader(checkpoint)
    rows = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(row.size, dtype=row.properties.dtype)
        for name, row in rows.items()
        if isinstance(row, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant here
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint such that a crash midway leaves no torn one under its name."""
    trash = checkpoint.with_name(f".removing-{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those that are kept for good."""
    for checkpoint in list_checkpoints(folder)[keep_last:]:
        with contextlib.suppress(OSError, ValueError):
            if read_meta(checkpoint).get("keep"):
                continue
        discard(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in [*folder.glob(".writing-*"), *folder.glob(".removing-*")]:
        shutil.rmtree(path, ignore_errors=True)


# ---- Export

# A position embedding is a parameter without gradient in the published code: it counts in its optimizer's numbering.
_POSITION_EMBEDDINGS = {"encoder": "pos_embed", "predictor": "predictor_pos_embed"}


def export(checkpoint: Path, target: Path) -> None:
    """Write one file in the published `.pth.tar` layout, which `torch.load(weights_only=True)` reads.

    Keys as published: encoder, predictor, target_encoder (names with the `module.` of DistributedDataParallel), opt,
    scaler (None: bfloat16 needs none), epoch, loss, batch_size, world_size, lr. Added: head and target_head, which
    published files lack, and step. `epoch` counts the epochs that were finished.
    """
    state, meta = load_full(checkpoint), read_meta(checkpoint)

    def part(name: str) -> dict[str, Tensor]:
        prefix = f"model.{name}."
        return {f"module.{key.removeprefix(prefix)}": value for key, value in state.items() if key.startswith(prefix)}

    values: dict[str, Any] = {
        "encoder": part("encoder"),
        "predictor": part("predictor"),
        "target_encoder": part("teacher_encoder"),
        "opt": _published_optimizer(state, meta),
        "scaler": None,
        **{key: meta[key] for key in ("epoch", "loss", "batch_size", "world_size", "lr", "step")},
    }
    if part("head"):
        values |= {"head": part("head"), "target_head": part("teacher_head")}
    target.parent.mkdir(parents=True, exist_ok=True)
    writing = target.with_name(f".writing-{target.name}")
    try:
        with writing.open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, target)
    finally:
        writing.unlink(missing_ok=True)


def _published_optimizer(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """AdamW's state dictionary, numbered as the published optimizer's parameters are."""
    rows: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    index = 0
    has_head = any(name.startswith("head.") for name in meta["parameters"])
    for part in (["encoder", "predictor"], ["head"] if has_head else []):
        for decayed in (True, False):
            for module in part:
                names = [name for name in meta["parameters"] if name.startswith(f"{module}.")]
                names = [n for n in names if ("bias" not in n and state[f"exp_avg.{n}"].ndim != 1) == decayed]
                if decayed and module in _POSITION_EMBEDDINGS:
                    # First in the encoder; after mask_token, the other parameter of its own, in the predictor.
                    names.insert(0 if module == "encoder" else 1, _POSITION_EMBEDDINGS[module])
                group = {"params": list(range(index, index + len(names))), "WD_exclude": not decayed}
                group |= {"lr": meta["lr"], "weight_decay": meta["weight_decay"] if decayed else 0.0}
                group |= {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False, "foreach": None}
                group |= {"capturable": False, "differentiable": False, "fused": None}
                groups.append(group)
                for name in names:
                    if f"exp_avg.{name}" in state:
                        rows[index] = {
                            "step": torch.tensor(float(meta["optimizer_steps"])),
                            "exp_avg": state[f"exp_avg.{name}"],
                            "exp_avg_sq": state[f"exp_avg_sq.{name}"],
                        }
                    index += 1
    return {"state": rows, "param_groups": groups}


def main(arguments: list[str] | None = None) -> None:
    """`python -m dmtjepa.training.checkpoint`: verify or export a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m dmtjepa.training.checkpoint", description=main.__doc__)
    parser.add_argument("checkpoint", type=Path, help="a step-N folder, or the checkpoints folder (takes the newest)")
    parser.add_argument("--export", type=Path, metavar="FILE.pth.tar", help="write one file in the published layout")
    options = parser.parse_args(arguments)
    chosen = options.checkpoint
    if not chosen.name.startswith("step-"):
        found = newest_whole(chosen if chosen.name == "checkpoints" else chosen / "checkpoints")
        if found is None:
            raise SystemExit(f"{chosen}: no whole checkpoint")
        chosen = found
    fault = find_fault(chosen)
    if fault is not None:
        raise SystemExit(f"{chosen} is damaged: {fault}")
    print(f"{chosen} is whole: step {step_of(chosen)}")
    if options.export is not None:
        export(chosen, options.export)
        print(f"wrote {options.export}")


if __name__ == "__main__":
    main()
