"""Training checkpoints and final models on disk: manifest, resharding, export."""
