"""Alerts: each rule on hand-made series and on series without the fault, and a training that is driven to a spike."""

import math
import pickle
import random

import pytest
import torch
from conftest import small_tokenizer, tiny_config
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState
from workers.loss_curve import train

from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.files import read_json, write_json
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.runs.config import may_change
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.tracking.config import TrackingConfig
from csc_train.tracking.tracker import Tracker
from csc_train.training.alerts import RULES, Alerts, Watch
from csc_train.training.config import AlertsConfig, TrainerConfig
from csc_train.training.trainer import training_arguments

GAUSS = [random.Random(number).gauss(0, 1) for number in range(300)]
"""Noise of deviation 1."""
LOSS = [1 + 3 * math.exp(-step / 40) + 0.05 * GAUSS[step] for step in range(300)]
SPEED = [1000 + 50 * each for each in GAUSS]
NORMS = [1 + 0.2 * each for each in GAUSS]


def found(metric: str, values: list[float], **settings) -> list[int]:
    """The indices of the values at which an alert is raised."""
    config = AlertsConfig(**settings)
    watches = [Watch(rule, getattr(config, rule.name), config.window) for rule in RULES if rule.metric == metric]
    return [index for index, value in enumerate(values) for watch in watches if watch.add(value)]


def planted(values: list[float], at: dict[int, float]) -> list[float]:
    return [at.get(index, value) for index, value in enumerate(values)]


def test_a_loss_that_spikes_is_found_once_an_episode():
    assert found("loss", LOSS) == []
    assert found("loss", planted(LOSS, {120: 3.0})) == [120]
    assert found("loss", planted(LOSS, {120: 3.0, 123: 4.0, 128: 3.0})) == [120]
    assert found("loss", planted(LOSS, {120: 3.0, 150: 3.0})) == [120, 150]
    assert found("loss", [*LOSS[:120], *(5 + 0.1 * each for each in GAUSS)]) == [120]  # it stays there
    assert found("loss", planted(LOSS, {120: 3.0}), loss_spike=0) == []
    assert found("loss", planted(LOSS, {120: 3.0}), loss_spike=100) == []


def test_rounding_and_the_first_entries_are_no_spikes():
    assert found("loss", [1.0] * 40 + [1.1]) == []
    assert found("loss", [1.0] * 40 + [1.2]) == [40]
    assert found("loss", [1.0, 1.1, 9.0, 1.0, 12.0, 1.0]) == []
    assert found("loss", [11.0 - step / 3 for step in range(30)]) == []  # a warm-up


def test_a_stall_is_three_slow_entries():
    assert found("trained_tokens_per_second", SPEED) == []
    assert found("trained_tokens_per_second", planted(SPEED, {50: 100, 51: 100, 53: 100, 54: 100})) == []
    assert found("trained_tokens_per_second", planted(SPEED, dict.fromkeys((50, 51, 52, 53, 54), 400))) == [52]
    assert found("trained_tokens_per_second", [*SPEED[:60], *([300] * 200)]) == [62]
    assert found("trained_tokens_per_second", [*[50.0] * 5, *SPEED]) == []  # of the first steps
    assert found("trained_tokens_per_second", [*SPEED[:60], *([300] * 9)], slow_throughput=None) == []


def test_gradients_that_vanish_are_found_and_those_that_shrink_slowly_are_not():
    assert found("grad_norm", NORMS) == []
    assert found("grad_norm", [*NORMS[:50], *([1e-4] * 100)]) == [52]
    assert found("grad_norm", [*NORMS[:50], 0.0, 0.0, *NORMS[50:]]) == []
    assert found("grad_norm", [0.96**step * (1 + each / 5) for step, each in enumerate(GAUSS)]) == []
    assert found("grad_norm", [*NORMS[:50], *([1e-4] * 100)], small_gradients=0) == []


def test_validations_that_get_worse_running_are_found():
    assert found("eval_loss", [3, 2, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4]) == [5]
    assert found("eval_loss", [3, 2, 1.9, 2.0, 2.1, 2.2, 2.1, 2.2, 2.3, 2.4]) == [5, 9]
    assert found("eval_loss", [3, 2, 1.9, 2.0, 2.1, 2.1, 2.2, 2.3]) == []
    assert found("eval_loss", [2, 2.001, 2.002, 2.003, 2.004]) == []  # of a plateau
    assert found("eval_loss", [2, 2.1, 2.2], worse_validations=2) == [2]
    assert found("eval_loss", [3, 2, 1, 0.5, 0.4]) == []
    assert found("eval_strategy_accuracy", [0.5, 0.6, 0.58, 0.55, 0.5, 0.4]) == [4]
    assert found("eval_strategy_accuracy", [0.1, 0.2, 0.3, 0.4, 0.5]) == []
    assert found("eval_strategy_accuracy", [0.5, 0.4, 0.3, 0.2, 0.1], worse_validations=None) == []


