"""The official settings file of a run."""

from pathlib import Path

import pytest

# The official DMT-JEPA file for ViT-H/14, key by key.
OFFICIAL = """
data:
  batch_size: 128
  color_jitter_strength: 0.0
  crop_scale:
  - 0.3
  - 1.0
  crop_size: 224
  image_folder: imagenet1k
  num_workers: 10
  pin_mem: true
  root_path: ../../../data/
  use_color_distortion: false
  use_gaussian_blur: false
  use_horizontal_flip: false
logging:
  folder: ./vith14-224-ep300/
  write_tag: jepa
mask:
  allow_overlap: false
  aspect_ratio:
  - 0.75
  - 1.5
  enc_mask_scale:
  - 0.85
  - 1.0
  min_keep: 10
  num_enc_masks: 1
  num_pred_masks: 4
  patch_size: 14
  pred_mask_scale:
  - 0.15
  - 0.2
patch:
  local_agg_head: true
  patch_k_num: 4
  patch_k_size: 3
  context_attn: 'cross-attn'
  target_attn: 'cross-attn'
meta:
  copy_data: false
  load_checkpoint: true
  model_name: vit_huge
  pred_depth: 12
  pred_emb_dim: 384
  read_checkpoint: null
  use_bfloat16: true
optimization:
  ema:
  - 0.996
  - 1.0
  epochs: 300
  final_lr: 1.0e-06
  final_weight_decay: 0.4
  ipe_scale: 1.0
  lr: 0.001
  start_lr: 0.0002
  warmup: 40
  weight_decay: 0.04
"""


@pytest.fixture
def official(tmp_path) -> Path:
    """The official settings file for ViT-H/14."""
    path = tmp_path / "official.yaml"
    path.write_text(OFFICIAL)
    return path
