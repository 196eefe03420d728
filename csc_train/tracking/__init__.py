"""Where a run's metrics go: history files, curves, Weights & Biases."""
