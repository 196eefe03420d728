"""Track the metrics of a run: history files, curves, Weights & Biases."""
