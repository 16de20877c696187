"""What the examples share: data, optimizers by name, the training loop, run folders, tables."""
