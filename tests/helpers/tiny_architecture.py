"""Makes `vit_tiny` a network that takes milliseconds a step. Imported by the processes of these tests alone."""

from dmtjepa.models import ARCHITECTURES

ARCHITECTURES["vit_tiny"] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
