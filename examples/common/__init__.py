"""What the examples share: text, run folders, optimizers by name, progress and tables."""
