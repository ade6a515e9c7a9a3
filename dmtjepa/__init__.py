"""DMT-JEPA: self-supervised pretraining of vision transformers (arXiv 2405.17995).

encoder = dmtjepa.load("runs/mine")
images = torch.stack([encoder.preprocess(image) for image in photographs])
patches, pooled = encoder.features(images)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmtjepa.pretrained import Encoder, load

__version__ = "0.1.0"
__all__ = ["Encoder", "load"]


def __getattr__(name: str) -> Any:
    """Import the interface when it is used: `import dmtjepa` itself imports nothing that takes long."""
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("dmtjepa.pretrained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
