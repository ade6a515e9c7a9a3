"""From a source to batches of crops: for training with torchvision or DALI, and centre crops for evaluation."""
