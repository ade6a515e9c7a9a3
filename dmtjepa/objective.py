"""The objective of DMT-JEPA (arXiv 2405.17995, section 3): a student predicts targets that a teacher aggregates."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa import kernels as operators
from dmtjepa.config import Config, ConfigError
from dmtjepa.masks import MaskBatch
from dmtjepa.models import ARCHITECTURES, AggregationHead, Predictions, Predictor, VisionTransformer
from dmtjepa.models.fp8 import compute_in_fp8
from dmtjepa.models.onednn import compute_by_onednn
from dmtjepa.models.signal_stack import protect_from_signals
from dmtjepa.tensors import local_tensors


class DMTJEPA(nn.Module):
    """Student (encoder, predictor, head) and teacher (encoder, head).

    The weights of the teacher are a moving average of the student's. They start as a copy.

    Args:
        encoder: encoder of the student.
        predictor: predictor of the student.
        head: aggregation head of the student. None trains plain I-JEPA, whose targets are the features of the teacher.
        loss: `smooth_l1` with beta 1, as in the official code, or `l2`, as in the paper.
        context_loss_weight: of the loss on the patches that the student sees, which is added to that on the targets, as
            in V-JEPA 2.1 (arXiv 2603.14482, there with weights that fall with the distance to the hidden patches).
            0: none.
        kernels: `triton` or `torch`, see `dmtjepa.kernels.backend`.

    Raises:
        ValueError: `loss` is unknown.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        head: AggregationHead | None,
        loss: str = "smooth_l1",
        *,
        context_loss_weight: float = 0.0,
        kernels: str = "triton",
    ) -> None:
        super().__init__()
        if loss not in ("smooth_l1", "l2"):
            raise ValueError(f"loss {loss!r}: choose smooth_l1 or l2")
        self.encoder = encoder
        self.predictor = predictor
        self.head = head
        self.teacher_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(head).requires_grad_(False) if head is not None else None
        self.loss_name = loss
        self.context_loss_weight = context_loss_weight
        self._gather_tokens = operators.backend(kernels).gather_tokens
        self._indexed_smooth_l1 = operators.backend(kernels).indexed_smooth_l1

    def forward(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Compute the loss of a batch, see `compute_targets`, `predict_targets` and `loss`."""
        targets = self.compute_targets(images, masks)
        predictions = self.predict_targets(images, masks)
        return self.loss(predictions, targets, masks)

    @torch.no_grad()
    def compute_targets(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Compute the targets with the teacher: encode, normalise, aggregate each target patch from its neighbours.

        Args:
            images: [B, C, H, W], uint8, or float normalised by the encoder's `mean` and `std`.
            masks: masks of the batch.

        Returns:
            [U, D] targets of the patches `masks.target_unique`, without gradient. With a context loss, V more rows
            follow: those of the patches that the student sees, image by image.

        Raises:
            ValueError: the masks were sampled for another window or border than the head has.
        """
        h = self.teacher_encoder(images)
        h = F.layer_norm(h, h.shape[-1:])
        seen = masks.flat_context(h.shape[1]) if self.context_loss_weight else None
        if self.teacher_head is None:
            patches = masks.target_unique if seen is None else torch.cat([masks.target_unique, seen])
            return self._gather_tokens(h.flatten(0, 1)[None], patches[None])[0]
        patch = self.teacher_encoder.patch_size
        grid_size = (images.shape[-2] // patch, images.shape[-1] // patch)
        self.teacher_head.check_window(masks.window, masks.border)  # here, because the next line may be compiled
        # With the context, the windows cover nearly all patches, so keys and values are projected for all.
        neighborhood = masks.neighborhood if seen is None else None
        return self.teacher_head.aggregate_neighbors(h, grid_size, masks.target_unique, neighborhood, seen)

    def predict_targets(self, images: Tensor, masks: MaskBatch) -> Predictions:
        """Predict the targets with the student: encode the context, aggregate it, predict each target block.

        Args:
            images: [B, C, H, W], uint8, or float normalised by the encoder's `mean` and `std`.
            masks: masks of the batch.

        Returns:
            Predictions of the targets, and of the context if its loss has a weight, see `Predictor.forward`.
        """
        z = self.encoder(images, masks.context_index, masks.context_packing)
        if self.head is not None:
            z = self.head.aggregate_context(z, masks.context_packing)
        packing, blocks = masks.prediction_packing, masks.target_index
        predictions: Predictions = self.predictor(
            z, masks.context_index, blocks, packing, with_context=bool(self.context_loss_weight)
        )
        return predictions

    def loss(self, predictions: Predictions, targets: Tensor, masks: MaskBatch) -> Tensor:
        """Compute the mean loss of predictions against targets [U, D], or [U + V, D] with a context loss.

        Returns:
            A float32 scalar, or float64 for float64 predictions: the mean over the target blocks and, multiplied by
            `context_loss_weight`, the mean over the patches that the student sees.
        """
        loss = self._mean_loss(predictions.targets, targets, masks.target_slot)
        if predictions.context is None:
            return loss
        slot = masks.context_slot() + (len(targets) - masks.context_index.numel())
        return loss + self.context_loss_weight * self._mean_loss(predictions.context, targets, slot)

    def _mean_loss(self, predictions: Tensor, targets: Tensor, slot: Tensor) -> Tensor:
        """Mean distance of predictions [B, M, T, D] and the targets that `slot` [B, M, T] points to."""
        if self.loss_name == "smooth_l1":
            return self._indexed_smooth_l1(predictions, targets, slot)
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        return F.mse_loss(predictions.to(dtype), targets[slot].to(dtype))

    def teacher_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter of the teacher and the one of the student that it averages, for encoder and head."""
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.teacher_encoder, self.encoder)]
        if self.teacher_head is not None and self.head is not None:
            pairs.append((self.teacher_head, self.head))
        return [
            pair for teacher, student in pairs for pair in zip(teacher.parameters(), student.parameters(), strict=True)
        ]

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Set teacher = momentum * teacher + (1 - momentum) * student, for encoder and head, on this rank's shards."""
        teacher, student = map(local_tensors, zip(*self.teacher_pairs(), strict=True))
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)


def _check_predictor_width(config: Config, num_heads: int) -> None:
    """Check that the width suits heads and position embedding. Raises ConfigError."""
    width, step = config.meta.pred_emb_dim, math.lcm(num_heads, 4)
    if width % step:
        below, above = width // step * step, (width // step + 1) * step
        raise ConfigError(
            f"meta.pred_emb_dim: {width} is not a multiple of {step}; the predictor of {config.meta.model_name} has "
            f"{num_heads} heads, and its position embedding has 4 parts. The nearest are "
            + (f"{below} and {above}" if below else f"{above} and {above + step}")
        )


def _residual_dtype(config: Config) -> torch.dtype | None:
    """The dtype of the residual stream where it is wider than that of the computation; None elsewhere."""
    return torch.float32 if config.runtime.residual == "float32" else None


def _draw_encoder(config: Config, device_type: str) -> VisionTransformer:
    return VisionTransformer(
        config.data.image_size,
        config.mask.patch_size,
        **ARCHITECTURES[config.meta.model_name],
        num_channels=config.data.channels,
        mean=config.data.mean,
        std=config.data.std,
        init_std=config.meta.init_std,
        residual_dtype=_residual_dtype(config),
        attention=config.runtime.attention,
        kernels=config.runtime.kernels,
        device_type=device_type,
    )


def build_frozen_encoder(config: Config, weights: Mapping[str, Tensor], device_type: str = "cpu") -> VisionTransformer:
    """Build the encoder of a run around whole, float32 `weights`, which are not copied. Draws no random numbers.

    Args:
        config: settings of the run.
        weights: `state_dict()` of its student or teacher encoder, on a device of type `device_type`.
    """
    with torch.device("meta"):
        encoder = _draw_encoder(config, device_type)
    encoder.load_state_dict(weights, assign=True)
    if device_type == "cpu":
        compute_by_onednn(encoder)
    return encoder.eval().requires_grad_(False)


def build_model(config: Config, device_type: str = "cpu") -> DMTJEPA:
    """Build student and teacher of a run on the CPU in float32. PyTorch's global generator draws the weights.

    Args:
        config: settings of the run.
        device_type: type of the device that will train the model, `cuda` or `cpu`.

    Raises:
        ConfigError: the width of the predictor does not suit its heads.
        ValueError: the device does not support a setting.
        ModuleNotFoundError: a setting needs software that is not installed.
    """
    if device_type == "cpu":
        protect_from_signals()  # before drawing weights, which starts OpenMP's workers
    architecture = ARCHITECTURES[config.meta.model_name]
    _check_predictor_width(config, architecture["num_heads"])
    kernels, attention, init_std = config.runtime.kernels, config.runtime.attention, config.meta.init_std
    encoder = _draw_encoder(config, device_type)
    predictor = Predictor(
        config.grid_size,
        embed_dim=encoder.embed_dim,
        predictor_dim=config.meta.pred_emb_dim,
        depth=config.meta.pred_depth,
        num_heads=encoder.num_heads,
        init_std=init_std,
        residual_dtype=_residual_dtype(config),
        attention=attention,
        device_type=device_type,
    )
    head = None
    if config.patch.local_agg_head:
        head = AggregationHead(
            encoder.embed_dim,
            encoder.num_heads,
            num_neighbors=config.patch.patch_k_num,
            window=config.patch.patch_k_size,
            border=config.patch.border,
            query=config.patch.query,
            init_std=init_std,
            kernels=kernels,
        )
    optimization = config.optimization
    model = DMTJEPA(
        encoder, predictor, head, optimization.loss, context_loss_weight=optimization.context_loss, kernels=kernels
    )
    if device_type == "cpu":
        compute_by_onednn(model)
    if config.runtime.teacher_precision == "fp8":
        compute_in_fp8(model.teacher_encoder.blocks, device_type)
    return model
