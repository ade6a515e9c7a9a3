"""What a trained teacher is worth: k-NN, linear probe, collapse numbers, segmentation, figures, a report."""
