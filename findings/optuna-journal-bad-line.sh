#!/usr/bin/env bash
# optuna 5.0.0, 2026-11-29. JournalFileBackend forgives a torn last line when it reads, but appends behind it, on the same
# line: a study with such a journal opens, and its next trial raises; from then on it cannot be opened.
# Seen: "load_study: 3 trials", "create_study: 3 trials", then json.JSONDecodeError from optimize and from load_study.
# Why it matters: a sweep that was killed while it wrote opens, and is lost with its next trial.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet optuna==5.0.0
cd "$place"
cat > try.py <<'PYTHON'
import json
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.disable_default_handler()

def storage():
    return JournalStorage(JournalFileBackend("study.log"))

def opened(function, **options):
    try:
        return f"{len(function(study_name='s', storage=storage(), **options).trials)} trials"
    except json.JSONDecodeError as error:
        return f"{type(error).__name__}, {error.msg}"

study = optuna.create_study(study_name="s", storage=storage())
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
content = open("study.log", "rb").read()
open("study.log", "wb").write(content[:-20])  # as a process leaves it that is killed while it writes
seen = [opened(optuna.load_study), opened(optuna.create_study, load_if_exists=True)]
study = optuna.load_study(study_name="s", storage=storage())
try:
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
except json.JSONDecodeError as error:
    seen.append(f"{type(error).__name__}, {error.msg}")
seen.append(opened(optuna.load_study))
print("torn: load_study, create_study, optimize, load_study:", seen)
assert seen[:2] == ["3 trials"] * 2 and all(each.startswith("JSONDecodeError") for each in seen[2:]) and len(seen) == 4
PYTHON
"$place/venv/bin/python" try.py
