"""The settings of a run: the official YAML schema, typed and validated, with overrides from the command line.

An official I-JEPA or DMT-JEPA file runs unchanged: its sections `data`, `logging`, `mask`, `patch`, `meta` and
`optimization` keep their names and meanings. `runtime` and `evaluation` are this project's, and optional.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from dmtjepa.config.data_settings import DataSettings
from dmtjepa.config.paths import expand_path
from dmtjepa.config.schema import Fraction, Free, SameGlobalBatch, Section, check_range

ModelName = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"]


class LoggingSettings(Section):
    """Where the run is written, and who else is told."""

    folder: Free[str] = Field("runs/dmtjepa", description="the run folder; created when missing")
    write_tag: str = Field("jepa", pattern=r"^[\w.-]+$", description="first part of the file names in it")
    loggers: Free[tuple[Literal["wandb", "mlflow"], ...]] = Field(
        (), description="Weights & Biases and MLflow, which get what metrics.jsonl gets; [wandb] or [wandb, mlflow]"
    )
    project: Free[str] = Field("dmtjepa", min_length=1, description="project of W&B, and experiment of MLflow")

    @property
    def path(self) -> Path:
        """The run folder, with ~ and environment variables expanded. Raises `ConfigError` for unset ones."""
        return Path(expand_path(self.folder, "logging.folder"))


class MaskSettings(Section):
    """Multi-block masks (I-JEPA section 3; the quirks of the official sampler are in docs/differences.md)."""

    allow_overlap: bool = Field(False, description="whether context and target blocks may share patches")
    aspect_ratio: tuple[float, float] = Field((0.75, 1.5), description="height over width of a target block")
    enc_mask_scale: tuple[Fraction, Fraction] = Field((0.85, 1.0), description="area of the context block")
    min_keep: int = Field(10, ge=0, description="a block must keep more patches than this")
    num_enc_masks: Literal[1] = Field(1, description="context blocks of an image")
    num_pred_masks: int = Field(4, ge=1, le=32, description="target blocks of an image")
    patch_size: int = Field(16, ge=1, le=128, description="side of a patch in pixels")
    pred_mask_scale: tuple[Fraction, Fraction] = Field((0.15, 0.2), description="area of a target block")
    sampler: Literal["released", "corrected"] = Field(
        "released", description="released: as in the official code; corrected: without its quirks"
    )
    context_cut: Literal["rank", "global"] = Field(
        "rank", description="cut contexts to the shortest of the rank's batch (official), or of the global batch"
    )

    pack: bool = Field(
        False, description="keep every context whole: images have contexts of different lengths, packed for attention"
    )

    @model_validator(mode="after")
    def _ordered(self) -> MaskSettings:
        for name in ("aspect_ratio", "enc_mask_scale", "pred_mask_scale"):
            check_range(name, *getattr(self, name))
        if self.aspect_ratio[0] <= 0:
            raise ValueError("aspect_ratio: must be larger than 0")
        return self


class PatchSettings(Section):
    """The aggregation head, which makes DMT-JEPA of I-JEPA. A file without this section trains I-JEPA."""

    local_agg_head: bool = Field(True, description="false trains plain I-JEPA")
    patch_k_num: int = Field(4, ge=1, le=8, description="neighbours aggregated into a target")
    patch_k_size: Literal[3, 5, 7] = Field(3, description="side of the window the neighbours come from")
    context_attn: Literal["cross-attn"] = Field("cross-attn", description="attention of the context head")
    target_attn: Literal["cross-attn"] = Field("cross-attn", description="attention of the target head")
    border: Literal["wrap", "clip"] = Field("wrap", description="wrap: windows go round the grid (official)")
    query: Literal["image", "targets", "patch"] = Field(
        "image",
        description="what a target starts from: the mean of the image (official), the mean of its target patches "
        "(paper), or the patch itself",
    )


class MetaSettings(Section):
    """The model, and what it starts from."""

    copy_data: Free[bool] = Field(False, description="of the official schema; true is refused, see docs/data.md")
    load_checkpoint: Free[bool] = Field(
        False,
        description="a new run starts from read_checkpoint, if that is set; a started run resumes by itself",
    )
    model_name: ModelName = Field("vit_base", description="encoder")
    pred_depth: int = Field(6, ge=1, le=64, description="blocks of the predictor")
    pred_emb_dim: int = Field(384, ge=8, description="width of the predictor")
    read_checkpoint: Free[str | None] = Field(
        None,
        description="a run folder, a .pth.tar file or a checkpoint, by itself or below logging.folder, or a folder of "
        "Hugging Face or timm, or a name of Hugging Face such as facebook/ijepa_vith14_1k",
    )
    use_bfloat16: bool = Field(True, description="compute in bfloat16 on CUDA; see runtime.precision")
    init_std: float = Field(0.02, gt=0, le=1, description="standard deviation of the initial weights (official: 0.02)")

    @field_validator("copy_data")
    @classmethod
    def _no_copy(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "images are not copied to local disks; pack them into tar shards, which a network file system serves "
                "well (dmtjepa shards), and leave this false"
            )
        return value

    @model_validator(mode="after")
    def _weights_are_used(self) -> MetaSettings:
        if self.read_checkpoint is not None and not self.load_checkpoint:
            raise ValueError(
                f"read_checkpoint: {self.read_checkpoint!r} has no effect without meta.load_checkpoint; set "
                "meta.load_checkpoint: true to start from these weights, or meta.read_checkpoint: null"
            )
        return self


class OptimizationSettings(Section):
    """AdamW and its schedules, all functions of the step."""

    ema: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = Field(
        (0.996, 1.0),
        description="teacher momentum, first and last. Rule of thumb for the first: 0.98 in a run of less than about "
        "3,000 steps, 0.99 up to about 6,000, 0.996 in longer ones",
    )
    epochs: int = Field(300, ge=1, description="epochs to train")
    final_lr: float = Field(1e-6, ge=0, description="learning rate at the end")
    final_weight_decay: float = Field(0.4, ge=0, description="weight decay at the end")
    ipe_scale: float = Field(1.0, gt=0, description="length of the schedules over the length of training")
    lr: float = Field(1e-3, gt=0, description="learning rate after warm-up")
    start_lr: float = Field(2e-4, ge=0, description="learning rate at the first step")
    warmup: float = Field(40, ge=0, description="epochs of warm-up")
    weight_decay: float = Field(0.04, ge=0, description="weight decay at the start")
    loss: Literal["smooth_l1", "l2"] = Field("smooth_l1", description="smooth_l1: the official code; l2: the paper")
    context_loss: float = Field(
        0.0,
        ge=0,
        description="weight of a loss on the patches that the student sees, added to that on the targets (V-JEPA 2.1, "
        "arXiv 2603.14482). The mean is over these patches: with mask.pack, images with long contexts count more. "
        "0: none, as published; 0.5 was better on small sets of photographs",
    )
    lr_batch_size: int | None = Field(
        None, ge=1, description="global batch the learning rates are meant for: they scale linearly with the batch"
    )
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient; null: not clipped")
    max_skipped_steps: Free[int] = Field(
        0, ge=0, description="steps with a non-finite loss or gradient that are skipped before the run stops"
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimizationSettings:
        if self.warmup > self.epochs * self.ipe_scale:
            raise ValueError(
                f"warmup: {self.warmup} epochs do not fit into the schedule of epochs*ipe_scale = "
                f"{self.epochs * self.ipe_scale:g} epochs; shorten warmup"
            )
        return self


class RuntimeSettings(Section):
    """How the run is computed.

    `seed`, `accumulation` and `teacher_precision` change what is trained. The others change it by rounding alone.
    """

    seed: int = Field(0, ge=0, lt=2**31, description="of weights, sample order, crops and masks")
    attention: Free[Literal["auto", "xformers", "sdpa"]] = Field(
        "auto",
        description="attention on CUDA: xFormers' flash kernels, or PyTorch's (sdpa); auto: xFormers where installed",
    )
    kernels: Free[Literal["triton", "torch"]] = Field(
        "triton", description="operators on CUDA; a CPU always runs torch's"
    )
    accumulation: SameGlobalBatch[int] = Field(
        1, ge=1, description="batches of a device whose gradients are summed into one step"
    )
    precision: Free[Literal["auto", "bfloat16", "float32"]] = Field(
        "auto",
        description="of the computation; weights, their gradients and their updates are always float32. auto: "
        "meta.use_bfloat16 on CUDA, float32 on a CPU (bfloat16 pays on CPUs with AVX512-BF16)",
    )
    residual: Free[Literal["bfloat16", "float32"]] = Field(
        "bfloat16",
        description="dtype of the residual stream of encoder and predictor where they compute in bfloat16. float32: as "
        "under the official autocast, closer to float32 and with more memory",
    )
    teacher_precision: Literal["same", "fp8"] = Field(
        "same",
        description="of the matrix products in the teacher's blocks. fp8: float8_e4m3fn with a scale per row, on GPUs "
        "of compute capability 8.9 and 9.0 or later; a CPU emulates it, slowly",
    )
    compile: Free[Literal["auto", "on", "off"]] = Field(
        "auto", description="torch.compile of each block; auto: on CUDA"
    )
    autotune_teacher: Free[bool] = Field(
        False,
        description="let torch.compile time several kernels for each matrix product of the teacher's blocks, some with "
        "what follows the product (GELU) in the same kernel, and take the fastest (max-autotune-no-cudagraphs, which "
        "tunes other kernels, too). Starts and ranks may choose differently, so a resumed run need not repeat bit for "
        "bit. Only where blocks are compiled; a run starts later. Off by default, because it has not run on a GPU",
    )
    activation_checkpointing: Free[Literal["auto", "none", "pointwise", "blocks"]] = Field(
        "auto",
        description="what the backward pass computes again instead of keeping it: of the student's blocks, norms and "
        "GELUs (pointwise) or all (blocks); auto: pointwise where blocks are compiled, where it costs little, and none "
        "on a GPU whose memory holds everything by estimate",
    )
    shard_size: Free[int | None] = Field(
        None, ge=1, description="devices that one copy of the model is sharded over (HSDP); null: all of them (FSDP)"
    )
    reshard_after_forward: Free[bool] = Field(
        True, description="free the student's gathered weights between forward and backward; false: faster, larger"
    )
    fused_update: Free[bool] = Field(
        False,
        description="update weights, the teacher's average and, on one GPU, the weights in the dtype of the "
        "computation with one Triton kernel, which moves fewer bytes; false: one after the other. Off by default, "
        "because it has not run on a GPU",
    )
    cuda_graphs: Free[Literal["auto", "on", "off"]] = Field(
        "off",
        description="replay training steps as CUDA graphs, which saves the host's time: faster where that limits a "
        "step, as for small models. Needs one GPU, fused_update, accumulation 1 and mask.pack false, and takes more "
        "memory. auto: where, by estimate, the host takes longer than the GPU. Off by default, because it has not run "
        "on a GPU",
    )
    on_collapse: Free[Literal["warn", "stop", "rollback"]] = Field(
        "warn",
        description="what a run does that has collapsed, besides saying so: go on (warn); save and stop; or go on from "
        "the last good checkpoint with half the learning rate, at most 3 times (rollback). See "
        "docs/training_figures.md",
    )
    log_every: Free[int] = Field(10, ge=1, description="steps between two reads of the losses, when rows are written")
    save_every_steps: Free[int | None] = Field(
        None, ge=1, description="steps between checkpoints, besides those of epochs"
    )
    save_every_epochs: Free[int] = Field(
        1, ge=1, description="epochs between checkpoints, each with {tag}-latest.pth.tar"
    )
    keep_last: Free[int] = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_every_epochs: Free[int] = Field(
        50, ge=1, description="checkpoints kept for good, each with {tag}-ep{N}.pth.tar"
    )
    start_timeout: Free[float] = Field(300, gt=0, description="seconds within which all processes must have joined")
    hang_timeout: Free[float] = Field(
        1800, gt=0, description="seconds without progress after which a run reports and stops"
    )

    @field_validator("compile", "cuda_graphs", mode="before")
    @classmethod
    def _yaml_on_and_off(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML's plain on and off


class EvaluationSettings(Section):
    """What the report measures, and what is measured during training."""

    batch_size: Free[int] = Field(256, ge=1, description="images per batch of feature extraction")
    neighbors: Free[tuple[int, ...]] = Field((5, 10, 20), description="k of the k-NN accuracies of the report")
    every_epochs: Free[int] = Field(0, ge=0, description="epochs between evaluations during training; 0: none")
    measure_start: Free[bool] = Field(
        True,
        description="also with every_epochs 0, a run that starts from weights (meta.read_checkpoint) is measured "
        "before its first step and after its last, if there are labels or masks to measure with; the log says how long "
        "that takes. false: not",
    )
    data: Free[str | None] = Field(
        None,
        description="images that are measured during training, with labels or masks: a folder, a list, tar shards or "
        "hf:NAME as for the report; null: those of the run",
    )
    max_images: Free[int] = Field(
        5_000, ge=10, description="upper limit for the images of each split that are measured during training"
    )
    keep_best: Free[bool] = Field(
        False,
        description="keep the encoders of the best evaluation (linear probe, or mIoU without labels) as "
        "{tag}-best.pth.tar",
    )

    @model_validator(mode="after")
    def _best_is_measured(self) -> EvaluationSettings:
        if self.keep_best and not self.every_epochs:
            raise ValueError(
                "keep_best: true has no effect without evaluations during training; set evaluation.every_epochs, or "
                "evaluation.keep_best: false"
            )
        return self


class Config(Section):
    """All settings of a run."""

    data: DataSettings = Field(default_factory=DataSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    mask: MaskSettings = Field(default_factory=MaskSettings)
    # An official I-JEPA file has no `patch` section: without one, I-JEPA is what is trained.
    patch: PatchSettings = Field(default_factory=lambda: PatchSettings(local_agg_head=False))
    meta: MetaSettings = Field(default_factory=MetaSettings)
    optimization: OptimizationSettings = Field(default_factory=OptimizationSettings)
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

    @model_validator(mode="after")
    def _whole_patches(self) -> Config:
        patch = self.mask.patch_size
        for side, size in zip(("height", "width"), self.data.image_size, strict=True):
            if size < patch:
                raise ValueError(
                    f"data.crop_size: {side} {size} is smaller than a patch (mask.patch_size {patch}); "
                    f"enlarge the crop or take smaller patches"
                )
            if size % patch:
                raise ValueError(
                    f"data.crop_size: {side} {size} is not a multiple of mask.patch_size {patch}; "
                    f"the nearest are {size // patch * patch} and {(size // patch + 1) * patch}"
                )
        if self.patch.local_agg_head and self.patch.patch_k_size > min(self.grid_size):
            raise ValueError(
                f"patch.patch_k_size: a window of {self.patch.patch_k_size} is larger than the grid of "
                f"{self.grid_size[0]}x{self.grid_size[1]} patches"
            )
        if self.patch.local_agg_head and self.patch.patch_k_num > self.patch.patch_k_size**2 - 1:
            raise ValueError(
                f"patch.patch_k_num: {self.patch.patch_k_num} neighbours do not fit into a window of "
                f"{self.patch.patch_k_size}x{self.patch.patch_k_size}, which holds {self.patch.patch_k_size**2 - 1}"
            )
        return self

    def global_batch(self, world_size: int) -> int:
        """Images of an optimizer step: the batches of all devices, and of all micro-batches that are accumulated."""
        return self.data.batch_size * world_size * self.runtime.accumulation

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in a crop."""
        height, width = self.data.image_size
        return height // self.mask.patch_size, width // self.mask.patch_size

    @property
    def measures_start(self) -> bool:
        """Whether the run starts from weights that are to be measured before its first step."""
        starts_from_weights = self.meta.load_checkpoint and self.meta.read_checkpoint is not None
        return starts_from_weights and self.evaluation.measure_start

    def to_yaml(self) -> str:
        """The settings as YAML which `load_config` reads back to an equal `Config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
