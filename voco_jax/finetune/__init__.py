"""Fine-tuning with labels: losses, augmentation, steps, validation, and the tasks made of them."""
