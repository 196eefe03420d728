#!/usr/bin/env bash
# optuna 5.0.0, 2026-11-30. A study accepts another range of a float in a later ask(), but refuses other choices of a
# categorical parameter. It makes the trial first and checks afterwards: the caller gets an exception and no trial, and
# the study keeps one that is RUNNING. If the trial was enqueued, it waits no longer: the next ask() makes another one.
# add_trial() with the same choices is refused by the storage in SQLite, and accepted by those in memory and a journal.
# Seen, in all three: ValueError "CategoricalDistribution does not support dynamic value space.", then a RUNNING trial
# with the enqueued value under fixed_params, and a further trial without it from the next ask().
# Why it matters: each retry of a sweep whose choices were widened leaves a trial that never ends, and loses a queued one.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet optuna==5.0.0
cd "$place"
cat > try.py <<'PYTHON'
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.disable_default_handler()
narrow, wide = ({"choice": CategoricalDistribution(choices)} for choices in (("a", "b"), ("a", "b", "c")))
storages = {
    "memory": InMemoryStorage(), "sqlite": "sqlite:///study.db",
    "journal": JournalStorage(JournalFileBackend("study.log")),
}  # fmt: skip
added = {}
for name, storage in storages.items():
    study = optuna.create_study(storage=storage)
    for top in (1, 9):
        study.tell(study.ask(narrow | {"rate": FloatDistribution(0, top)}), 1.0)
    study.enqueue_trial({"choice": "c"})
    try:
        study.ask(wide)
    except ValueError as error:
        refusal = str(error)
    else:
        raise SystemExit(f"{name}: other choices are accepted")
    left = study.trials[-1]
    print(f"{name}: {refusal} Left: {left.state.name}, {left.params}, {left.system_attrs}")
    assert left.state.name == "RUNNING" and left.system_attrs == {"fixed_params": {"choice": "c"}}
    study.ask({"rate": FloatDistribution(0, 9)})
    following = study.trials[-1]
    print(f"{name}: the next trial: {following.number}, {following.params}, {following.system_attrs}")
    assert following.number == left.number + 1 and not following.system_attrs
    try:
        study.add_trial(optuna.trial.create_trial(value=0.0, params={"choice": "c"}, distributions=wide))
        added[name] = "accepted"
    except ValueError:
        added[name] = "refused"
print("add_trial with other choices:", added)
assert added == {"memory": "accepted", "sqlite": "refused", "journal": "accepted"}
PYTHON
"$place/venv/bin/python" try.py
