"""A saved state of training read whole, whatever it was sharded over, and laid out over other processes or by another
ZeRO stage.

DeepSpeed loads a state on as many processes as saved it. Its universal checkpoints would lift that, but under stage 3
they give all parameters the weight decay of the first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Trainer, TrainerState

from csc_train.checkpoints.training_checkpoint import TRAINER_STATE, CheckpointRecord, can_resume, read_record
from csc_train.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's."""
WEIGHT = "fp32"


@dataclass(frozen=True)
class ConsolidatedState:
    """What training has changed, one whole tensor at a time.

    Attributes:
        names: of the trained parameters.
        step: optimizer steps done.
        read: (name, `WEIGHT` or one of `MOMENTS`) to a tensor in fp32, in the parameter's shape. A state that was kept
            for its weights (see `states.retire_states`) has no moments.
    """

    names: list[str]
    step: int
    read: Callable[[str, str], torch.Tensor]


def open_training_checkpoint(state: Path, order: Sequence[str] = ()) -> ConsolidatedState:
    """Open a saved state.

    Args:
        order: the trained parameters as the optimizer numbers them (see `optimizer_order`); needed for the moments of
            a state that is not sharded.

    Raises:
        InputError: it is torn, or not by this project.
    """
    record = read_record(state)
    try:
        if record.stage is None or not can_resume(state):
            return _plain(state, order)
        (tag,) = (state / "latest").read_text().split()
        open_stage = {0: _stage_0, 1: _stages_1_and_2, 2: _stages_1_and_2, 3: _stage_3}[record.stage]
        return open_stage(state / tag, record, order)
    except (OSError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{state}: the state cannot be read ({str(error).splitlines()[0]})") from error


def _load(path: Path) -> dict[str, Any]:
    # The project's own files, in which DeepSpeed keeps objects of its own.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _plain(state: Path, order: Sequence[str]) -> ConsolidatedState:
    files = sorted([*state.glob("adapter_model.safetensors"), *state.glob("model*.safetensors")])
    where = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    # PEFT leaves the adapter's name out of its files.
    names = [name.replace("lora_A.weight", "lora_A.default.weight") for name in where]
    names = [name.replace("lora_B.weight", "lora_B.default.weight") for name in names]
    stored = dict(zip(names, where, strict=True))
    optimizer = _load(state / "optimizer.pt")["state"] if can_resume(state) else {}
    numbers = {name: number for number, name in enumerate(order)}

    def read(name: str, key: str) -> torch.Tensor:
        if key != WEIGHT:
            return optimizer[numbers[name]][key].float()
        with safe_open(where[stored[name]], "pt") as tensors:
            return tensors.get_tensor(stored[name]).float()

    step = TrainerState.load_from_json(str(state / TRAINER_STATE)).global_step
    return ConsolidatedState(list(order) or names, step, read)


def _stage_0(folder: Path, record: CheckpointRecord, order: Sequence[str]) -> ConsolidatedState:
    saved = _load(folder / "mp_rank_00_model_states.pt")
    optimizer = saved["optimizer"]["state"]
    numbers = {name: number for number, name in enumerate(order)}

    def read(name: str, key: str) -> torch.Tensor:
        return (saved["module"][name] if key == WEIGHT else optimizer[numbers[name]][key]).float()

    return ConsolidatedState(list(order) or list(saved["module"]), int(optimizer[0]["step"]), read)


def _stages_1_and_2(folder: Path, record: CheckpointRecord, order: Sequence[str]) -> ConsolidatedState:
    groups = _load(folder / "mp_rank_00_model_states.pt")["param_shapes"]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    ranks = list(_shards(folder, record))
    moments = [rank["base_optimizer_state"]["state"] for rank in ranks]

    def pieces(name: str, key: str) -> Iterator[torch.Tensor]:
        for rank, moment in zip(ranks, moments, strict=True):
            for group, slices in enumerate(rank["param_slice_mappings"]):
                if name in slices:
                    flat = rank["single_partition_of_fp32_groups"][group] if key == WEIGHT else moment[group][key]
                    yield flat.narrow(0, slices[name].start, slices[name].numel)

    def read(name: str, key: str) -> torch.Tensor:
        return torch.cat(list(pieces(name, key))).float().view(shapes[name])

    return ConsolidatedState(list(shapes), int(moments[0][0]["step"]), read)


def _stage_3(folder: Path, record: CheckpointRecord, order: Sequence[str]) -> ConsolidatedState:
    groups = _load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    ranks = list(_shards(folder, record))
    places = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            # Every process holds as many elements of a parameter; the last are padding.
            each = -(-shape.numel() // record.processes)
            places[name] = group, start, each, shape
            start += each

    def read(name: str, key: str) -> torch.Tensor:
        group, start, each, shape = places[name]
        flat = [
            rank["fp32_flat_groups"][group] if key == WEIGHT else rank["optimizer_state_dict"]["state"][group][key]
            for rank in ranks
        ]
        return torch.cat([part.narrow(0, start, each) for part in flat])[: shape.numel()].float().view(shape)

    return ConsolidatedState(list(places), int(ranks[0]["optimizer_state_dict"]["state"][0]["step"]), read)


def _shards(folder: Path, record: CheckpointRecord) -> Iterator[dict[str, Any]]:
    for rank in range(record.processes):
        found = list(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        if len(found) != 1:
            raise FileNotFoundError(f"no shard of process {rank} among {record.processes}")
        yield _load(found[0])["optimizer_state_dict"]


def optimizer_order(trainer: Trainer) -> list[str]:
    """The trained parameters as the trainer's optimizer numbers them: those that decay come first."""
    decays = set(trainer.get_decay_parameter_names(trainer.model))
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    return sorted(trained, key=lambda name: name not in decays)


@torch.no_grad()
def load_resharded(trainer: Trainer, state: Path) -> None:
    """Load a saved state into a trainer that is ready to train, over whatever processes and by whatever stage.

    Raises:
        InputError: the state is torn, or of another model.
    """
    whole = open_training_checkpoint(state, optimizer_order(trainer))
    names = {parameter: name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    if missing := sorted(set(names.values()) - set(whole.names)):
        raise InputError(f"{state} holds no {missing[0]}: it is of another model or adapter")
    engine: Any = trainer.model_wrapped
    optimizer: Any = trainer.optimizer
    schedule: Any = trainer.lr_scheduler
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0
    step = torch.tensor(float(whole.step))
    {0: _into_plain, 1: _into_stages_1_and_2, 2: _into_stages_1_and_2, 3: _into_stage_3}[stage](
        trainer, whole, names, step
    )
    if hasattr(engine, "global_steps"):
        engine.global_steps = whole.step
    scheduler = torch.load(state / "scheduler.pt", weights_only=True)
    # DeepSpeed drops a group that has no parameter (an adapter has none without decay); all follow one schedule.
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        scheduler[name] = scheduler[name][:1] * len(schedule.base_lrs)
    schedule.load_state_dict(scheduler)
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


Names = dict[torch.nn.Parameter, str]


def _into_plain(trainer: Trainer, whole: ConsolidatedState, names: Names, step: torch.Tensor) -> None:
    accelerated: Any = trainer.optimizer
    optimizer = accelerated.optimizer
    for parameter, name in names.items():
        parameter.copy_(whole.read(name, WEIGHT))
        moments = {key: whole.read(name, key).to(parameter.device) for key in MOMENTS}
        optimizer.state[parameter] = {"step": step.to(parameter.device, copy=True), **moments}


def _into_stages_1_and_2(trainer: Trainer, whole: ConsolidatedState, names: Names, step: torch.Tensor) -> None:
    engine: Any = trainer.model_wrapped
    optimizer = engine.optimizer
    if hasattr(optimizer, "bit16_groups"):
        groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    else:  # DeepSpeed's own class for stage 1 in bf16
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
    for group, flat in groups:
        targets = {key: torch.zeros_like(flat) for key in MOMENTS}
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # this process holds nothing of it
                continue
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            for key, values in {WEIGHT: flat, **targets}.items():
                piece = whole.read(names[parameter], key).flatten().narrow(0, source.start, source.numel)
                values.narrow(0, target.start, target.numel).copy_(piece)
        optimizer.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **targets}
    optimizer.update_lp_params()


def _into_stage_3(trainer: Trainer, whole: ConsolidatedState, names: Names, step: torch.Tensor) -> None:
    engine: Any = trainer.model_wrapped
    optimizer = engine.optimizer
    rank, processes = trainer.args.process_index, trainer.args.world_size
    optimizer.checkpoint_event_prologue()
    for index, group in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[index]
        targets = {key: torch.zeros_like(flat) for key in MOMENTS}
        start = 0
        for parameter in group:
            each = parameter.partition_numel()
            for key, values in {WEIGHT: flat, **targets}.items():
                value = whole.read(names[parameter], key).flatten()
                padded = torch.nn.functional.pad(value, (0, each * processes - value.numel()))
                values.narrow(0, start, each).copy_(padded.narrow(0, rank * each, each))
            start += each
        optimizer.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **targets}
        shards = optimizer.fp16_partitioned_groups[index]
        computed = optimizer.fp16_partitioned_groups_flat[index]
        computed.copy_(flat)
        for shard, values in zip(shards, optimizer.unflatten(computed, shards), strict=True):
            shard.data = values.data
    optimizer.checkpoint_event_epilogue()
