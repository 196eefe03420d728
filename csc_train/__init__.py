"""CSC Train: train open models for customer support conversation (CSC): choose a support strategy, then reply."""
