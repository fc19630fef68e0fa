"""The method: augmentation, losses and the training step, as pure functions."""
