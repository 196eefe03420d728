"""Compare training runs, or those of folders: last metrics, speed, settings that differ, curves.

python recipes/compare_runs.py runs/sweeps/lr
python recipes/compare_runs.py runs/first runs/second
python recipes/compare_runs.py runs metric=eval_strategy_accuracy direction=maximize
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.training import CompareRunsRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.compare_runs")
OUTPUTS = ("runs.json", "runs.md", "runs.svg")
"""What the recipe writes into the run directory."""


def main(config: CompareRunsRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    from pathlib import Path

    from csc_train.config.compose import to_container
    from csc_train.runs.comparison import find_runs, show_comparison, sort_runs, write_comparison
    from csc_train.runs.directory import Run
    from csc_train.runs.distributed import require_single_process

    require_single_process("compare_runs")
    run = Run("compare_runs", to_container(config), OUTPUTS)
    runs, broken = find_runs([Path(folder) for folder in config.folders])
    runs = sort_runs(runs, config.metric, config.direction)

    # Table and plot
    run.start({})
    write_comparison(run.directory, runs, broken, config.metric)
    run.finish()
    show_comparison(runs, broken, config.metric)
    logger.info(f"report: {run.directory}/runs.md, {run.directory}/runs.json, {run.directory}/runs.svg")


if __name__ == "__main__":
    run_recipe("compare_runs", main)
