"""Dialogues as the model will see them: lengths in tokens, what `packing.max_length` cuts, samples by loss weight."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, cast

from tokenizers.decoders import DecodeStream

from csc_train.config.recipes.training import InspectDataRecipe
from csc_train.data.dialogue import ROLES, Speaker
from csc_train.data.mixture import Mixture
from csc_train.inspection.content import NumberedDialogues, describe_lengths, mask_private
from csc_train.packing.dataset import PackedDataset, PackingReport, pack_dialogues
from csc_train.packing.truncation import drop_leading_turns
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue, TokenType
from csc_train.tokenized_cache import tokenize

NUM_LONGEST = 10
"""Dialogues in the table of the longest."""


def describe_tokens(
    read: NumberedDialogues, template: DialogueTemplate, config: InspectDataRecipe
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tokenize and pack the dialogues as a training does, apart from its splits.

    `packing.overflow=error` is counted as `drop` here.

    Returns:
        The report for JSON, and the samples (see `_render`).

    Raises:
        InputError: as `pack_dialogues`.
    """
    tokenized = tokenize(read.dialogues, template, config.tokenization)
    packing = config.packing
    fitting = replace(packing, overflow="drop") if packing.overflow == "error" else packing
    packed, report = pack_dialogues(tokenized, fitting, config.loss, config.template.language)
    if read.mixture:
        _, epoch = pack_dialogues(tokenized, fitting, config.loss, config.template.language, read.mixture)
        report = replace(epoch, truncated=report.truncated)
    first_turns = dict(packed.pack_items.values[:, :2].tolist())
    lengths, turns = [], {speaker: [] for speaker in Speaker}
    for dialogue, ids in zip(read.dialogues, tokenized, strict=True):
        lengths.append(len(ids.input_ids))
        for turn, (start, end) in zip(dialogue.turns, itertools.pairwise(ids.turn_offsets.tolist()), strict=True):
            turns[turn.speaker].append(end - start)
    names = ROLES if config.kind == "chat" else {each: each.name.lower() for each in Speaker}
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    found = {
        "prefix": len(template.prefix_ids) if config.kind == "csc" else None,
        "max_length": packing.max_length,
        "overflow": packing.overflow,
        "lengths": {
            "tokens per dialogue": describe_lengths(lengths),
            **{f"tokens per {names[each]} turn": describe_lengths(turns[each]) for each in Speaker},
        },
        "longest": [
            read.place(index) | {"tokens": lengths[index], "turns": len(read.dialogues[index].turns)}
            | {"cut_turns": first_turns.get(index)}
            for index in order[:NUM_LONGEST]
        ],
        "over": [read.place(index)["row"] for index in order if lengths[index] > packing.max_length],
        "packing": asdict(report),
        "sources": read.mixture and _describe_sources(read, read.mixture, report),
    }  # fmt: skip
    kept = [index for index in order if index in first_turns]
    samples = [
        read.place(index) | {"tokens": lengths[index]} | _render(index, packed, first_turns[index], template)
        for index in _choose(kept, config.samples, config.data.seed)
    ]
    return found, samples


def _describe_sources(read: NumberedDialogues, mixture: Mixture, packing: PackingReport) -> dict[str, dict[str, Any]]:
    """By source of a mix: its kind, dialogues, turns, and its part of an epoch."""
    found = {}
    for number, (name, part) in enumerate(packing.sources.items()):
        own = [each for each in read.dialogues if mixture.members[each.id][0] == number]
        found[name] = {
            "kind": own[0].kind, "dialogues": len(own), "turns": sum(len(each.turns) for each in own),
            "tokens of an epoch": part["tokens"],
            f"percent of the {mixture.unit}": round(100 * part[f"{mixture.unit.removesuffix('s')}_share"], 2),
            "times in an epoch": round(part["epochs"] * part["dialogues"] / len(own), 3),
        }  # fmt: skip
    return found


def _choose(order: list[int], count: int, seed: int) -> list[int]:
    """The longest and the shortest of dialogues in the order of their length, and others drawn by a seed."""
    ends = list(dict.fromkeys((order[0], order[-1])))[:count]
    others = order[1:-1]
    return ends + random.Random(seed).sample(others, max(0, min(count - len(ends), len(others))))


def _render(index: int, packed: PackedDataset, first_turn: int, template: DialogueTemplate) -> dict[str, Any]:
    """A dialogue of a pack, token by token.

    Returns:
        `cut_turns`, and `runs` of tokens with equal `kind` (prefix, context, strategy, reply) and loss `weight`, each
        with its `pieces`: (text, whether it is a control token). Tokens that share a character are one piece. Private
        data are masked.
    """
    dialogue = drop_leading_turns(packed.dialogues[index], first_turn)
    weights = packed.loss_weights(dialogue).tolist()
    prefix = int(dialogue.turn_offsets[0])
    names = [TokenType(each).name.lower() for each in dialogue.token_types.tolist()]
    kinds = ["prefix"] * prefix + [
        name if weight else "context" for name, weight in zip(names[prefix:], weights[prefix:], strict=True)
    ]
    pieces = list(_masked(list(_pieces(dialogue, template)), dialogue.turn_offsets.tolist()))
    groups = itertools.groupby(pieces, key=lambda piece: (kinds[piece[0]], weights[piece[0]]))
    runs = [
        {"kind": kind, "weight": weight, "pieces": [(text, control) for _, text, control in run]}
        for (kind, weight), run in groups
    ]
    return {"cut_turns": first_turn, "runs": runs}


def _pieces(dialogue: TokenizedDialogue, template: DialogueTemplate) -> Iterator[tuple[int, str, bool]]:
    """(place of the last token, text, whether it is a control token) of each character or run of characters."""
    controls, backend = template.tokenizer.added_tokens_decoder, cast(Any, template.tokenizer).backend_tokenizer
    stream, pending = DecodeStream(skip_special_tokens=False), []
    for place, number in enumerate(dialogue.input_ids.tolist()):
        control = number in controls
        if pending and control:  # half a character in front of it, which no later token completes
            yield place - 1, backend.decode(pending, skip_special_tokens=False), False
            stream, pending = DecodeStream(skip_special_tokens=False), []
        text = stream.step(backend, number)
        if text is None:
            pending.append(number)
        else:
            yield place, text, control
            pending = []
    if pending:
        yield len(dialogue.input_ids) - 1, backend.decode(pending, skip_special_tokens=False), False


def _masked(pieces: list[tuple[int, str, bool]], offsets: list[int]) -> Iterator[tuple[int, str, bool]]:
    """The pieces, with private data masked turn by turn."""
    turn_of = {
        place: turn
        for turn, (start, end) in enumerate(itertools.pairwise([0, *offsets]))
        for place in range(start, end)
    }
    for _, group in itertools.groupby(pieces, key=lambda piece: turn_of[piece[0]]):
        turn = list(group)
        text = "".join(text for _, text, _ in turn)
        hidden, start = mask_private(text), 0
        for place, own, control in turn:
            yield place, hidden[start : start + len(own)], control
            start += len(own)
