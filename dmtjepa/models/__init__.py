"""Encoder, predictor and aggregation head."""

from dmtjepa.models.aggregation import AggregationHead
from dmtjepa.models.predictor import Predictions, Predictor
from dmtjepa.models.vit import ARCHITECTURES, VisionTransformer

__all__ = ["ARCHITECTURES", "AggregationHead", "Predictions", "Predictor", "VisionTransformer"]
