"""Slow and simple implementations that the fast code is tested against: `step` (training) and `masks` (sampling)."""
