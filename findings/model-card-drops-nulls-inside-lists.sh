#!/usr/bin/env bash
# huggingface_hub 2.4.0, 2026-11-30. A model card's results are written without None, also inside a list of metric_args,
# where the others then move up. Other fields of the same card keep their nulls, and reading keeps them too.
# Seen: [None, 3.0] becomes [3.0] and [None, None] becomes []; a README.md with "interval: [null, 3.0]" loses the null
# when ModelCard.load and save do nothing else; a field outside the results keeps it.
# Why it matters: an interval without a lower end is published as another list, whose first value is the upper end.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet huggingface_hub==2.4.0
cd "$place"
cat > try.py <<'PYTHON'
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

open_ended = {"interval": [None, 3.0], "none": [None, None]}
result = EvalResult(
    task_type="text-generation", dataset_type="d", dataset_name="d", metric_type="m", metric_value=1.0,
    metric_args=open_ended,
)  # fmt: skip
written = yaml.safe_load(ModelCardData(model_name="m", eval_results=[result], field=[None, 3.0]).to_yaml())
args = written["model-index"][0]["results"][0]["metrics"][0]["args"]
print(f"metric_args {open_ended} written as {args}; a field [None, 3.0] as {written['field']}")
assert args == {"interval": [3.0], "none": []} and written["field"] == [None, 3.0]

result = {
    "task": {"type": "text-generation"}, "dataset": {"name": "d", "type": "d"},
    "metrics": [{"type": "m", "value": 1.0, "args": open_ended}],
}  # fmt: skip
header = yaml.safe_dump({"model-index": [{"name": "m", "results": [result]}]})
open("README.md", "w").write(f"---\n{header}---\nText\n")
card = ModelCard.load("README.md")
loaded = card.data.eval_results[0].metric_args
card.save("README.md")
saved = ModelCard.load("README.md").data.eval_results[0].metric_args
print(f"a file's args: loaded {loaded}, saved and loaded again {saved}")
assert loaded == open_ended and saved == {"interval": [3.0], "none": []}
PYTHON
"$place/venv/bin/python" try.py
