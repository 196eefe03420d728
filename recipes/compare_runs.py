"""Compare the training runs of a folder: settings that differ, final figures, speed, curves.

python recipes/compare_runs.py runs/sweeps/lr
python recipes/compare_runs.py runs metric=eval_strategy_accuracy direction=maximize
"""

from csc_train.config.compose import CompareRunsRecipe, resolved, run_recipe


def main(config: CompareRunsRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    from pathlib import Path

    from csc_train.runs.comparison import find_runs, ordered, show_comparison, write_comparison
    from csc_train.runs.directory import Run, single_process

    single_process("compare_runs")
    run = Run("compare_runs", resolved(config))
    runs, broken = find_runs(Path(config.folder))
    runs = ordered(runs, config.metric, config.direction)

    # Table and plot
    run.begin({})
    write_comparison(run.directory, runs, broken, config.metric)
    run.finish()
    show_comparison(runs, broken, config.metric)
    run.say(f"report: {run.directory}/runs.md, {run.directory}/runs.json, {run.directory}/runs.svg")


if __name__ == "__main__":
    run_recipe("compare_runs", main)
