"""Check a training before it starts, and estimate its memory, disk space and time.

python recipes/preflight.py model=qwen2_5_72b adapter=full cluster=node8 zero=zero3
"""

import sys

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.training import PreflightRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None


def main(config: PreflightRecipe) -> None:
    # Imported after the configuration is checked, since this takes seconds.
    from csc_train.launching.preflight.checks import run_preflight

    report = run_preflight(config, launching=False)
    report.show()
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    run_recipe("preflight", main)
