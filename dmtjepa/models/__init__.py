"""Encoder, predictor and aggregation head."""

from dmtjepa.models.aggregation import AggregationHead
from dmtjepa.models.predictor import Predictor
from dmtjepa.models.vit import ARCHITECTURES, VisionTransformer

__all__ = ["ARCHITECTURES", "AggregationHead", "Predictor", "VisionTransformer"]
