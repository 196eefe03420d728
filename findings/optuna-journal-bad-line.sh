#!/usr/bin/env bash
# optuna 5.0.0, 2026-11-29. JournalFileBackend forgives a torn last line when it reads, but appends behind it, on the same
# line: load_study opens such a journal, create_study(load_if_exists=True) spoils it, and then neither can open it.
# Seen: "load_study: 3 trials"; create_study and every later load_study: json.JSONDecodeError, "Expecting ',' delimiter".
# Why it matters: a sweep that was killed while it wrote cannot be resumed by the usual call.
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
seen = [opened(optuna.load_study), opened(optuna.create_study, load_if_exists=True), opened(optuna.load_study)]
print("torn: load_study, create_study, load_study:", seen)
assert seen[0] == "3 trials" and all(each.startswith("JSONDecodeError") for each in seen[1:])
PYTHON
"$place/venv/bin/python" try.py
