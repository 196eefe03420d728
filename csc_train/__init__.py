"""CSC Train: teach open models to support customers strategy by strategy."""
