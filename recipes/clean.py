"""Delete ended runs and tokenized dialogues by age and size; without `delete=true`, only list them.

python recipes/clean.py older_than_days=30 larger_than_gb=1
python recipes/clean.py directory=runs/sweeps older_than_days=7 delete=true
"""

import logging

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.training import CleanRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

logger = logging.getLogger("csc_train.recipes.clean")


def main(config: CleanRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    from pathlib import Path

    from rich.console import Console

    from csc_train.errors import InputError
    from csc_train.runs.cleanup import Removable, find_ended_runs, measure, remove_run
    from csc_train.runs.comparison import terminal_table
    from csc_train.runs.distributed import require_single_process
    from csc_train.tokenized_cache import cache_entries, remove_entry

    require_single_process("clean")

    # Candidates
    found = list(find_ended_runs(Path(config.directory), config.unfinished)) if config.directory else []
    if config.cache_dir not in (None, CleanRecipe.cache_dir) and not Path(config.cache_dir).is_dir():
        raise InputError(f"cache_dir={config.cache_dir}: no such folder")
    cached = cache_entries(Path(config.cache_dir)) if config.cache_dir else []
    found += [Removable(entry, "tokenized", *measure(entry)) for entry in cached]
    chosen = [
        each for each in found if each.days >= config.older_than_days and each.size >= config.larger_than_gb * 1e9
    ]

    # Removal
    rows, freed = [["directory", "what", "days", "GB", ""]], 0
    for each in chosen:
        done = f"kept: {each.reason}" if each.reason else "would be deleted"
        if config.delete and not each.reason:
            try:
                if each.kind == "tokenized":
                    kept = remove_entry(each.directory, each.days)
                else:
                    kept = remove_run(each, config.unfinished)
                done = f"deleted, but for {kept} files that it did not write" if kept else "deleted"
            except InputError as error:
                done = f"kept: {error}"
        freed += 0 if done.startswith("kept") else each.size
        rows.append([str(each.directory), each.kind, f"{each.days:,.0f}", f"{each.size / 1e9:.3f}", done])

    # Table
    if chosen:
        Console().print(terminal_table(rows))
    logger.info(
        f"{'deleted' if config.delete else 'delete=true deletes'} {freed / 1e9:.3f} GB; "
        f"{len(found) - len(chosen)} others are younger or smaller"
    )


if __name__ == "__main__":
    run_recipe("clean", main)
