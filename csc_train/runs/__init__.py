"""Run directories: their files, their processes, their provenance and their comparison."""
