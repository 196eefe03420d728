"""Consolidate a sharded training checkpoint, and load it on another number of processes or ZeRO stage.

DeepSpeed loads a checkpoint only on the number of processes that saved it. Its universal checkpoints lift that, but
under stage 3 they give all parameters the weight decay of the first one.
"""

import re
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
"""Names of Adam's moments."""
WEIGHT = "fp32"
"""Name of the weights, beside those of the moments."""


@dataclass(frozen=True)
class ConsolidatedState:
    """The trained parameters and their moments, read one tensor at a time.

    Attributes:
        names: of the trained parameters.
        step: optimizer steps done.
        read: maps (name, `WEIGHT` or one of `MOMENTS`) to a tensor in fp32, in the parameter's shape. A checkpoint that
            holds weights only (see `training_checkpoint.prune`) has no moments.
    """

    names: list[str]
    step: int
    read: Callable[[str, str], torch.Tensor]


def open_training_checkpoint(checkpoint: Path, order: Sequence[str] = ()) -> ConsolidatedState:
    """Open a training checkpoint of any number of processes and ZeRO stage.

    Args:
        order: the trained parameters in the optimizer's order (see `optimizer_order`); needed for the moments of a
            checkpoint that is not sharded.

    Raises:
        InputError: the checkpoint is incomplete, or not by this project.
    """
    record = read_record(checkpoint)
    try:
        if record.stage is None or not can_resume(checkpoint):
            return _open_plain(checkpoint, order)
        (tag,) = (checkpoint / "latest").read_text().split()
        open_stage = {0: _open_stage_0, 1: _open_stages_1_and_2, 2: _open_stages_1_and_2, 3: _open_stage_3}
        return open_stage[record.stage](checkpoint / tag, record, order)
    except (OSError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{checkpoint}: cannot read the training checkpoint: {str(error).splitlines()[0]}") from error


def _load(path: Path) -> dict[str, Any]:
    # Trusted: DeepSpeed pickles objects into the project's own files.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _open_plain(checkpoint: Path, order: Sequence[str]) -> ConsolidatedState:
    files = sorted([*checkpoint.glob("adapter_model.safetensors"), *checkpoint.glob("model*.safetensors")])
    where = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    names = [parameter_name(name) for name in where]
    stored = dict(zip(names, where, strict=True))
    optimizer = _load(checkpoint / "optimizer.pt")["state"] if can_resume(checkpoint) else {}
    numbers = {name: number for number, name in enumerate(order)}

    def read(name: str, key: str) -> torch.Tensor:
        if key != WEIGHT:
            return optimizer[numbers[name]][key].float()
        with safe_open(where[stored[name]], "pt") as tensors:
            return tensors.get_tensor(stored[name]).float()

    step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)).global_step
    return ConsolidatedState(list(order) or names, step, read)


def parameter_name(stored: str) -> str:
    """The name in the model of a parameter in a training checkpoint's file: PEFT's files omit the adapter's name."""
    return re.sub(r"\.(lora_[AB]|lora_magnitude_vector)(?:\.weight)?$", r".\1.default.weight", stored)


def _open_stage_0(folder: Path, record: CheckpointRecord, order: Sequence[str]) -> ConsolidatedState:
    saved = _load(folder / "mp_rank_00_model_states.pt")
    optimizer = saved["optimizer"]["state"]
    numbers = {name: number for number, name in enumerate(order)}

    def read(name: str, key: str) -> torch.Tensor:
        return (saved["module"][name] if key == WEIGHT else optimizer[numbers[name]][key]).float()

    return ConsolidatedState(list(order) or list(saved["module"]), int(optimizer[0]["step"]), read)


def _open_stages_1_and_2(folder: Path, record: CheckpointRecord, order: Sequence[str]) -> ConsolidatedState:
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


def _open_stage_3(folder: Path, record: CheckpointRecord, order: Sequence[str]) -> ConsolidatedState:
    groups = _load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    ranks = list(_shards(folder, record))
    places = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            # Each process holds the same number of elements of a parameter; the last are padding.
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
    """The trained parameters in the order of the trainer's optimizer: those with weight decay come first."""
    decays = set(trainer.get_decay_parameter_names(trainer.model))
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    return sorted(trained, key=lambda name: name not in decays)


@torch.no_grad()
def load_resharded(trainer: Trainer, checkpoint: Path) -> None:
    """Load a training checkpoint into a prepared trainer with another number of processes or ZeRO stage.

    Raises:
        InputError: the checkpoint is incomplete, or of another model.
    """
    saved = open_training_checkpoint(checkpoint, optimizer_order(trainer))
    names = {parameter: name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    if missing := sorted(set(names.values()) - set(saved.names)):
        raise InputError(f"{checkpoint} has no {missing[0]}: resume with the model and adapter that it was saved with")
    engine: Any = trainer.model_wrapped
    optimizer: Any = trainer.optimizer
    schedule: Any = trainer.lr_scheduler
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0
    step = torch.tensor(float(saved.step))
    load = {0: _load_plain, 1: _load_stages_1_and_2, 2: _load_stages_1_and_2, 3: _load_stage_3}
    load[stage](trainer, saved, names, step)
    if hasattr(engine, "global_steps"):
        engine.global_steps = saved.step
    scheduler = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    # DeepSpeed drops empty groups (adapters have no parameter without decay); all groups follow one schedule.
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        scheduler[name] = scheduler[name][:1] * len(schedule.base_lrs)
    schedule.load_state_dict(scheduler)
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


Names = dict[torch.nn.Parameter, str]


def _load_plain(trainer: Trainer, saved: ConsolidatedState, names: Names, step: torch.Tensor) -> None:
    accelerated: Any = trainer.optimizer
    optimizer = accelerated.optimizer
    for parameter, name in names.items():
        parameter.copy_(saved.read(name, WEIGHT))
        moments = {key: saved.read(name, key).to(parameter.device) for key in MOMENTS}
        optimizer.state[parameter] = {"step": step.to(parameter.device, copy=True), **moments}


def _load_stages_1_and_2(trainer: Trainer, saved: ConsolidatedState, names: Names, step: torch.Tensor) -> None:
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
            if mapping is None:  # not on this process
                continue
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            for key, values in {WEIGHT: flat, **targets}.items():
                piece = saved.read(names[parameter], key).flatten().narrow(0, source.start, source.numel)
                values.narrow(0, target.start, target.numel).copy_(piece)
        optimizer.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **targets}
    optimizer.update_lp_params()


def _load_stage_3(trainer: Trainer, saved: ConsolidatedState, names: Names, step: torch.Tensor) -> None:
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
                value = saved.read(names[parameter], key).flatten()
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
