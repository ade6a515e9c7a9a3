"""DMT-JEPA: self-supervised pretraining of vision transformers (arXiv 2405.17995)."""

__version__ = "0.1.0"