@pytest.fixture
def told(tmp_path, said):
    """Passes log entries to the callback as the Trainer does, nine packs in steps of four; the lines that it says."""

    def tell(entries: dict[int, dict], before: int = 0, warmup: float = 0.0) -> list[str]:
        if not (tmp_path / "run.json").exists():
            write_json(tmp_path / "run.json", {"recipe": "sft"})
        arguments = training_arguments(
            TrainerConfig(packs_per_step=4, warmup_ratio=warmup), tmp_path / "checkpoints", 1
        )
        earlier = [entry | {"step": step} for step, entry in entries.items() if step <= before]
        state = TrainerState(global_step=before, max_steps=100, log_history=earlier)
        callback = Alerts(AlertsConfig(), Tracker(TrackingConfig("off"), tmp_path))
        callback.on_train_begin(arguments, state, TrainerControl(), train_dataloader=DataLoader(range(9)))
        said.clear()
        for step, entry in entries.items():
            if step > before:
                state.global_step = step
                callback.on_log(arguments, state, TrainerControl(), logs=entry)
        return [line for line in said if line.startswith("alert: ")]

    return tell


def test_an_alert_is_a_line_and_an_entry_of_the_run_and_a_resume_repeats_none(told, tmp_path):
    entries = {step: {"loss": LOSS[step]} for step in range(1, 90)}
    entries[70]["loss"] = entries[80]["loss"] = 4.0
    entries[82] = {"loss": math.nan}
    line = told({step: entry for step, entry in entries.items() if step < 75})
    (alert,) = read_json(tmp_path / "run.json")["alerts"]
    assert line == [f"alert: step 70: {alert['message']}"] and alert["message"].startswith("the loss 4 is far above")
    assert (alert["rule"], alert["metric"], alert["step"]) == ("loss_spike", "loss", 70)
    assert told({step: entry for step, entry in entries.items() if step < 75}, before=65) == []
    # From the history a resumed training knows the loss before, and that an episode has begun.
    entries[76] = {"loss": 4.0}
    assert told({step: entry for step, entry in entries.items() if step < 80}, before=74) == []
    entries[88]["loss"] = 4.0
    assert [each.partition(" the ")[0] for each in told(entries, before=86)] == []  # the episode of 80
    entries[80], entries[76] = entries[79], entries[75]
    assert [each.partition(" the ")[0] for each in told(entries, before=86)] == ["alert: step 88:"]
    assert [each["step"] for each in read_json(tmp_path / "run.json")["alerts"]] == [70, 88]


def test_a_step_of_fewer_packs_and_the_warm_up_are_left_out(told):
    entries = {step: {"loss": 1.0, "grad_norm": 1.0} for step in range(1, 60)}
    entries[48] = entries[51] = {"loss": 9.0, "grad_norm": 1.0}  # the last of three steps of an epoch
    assert told(entries) == []
    entries[49] = {"loss": 9.0, "grad_norm": 1.0}
    assert [each[:15] for each in told(entries)] == ["alert: step 49:"]
    rising = {step: {"loss": 1.0, "grad_norm": 1000.0 if step <= 30 else 1.0} for step in range(1, 60)}
    assert told(rising, warmup=0.3) == []
    assert len(told(rising)) == 1


@pytest.mark.slow
def test_a_training_whose_learning_rate_drives_it_to_a_spike_raises_one_alert(tmp_path, said):
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="reply_only"))
    asked = Turn(Speaker.CUSTOMER, "您好")
    dialogues = [Dialogue(str(n), (asked, Turn(Speaker.SUPPORTER, "好的" * n, STRATEGIES[n]))) for n in range(1, 5)]
    packs, _ = pack_dialogues([*map(template.encode, dialogues)], PackingConfig("off", 900), LossConfig())
    (tmp_path / "packs").write_bytes(pickle.dumps(packs))
    torch.manual_seed(0)
    config = tiny_config("qwen2", template.tokenizer, 0.1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    template.tokenizer.save_pretrained(tmp_path / "model")
    write_json(tmp_path / "run" / "run.json", {"recipe": "sft"})

    def trained(name: str, rate: float, **options) -> list[str]:
        said.clear()
        train(
            tmp_path, 4, alerts="run", checkpoints=name, max_steps=18, learning_rate=rate, warmup_ratio=0.9,
            lr_scheduler="constant_with_warmup", save_steps=10, save_total_limit=9, **options,
        )  # fmt: skip
        return [line for line in said if line.startswith("alert: ")]

    assert trained("calm", 3e-3) == []
    assert len(trained("driven", 10.0)) == 1
    (alert,) = read_json(tmp_path / "run" / "run.json")["alerts"]
    assert alert["rule"] == "loss_spike" and alert["step"] > 10
    assert trained("driven", 10.0, resume="driven/checkpoint-10") == []
    assert read_json(tmp_path / "run" / "run.json")["alerts"] == [alert]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alerts.window=3", "alerts.window=3: must be between 10 and 10000"),
        ("alerts.slow_throughput=2", "alerts.slow_throughput=2.0: must be between 0 and 1"),
        ("alerts.worse_validations=60", "alerts.worse_validations=60: choose at most alerts.window"),
        ("alerts.loss_spikes=3", "Did you mean 'alerts.loss_spike'"),
    ],
)
def test_bad_settings_are_refused(override, message):
    with pytest.raises(InputError) as caught:
        compose("sft", [override])
    assert message in str(caught.value)
    assert may_change("alerts.loss_spike")
