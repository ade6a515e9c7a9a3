"""The official DMT-JEPA code, imported from a checkout that the caller gives; this repository contains none of it.

Its `local_agg_head.py` uses a name that it never imports, `Mlp`. The MLP of its own encoder is supplied for it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dmtjepa.config import Config
from dmtjepa.masks import MaskBatch
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.schedules import Schedules


def add_official(parser: argparse.ArgumentParser) -> None:
    """Add `--official CHECKOUT`; `--published` is its old name."""
    help_text = "a clone of the official code, to compare with"
    parser.add_argument("--official", "--published", type=Path, metavar="CHECKOUT", help=help_text)


def open_checkout(checkout: Path) -> None:
    """Make the package `src` of the checkout importable, its head included."""
    checkout = checkout.resolve()
    if not (checkout / "src/train.py").exists():
        raise SystemExit(f"--official {checkout}: it has no src/train.py; give a clone of the official code")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    importlib.import_module("src.helper")  # it sets up logging, and would print every module of a model
    logging.getLogger().setLevel(logging.WARNING)


def official_head() -> ModuleType:
    """The checkout's `src.models.local_agg_head`."""
    from src.models.vision_transformer import MLP

    name = "src.models.local_agg_head"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        module = importlib.util.module_from_spec(spec)
        module.Mlp = MLP
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class OfficialStep:
    """What the official training loop does with a batch, by its own functions.

    It has DistributedDataParallel around all five modules, bfloat16 by autocast with a gradient scaler, AdamW with the
    official groups and schedules, norms of the gradients for the log, the teacher averaged tensor by tensor, and the
    loss read by the host at each step. It needs a process group.

    Args:
        model: the model whose weights it starts from; it is not changed.
        config: the settings of the run.
        use_bfloat16: `meta.use_bfloat16` of its configuration.
        on_phase: called with the name of each phase when it starts, as by `TrainStep`, and with `head`.
    """

    takes_pixels = True  # normalized float images, as from its loader

    def __init__(
        self,
        model: DMTJEPA,
        config: Config,
        schedules: Schedules,
        device: torch.device,
        on_phase: Callable[[str], None],
        use_bfloat16: bool,
    ) -> None:
        official_head()
        from src import helper

        self.device, self.on_phase, self.use_bfloat16 = device, on_phase, use_bfloat16
        torch.backends.cudnn.benchmark = True  # as in its training program
        options = {
            "patch_size": config.mask.patch_size,
            "crop_size": config.data.image_size[0],
            "pred_depth": config.meta.pred_depth,
            "pred_emb_dim": config.meta.pred_emb_dim,
            "model_name": config.meta.model_name,
        }
        neighbors = {"patch_k_num": config.patch.patch_k_num, "patch_k_size": config.patch.patch_k_size}
        students = helper.init_model(device=device, local_agg_head=True, **options, **neighbors)
        teachers = copy.deepcopy(students[::2])
        for module, ours in zip(students, (model.encoder, model.predictor, model.head), strict=True):
            module.load_state_dict(ours.state_dict())
        for module, ours in zip(teachers, (model.teacher_encoder, model.teacher_head), strict=True):
            module.load_state_dict(ours.state_dict())
        self.optimizer, self.scaler, self.learning_rate, self.decay = helper.init_opt(
            encoder=students[0], predictor=students[1], LocalAggHead=students[2], use_bfloat16=use_bfloat16,
            start_lr=schedules.start_lr, ref_lr=schedules.lr, final_lr=schedules.final_lr,
            wd=schedules.weight_decay, final_wd=schedules.final_weight_decay, warmup=schedules.warmup,
            iterations_per_epoch=schedules.steps_per_epoch, num_epochs=schedules.num_epochs,
        )  # fmt: skip
        self.schedules = schedules
        self.encoder, self.predictor, self.head = (DistributedDataParallel(m, static_graph=True) for m in students)
        self.teacher_encoder, self.teacher_head = (DistributedDataParallel(m) for m in teachers)
        for module in (self.teacher_encoder, self.teacher_head):
            module.requires_grad_(False)

    def __call__(self, pixels: Tensor, masks: MaskBatch, step: int) -> tuple[Tensor, None]:
        from src.masks.utils import apply_masks
        from src.utils.distributed import AllReduce
        from src.utils.logging import grad_logger
        from src.utils.tensors import repeat_interleave_batch

        context, target = [masks.context_index], list(masks.target_index.unbind(1))
        self.learning_rate.step()
        self.decay.step()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            with torch.no_grad():
                self.on_phase("targets")
                h = self.teacher_encoder(pixels)
                h = F.layer_norm(h, h.shape[-1:])
                self.on_phase("head")
                h = self.teacher_head(h, loc=True, attn_type="cross-attn")
                targets = repeat_interleave_batch(apply_masks(h, target), len(pixels), repeat=1)
            self.on_phase("predictions")
            z = self.head(self.encoder(pixels, context), loc=False, attn_type="cross-attn")
            predictions = self.predictor(z, context, target)
            self.on_phase("loss")
            loss = AllReduce.apply(F.smooth_l1_loss(predictions, targets))
        self.on_phase("backward")
        if self.scaler is None:
            loss.backward()
            self.on_phase("update")
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.on_phase("update")
            self.scaler.step(self.optimizer)
            self.scaler.update()
        grad_logger(self.encoder.named_parameters())
        self.optimizer.zero_grad()
        self.on_phase("teacher")
        momentum = self.schedules.momentum(step)
        with torch.no_grad():
            for student, teacher in ((self.encoder, self.teacher_encoder), (self.head, self.teacher_head)):
                for new, average in zip(student.parameters(), teacher.parameters(), strict=True):
                    average.mul_(momentum).add_((1 - momentum) * new)
        return torch.tensor(loss.item()), None  # its loop reads the loss at each step

    def modules(self) -> Iterator[nn.Module]:
        yield from (self.encoder, self.predictor, self.head, self.teacher_encoder, self.teacher_head)
