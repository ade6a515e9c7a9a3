"""DMT-JEPA: self-supervised pretraining of vision transformers (arXiv 2405.17995).

run = dmtjepa.train("small_images", {"data.root_path": "photos", "logging.folder": "runs/mine"})
report = dmtjepa.evaluate(run)
encoder = dmtjepa.load(run)
images = torch.stack([encoder.preprocess(image) for image in photographs])
patches, pooled = encoder.features(images)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmtjepa.interface import evaluate, train
    from dmtjepa.pretrained import Encoder, load

__version__ = "0.1.0"
__all__ = ["Encoder", "evaluate", "load", "train"]
_MODULES = {"Encoder": "pretrained", "load": "pretrained", "evaluate": "interface", "train": "interface"}


def __getattr__(name: str) -> Any:
    """Import the interface when it is used: `import dmtjepa` itself imports nothing that takes long."""
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(f"dmtjepa.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
