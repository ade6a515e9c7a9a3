"""Multi-block masks: which patches the student sees (the context) and which patches it predicts (the targets)."""

from dmtjepa.masks.batch import MaskBatch
from dmtjepa.masks.feasibility import check_masks
from dmtjepa.masks.placement import MaskError
from dmtjepa.masks.sampler import MaskSampler, mean_context_sizes

__all__ = ["MaskBatch", "MaskError", "MaskSampler", "check_masks", "mean_context_sizes"]
