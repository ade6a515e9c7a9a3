"""Multi-block masks: which patches the student sees (the context) and which it predicts (the targets)."""

from dmtjepa.masks.batch import MaskBatch
from dmtjepa.masks.feasibility import check_masks
from dmtjepa.masks.placement import MaskError
from dmtjepa.masks.sampler import sample_masks

__all__ = ["MaskBatch", "MaskError", "check_masks", "sample_masks"]
