"""Training: the loop, and what keeps it correct on many devices."""
