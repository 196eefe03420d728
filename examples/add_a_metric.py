"""Add a metric: replies that address the customer politely, in every table, report and comparison.

python examples/add_a_metric.py                                                     # scores two baselines
python recipes/evaluate.py checkpoint=runs/demo 'plugins=[examples/add_a_metric.py]'  # beside all other metrics
"""

import numpy

from csc_train.evaluation.metrics.registry import metric
from csc_train.evaluation.table import PredictionTable


@metric(name="polite", unit="turns", direction="higher", profiles=["zh"])
def polite_replies(table: PredictionTable) -> numpy.ndarray:
    """Replies that address the customer by 您, in percent."""
    return 100.0 * numpy.array(["您" in reply for reply, _ in table.pairs])


def main() -> None:
    """Score the two baselines on sample dialogues in the reference context."""
    from rich.console import Console

    from csc_train.data.sample_grammar import generate_sample
    from csc_train.evaluation.config import MetricsConfig
    from csc_train.evaluation.report.tables import console_table
    from csc_train.evaluation.scoring import score_predictions
    from csc_train.inference.baselines import StrategyBaseline
    from csc_train.inference.generator import generate_predictions
    from csc_train.inference.predictions import BASELINE_NAMES

    dialogues = generate_sample(60, seed=0)
    training, evaluation = dialogues[:40], dialogues[40:]
    by_id = {dialogue.id: dialogue for dialogue in evaluation}
    results = {}
    for order, name in enumerate(BASELINE_NAMES):
        predictions = generate_predictions(evaluation, StrategyBaseline(training, order), "reference")
        results[name] = {"reference": score_predictions(predictions, by_id, MetricsConfig(profiles=["zh"]))}
    Console().print(console_table(results, "zh"))


if __name__ == "__main__":
    main()
