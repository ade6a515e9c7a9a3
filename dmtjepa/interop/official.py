"""The official layout: one `.pth.tar` file, as the official I-JEPA and DMT-JEPA code writes and reads it.

It is a dictionary: `encoder`, `predictor` and `target_encoder` are state dictionaries whose names begin with the
`module.` of DistributedDataParallel; `opt` and `scaler` are the optimizer's and the gradient scaler's states; `epoch`
(finished epochs), `loss`, `batch_size`, `world_size` and `lr` are numbers. This project adds `head` and `target_head`,
which official files lack, `step`, and `pixel_mean` and `pixel_std` if they are set; readers that do not know them
ignore them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmtjepa.checkpoint_format import load_full, read_meta
from dmtjepa.files import open_atomically
from dmtjepa.interop.normalization import list_normalization
from dmtjepa.interop.weights import MODULES, WeightsError, check_finite, select_module

NUMBERS = ("epoch", "loss", "batch_size", "world_size", "lr", "step", "evaluation")
"""Values beside the weights; `evaluation` is that of `{tag}-best.pth.tar`, a dictionary of numbers and a digest."""
# A position embedding is a parameter without gradient in the official code: the official optimizer counts it.
_POSITION_EMBEDDINGS = {"encoder": "pos_embed", "predictor": "predictor_pos_embed"}


def write_official(
    path: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    numbers: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
) -> None:
    """Write one file in the official layout. `torch.load(weights_only=True)` reads it.

    Args:
        path: the file; it is replaced if it exists, and its folder is created.
        weights: state dictionaries by official name (`encoder`, `predictor`, `target_encoder`, `head`, `target_head`).
        numbers: values beside them; those in `NUMBERS` and the normalisation of pixels are written.
        optimizer: a state dictionary of AdamW, see `official_optimizer`; None leaves out `opt` and `scaler`.

    Raises:
        OSError: the file could not be written.
    """
    contents: dict[str, Any] = {
        part: {f"module.{name}": _compact(value) for name, value in weights[part].items()}
        for part in MODULES
        if part in weights
    }
    if optimizer is not None:
        contents |= {"opt": optimizer, "scaler": None}  # bfloat16 needs no gradient scaler
    contents |= {name: numbers[name] for name in NUMBERS if name in numbers} | list_normalization(numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # of torch's zip writer, which hides why a write failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def export_checkpoint(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint folder `step-{n}` in the official layout, with the optimizer's state.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        WeightsError: it holds weights that are not finite.
    """
    state, meta = load_full(checkpoint), read_meta(checkpoint)
    weights = {part: select_module(state, module) for part, module in MODULES.items()}
    for part, values in weights.items():
        check_finite(values, f"{part} of {checkpoint}")
    optimizer = official_optimizer(
        meta["parameters"], state, num_steps=meta["optimizer_steps"], lr=meta["lr"], weight_decay=meta["weight_decay"]
    )
    write_official(path, {part: values for part, values in weights.items() if values}, meta, optimizer)


def export_official(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write what `read_checkpoint` returned in the official layout, without an optimizer's state.

    All names get the prefix `module.`, without which timm, for one, does not take them.

    Raises:
        WeightsError: the checkpoint has no encoder, or holds weights that are not finite.
    """
    if "encoder" not in checkpoint:
        raise WeightsError(f"the checkpoint has no encoder; it has {', '.join(map(str, checkpoint))}")
    weights = {part: checkpoint[part] for part in MODULES if part in checkpoint}
    for part, values in weights.items():
        check_finite(values, f"{part} of the checkpoint")
    write_official(path, weights, checkpoint)


def official_optimizer(
    parameters: Sequence[str], averages: Mapping[str, Tensor], *, num_steps: int, lr: float, weight_decay: float
) -> dict[str, Any]:
    """AdamW's state dictionary, with the groups and the numbering of the official optimizer.

    Args:
        parameters: names of the trained parameters, `encoder.*`, `predictor.*` and `head.*`, in the model's order.
        averages: `exp_avg.{name}` and `exp_avg_sq.{name}` of each of them.
        num_steps: updates made.
        lr, weight_decay: values of the last update.
    """
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    index = 0
    for names, decayed in _official_groups(parameters, averages):
        groups.append(_describe_group(range(index, index + len(names)), decayed, lr, weight_decay))
        for name in names:
            if f"exp_avg.{name}" in averages:
                state[index] = {
                    "step": torch.tensor(float(num_steps)),
                    "exp_avg": averages[f"exp_avg.{name}"],
                    "exp_avg_sq": averages[f"exp_avg_sq.{name}"],
                }
            index += 1
    return {"state": state, "param_groups": groups}


def _official_groups(parameters: Sequence[str], averages: Mapping[str, Tensor]) -> list[tuple[list[str], bool]]:
    """(names, whether weight decay applies) of each official parameter group, in order."""
    groups = []
    has_head = any(name.startswith("head.") for name in parameters)
    for modules in (["encoder", "predictor"], ["head"] if has_head else []):
        for decayed in (True, False):
            for module in modules:
                names = [name for name in parameters if name.startswith(f"{module}.")]
                names = [n for n in names if ("bias" not in n and averages[f"exp_avg.{n}"].ndim != 1) == decayed]
                if decayed and module in _POSITION_EMBEDDINGS:
                    # First in the encoder. In the predictor second, after mask_token, its other own parameter.
                    names.insert(0 if module == "encoder" else 1, _POSITION_EMBEDDINGS[module])
                groups.append((names, decayed))
    return groups


def _describe_group(indices: Sequence[int], decayed: bool, lr: float, weight_decay: float) -> dict[str, Any]:
    return {
        "params": list(indices),
        "WD_exclude": not decayed,
        "lr": lr,
        "weight_decay": weight_decay if decayed else 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
    }


def _compact(value: Tensor) -> Tensor:
    """The tensor, copied if it is a view into a larger storage, all of which would be saved."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
