"""The schema of each recipe's configuration, by the recipe's name."""

import importlib

SCHEMAS = {
    "sft": "csc_train.config.recipes.training:SftRecipe",
    "prepare": "csc_train.config.recipes.training:PrepareRecipe",
    "inspect_data": "csc_train.config.recipes.training:InspectDataRecipe",
    "preflight": "csc_train.config.recipes.training:PreflightRecipe",
    "export": "csc_train.checkpoints.config:ExportConfig",
    "evaluate": "csc_train.config.recipes.evaluation:EvaluateRecipe",
    "compare": "csc_train.config.recipes.evaluation:CompareRecipe",
    "judge": "csc_train.config.recipes.evaluation:JudgeRecipe",
    "human_eval": "csc_train.config.recipes.evaluation:HumanEvalRecipe",
    "chat": "csc_train.chat.config:ChatConfig",
    "write_sample": "csc_train.config.recipes.training:WriteSampleRecipe",
    "convert": "csc_train.conversion.config:ConvertConfig",
    "build_csconv": "csc_train.config.recipes.synthesis:BuildCsconvRecipe",
    "synthesize_rolecs": "csc_train.config.recipes.synthesis:SynthesizeRolecsRecipe",
    "launch": "csc_train.config.recipes.training:LaunchRecipe",
    "sweep": "csc_train.config.recipes.training:SweepRecipe",
    "reproduce": "csc_train.config.recipes.training:ReproduceRecipe",
    "compare_runs": "csc_train.config.recipes.training:CompareRunsRecipe",
    "clean": "csc_train.config.recipes.training:CleanRecipe",
}
"""Module and class of each recipe's schema: a recipe imports its own only."""


def schema_of(recipe: str) -> type:
    """The dataclass of a recipe's configuration."""
    module, _, name = SCHEMAS[recipe].partition(":")
    return getattr(importlib.import_module(module), name)
