"""From a source to batches of crops: for training with PIL or DALI, and centre crops for evaluation."""
