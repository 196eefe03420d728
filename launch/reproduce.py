"""Reproduce a table of results: train and evaluate every row of a suite, beside the published figures.

python launch/reproduce.py suite=paper dry_run=true
python launch/reproduce.py suite=cpu_tiny
"""

import sys

try:
    from csc_train.suites.reproduce import reproduce
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None

if __name__ == "__main__":
    sys.exit(reproduce(sys.argv[1:]))
