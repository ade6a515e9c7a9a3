"""What Inductor, which generates the kernels of torch.compile, is told beyond its defaults.

To import this takes a second; only those who compile do.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

logger = logging.getLogger(__name__)

# The longest row that a kernel reads once and holds in registers. Inductor's limit is 1,024.
LONGEST_ROW = 2048


class RowsInRegisters(InductorChoices):  # type: ignore[misc]  # mypy does not read Inductor
    """Inductor's choices, but that kernels which reduce rows, such as LayerNorms, hold rows of up to `LONGEST_ROW`.

    Otherwise those of ViT-H (1,280 channels) read each row in a loop, and again to normalise it. On an H200 they reach
    26 to 35% of the bandwidth (docs/performance.md). One that also quantises its result to float8 writes
    all of it in float32 and reads it again.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a kernel holds its rows in registers. Inductor calls this."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        is_row = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
        allowed = config.triton.persistent_reductions and is_row
        return allowed and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW)

    def uuid(self) -> str:
        """What tells apart the code that these choices lead to, in the caches of Inductor."""
        return f"{type(self).__module__}.{type(self).__qualname__} {LONGEST_ROW}"


def configure_inductor() -> None:
    """Set the options of this module; call it before the first compilation of a process."""
    fuse_reductions_of_any_size()
    hold_rows_in_registers()
    # Inductor would consider padding matrices of 12 heads to a multiple of 8. It decides by the number of patches,
    # and compiles the context head again on the other side of a limit (ViT-B/16: 12 patches or fewer). Nothing else in
    # blocks and heads has a size to pad.
    config.shape_padding = False


def hold_rows_in_registers() -> None:
    """Let Inductor make the choices of `RowsInRegisters`."""
    if not hasattr(config, "inductor_choices_class"):
        logger.info(
            "torch %s has no option inductor_choices_class: LayerNorms of ViT-H will be slower", torch.__version__
        )
        return
    config.inductor_choices_class = RowsInRegisters


def fuse_reductions_of_any_size() -> None:
    """Let Inductor fuse two reductions over the same gradient whatever the number of patches.

    Otherwise it fuses them only above certain sizes, and compares the number of patches with these limits before each
    call. A step on the other side of a limit then compiles its blocks again in the middle of a run: for ViT-B/16 with
    256 images, at a context of 26 patches or fewer.
    """
    if not hasattr(config.triton, "mix_order_reduction_non_strict_mode"):
        logger.info(
            "torch %s has no option mix_order_reduction_non_strict_mode: a step with unusually few or many patches may "
            "compile its blocks again",
            torch.__version__,
        )
        return
    config.triton.mix_order_reduction_non_strict_mode = True
