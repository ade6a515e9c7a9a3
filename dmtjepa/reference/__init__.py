"""The method again, slow and obvious: what the fast code is tested against (`step`: training; `masks`: sampling)."""
