"""Alerts of a training: what in its metrics asks for a look, such as a loss that spikes.

A rule compares a log entry with the median of those before it, in robust standard deviations or as a share: neither
moves with a few outliers, and a loss that falls steeply hides no spike. A lasting fault is one episode, and gives one
alert.
"""

import itertools
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from csc_train.runs.directory import add_to_record, read_run_record
from csc_train.templates import read_yaml
from csc_train.tracking.tracker import Tracker
from csc_train.training.config import AlertsConfig

DEVIATION = 1.4826 / math.sqrt(2)
"""A normal distribution's standard deviation over the median distance of two draws; a trend hardly changes that."""
LEAST_DEVIATION = 0.02
"""Share of the median that counts as a standard deviation at least: a loss that hardly moves spikes by no rounding."""
LEAST_CHANGE = 0.02
"""Share by which a validation metric is worse at the end of a bad course: on a plateau noise often falls thrice."""
LEAST_ENTRIES = 10
"""Log entries in a window before the next is judged; the level of a loss is their median, as it falls."""
CALM = 10
"""Log entries without a fault that end an episode."""
logger = logging.getLogger(__name__)


def _recent(window: Sequence[float]) -> float:
    return statistics.median([*window][-LEAST_ENTRIES:])


def _spikes(value: float, window: Sequence[float], threshold: float) -> bool:
    median = _recent(window)
    deviation = DEVIATION * statistics.median(abs(after - before) for before, after in itertools.pairwise(window))
    return value > median + threshold * max(deviation, LEAST_DEVIATION * abs(median))


def _is_low(value: float, window: Sequence[float], threshold: float) -> bool:
    return value < threshold * statistics.median(window)


def _rises(value: float, window: Sequence[float], threshold: float, sign: int = 1) -> bool:
    course = [sign * each for each in (*window, value)][-int(threshold) - 1 :]
    rising = all(earlier < later for earlier, later in itertools.pairwise(course))
    return rising and len(course) > threshold and course[-1] - course[0] > LEAST_CHANGE * abs(course[0])


def _falls(value: float, window: Sequence[float], threshold: float) -> bool:
    return _rises(value, window, threshold, sign=-1)


@dataclass(frozen=True)
class Rule:
    """A fault of a training.

    Attributes:
        name: the field of `AlertsConfig` with its threshold.
        metric: the one that is judged; entries without it, or with one that is not finite, are left out.
        is_wrong: takes a value, those before it and the threshold.
        message: of an alert, with `value`, the `median` of the ten before it, and `threshold`.
        least: values in the window before the next is judged.
        entries: that are wrong in a row before there is an alert.
        calm: entries in a row that are not wrong, which end an episode.
        after_warmup: whether entries of the learning rate's warm-up are left out.
    """

    name: str
    metric: str
    is_wrong: Callable[[float, Sequence[float], float], bool]
    message: str
    least: int = LEAST_ENTRIES
    entries: int = 1
    calm: int = CALM
    after_warmup: bool = False


_DETECTORS = {"spikes": _spikes, "is_low": _is_low, "rises": _rises, "falls": _falls}
RULES = tuple(
    Rule(**row | {"is_wrong": _DETECTORS[row["is_wrong"]]}) for row in read_yaml(__package__, "alert_rules.yaml")
)
"""What is watched in every training."""


class Watch:
    """A rule, and the values that it has seen.

    Args:
        threshold: that of the rule; 0 and None never find a fault.
        window: how many values are kept.
    """

    def __init__(self, rule: Rule, threshold: float | None, window: int):
        self.rule, self.threshold = rule, threshold
        self._values: deque[float] = deque(maxlen=window)
        self._wrong, self._calm, self._in_episode = 0, 0, False

    def add(self, value: float) -> str | None:
        """Judge a value; the message if an episode begins with it."""
        rule, message = self.rule, None
        wrong = bool(
            self.threshold and len(self._values) >= rule.least and rule.is_wrong(value, self._values, self.threshold)
        )
        self._wrong, self._calm = (self._wrong + 1, 0) if wrong else (0, self._calm + 1)
        if self._calm >= rule.calm:
            self._in_episode = False
        if self._wrong >= rule.entries and not self._in_episode:
            self._in_episode = True
            message = rule.message.format(value=value, median=_recent(self._values), threshold=self.threshold)
        self._values.append(value)
        return message


class Alerts(TrainerCallback):
    """Says each fault in the log, in `run.json` and to the tracker; a resume repeats none.

    The last step of an epoch is left out if it has fewer packs than others: its loss varies more, and it is slower.
    """

    def __init__(self, config: AlertsConfig, tracker: Tracker):
        self.tracker, self.directory = tracker, tracker.history.directory
        self._watches = [Watch(rule, getattr(config, rule.name), config.window) for rule in RULES]
        self._known: list[dict[str, Any]] = []
        self._last_step = self._warmup = 0
        self._short_step: float = math.inf  # its number within an epoch

    def on_train_begin(self, args, state, control, train_dataloader=None, **_) -> None:
        """Fill the windows from the history of a resumed training."""
        if not state.is_world_process_zero:
            return
        self._warmup, self._last_step = args.get_warmup_steps(state.max_steps), 0
        packs = len(train_dataloader.dataset)
        self._short_step = math.ceil(packs / args.packs_per_step) if packs % args.packs_per_step else math.inf
        self._known = read_run_record(self.directory).get("alerts", [])
        for entry in state.log_history:
            for _ in self._judge(entry, entry["step"]):
                pass

    def on_log(self, args, state, control, logs: dict[str, Any], **_) -> None:
        """Judge a log entry."""
        if not state.is_world_process_zero:
            return
        for alert in self._judge(logs, state.global_step):
            same = (each for each in self._known if (each["rule"], each["metric"]) == (alert["rule"], alert["metric"]))
            if any(each["step"] >= alert["step"] for each in same):
                continue  # of steps that are trained again
            self._known.append(alert)
            logger.info("alert: step %d: %s", alert["step"], alert["message"])
            add_to_record(self.directory, alerts=self._known)
            self.tracker.alert(alert["rule"].replace("_", " "), f"step {alert['step']}: {alert['message']}")

    def _judge(self, entry: dict[str, Any], step: int) -> Iterator[dict[str, Any]]:
        steps = step - self._last_step
        self._last_step = max(step, self._last_step)
        if steps == 1 and "loss" in entry and not step % self._short_step:
            return
        for watch in self._watches:
            value = entry.get(watch.rule.metric)
            if value is None or not math.isfinite(value) or (watch.rule.after_warmup and step <= self._warmup):
                continue
            if message := watch.add(value):
                yield {"rule": watch.rule.name, "metric": watch.rule.metric, "step": step, "message": message}
