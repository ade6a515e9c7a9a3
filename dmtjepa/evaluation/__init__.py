"""Measuring a trained teacher: k-NN, linear probe, collapse numbers, segmentation, figures, and a report of them."""
