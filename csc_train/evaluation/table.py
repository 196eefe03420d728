"""The predictions of one system in one context, as columns."""

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version

import numpy

from csc_train.data.dialogue import Dialogue
from csc_train.data.languages import get_language
from csc_train.data.segmentation import segment_words, split_words
from csc_train.errors import InputError
from csc_train.evaluation.general import TextScore
from csc_train.files import digest
from csc_train.inference.predictions import Prediction

TextPair = tuple[str, str]


class TextCache:
    """What was computed from texts, for the tables that share it: those of a run have most texts in common.

    It grows with the distinct texts of the run and ends with it; nothing is computed twice, or for another run.
    """

    def __init__(self):
        self._functions: dict[Callable, Callable] = {}
        self._rows: dict[tuple[Callable, Callable | None], dict[TextPair, numpy.ndarray]] = {}

    def of(self, function: Callable) -> Callable:
        """`function`, which computes each distinct text once."""
        return self._functions.setdefault(function, functools.cache(function))

    def rows(self, function: Callable, pairs: Sequence[TextPair], prepare: Callable | None = None) -> numpy.ndarray:
        """float [pairs, ...]: `function` of pairs, a row of it for each; each distinct pair is computed once.

        Args:
            prepare: what `function` takes of each text of a pair, such as its words; defaults to the text.
        """
        known = self._rows.setdefault((function, prepare), {})
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        found = function([(prepare(one), prepare(other)) for one, other in new] if prepare else new)
        known.update(zip(new, found, strict=True))
        return numpy.array([known[pair] for pair in pairs]) if pairs else found

    def clear(self) -> None:
        """Forget everything."""
        self._functions.clear()
        self._rows.clear()


def _segment(text: str) -> list[str]:
    return [sys.intern(word) for word in segment_words(text)]  # texts share their words


class PredictionTable:
    """Predicted turns, sorted by dialogue and turn.

    Attributes:
        predictions: the turns themselves.
        dialogues: by id; None if not known.
        language: of the dialogues.
        cache: computes what metrics take of texts, each distinct one once.
        dialogue: int [turns], the dialogue of each turn, counted from 0.
        position: int [turns], the index of each turn among the supporter turns of its dialogue, from 0.
        longest: supporter turns of the longest dialogue.
        last: bool [turns], whether a turn is the last predicted one of its dialogue.
        whole: bool [turns], whether all supporter turns of the dialogue are predicted; failed turns are not.
        predicted: int [turns], the number of the predicted strategy; 0 if none was parsed.
        reference: int [turns], the number of the reference strategy.
        texts: the system's scores of general texts; None where another context's table has them.
    """

    NO_CHOICE = "this mode predicts no strategy"
    """Why metrics of strategies are n/a, unless `predicts_strategy`."""
    NO_DIALOGUES = "the run has no dialogues.jsonl"
    """Why metrics of what was said before a turn are n/a, if `dialogues` is None."""

    def __init__(
        self,
        predictions: Sequence[Prediction],
        dialogues: Mapping[str, Dialogue] | None = None,
        language: str = "zh",
        cache: TextCache | None = None,
    ):
        """Sort the predictions.

        Args:
            dialogues: by id, those to predict. Without them, every dialogue counts as `whole`.
            cache: that of the other tables of a run; defaults to one of its own.

        Raises:
            InputError: a turn is predicted twice, or is no supporter turn of its dialogue.
        """
        self.predictions = sorted(predictions, key=lambda each: each.key)
        self.dialogues, self.language = dialogues, language
        self.texts: Sequence[TextScore] | None = ()
        self.cache = cache or TextCache()
        keys = self.keys
        for key, following in itertools.pairwise(keys):
            if key == following:
                raise InputError(f"dialogue {key[0]}, turn {key[1]} is predicted twice")
        names = numpy.array([dialogue for dialogue, _ in keys], dtype=object)
        first = numpy.append(True, names[1:] != names[:-1])[: len(names)].astype(bool)
        self.dialogue = numpy.cumsum(first) - 1
        self.last = numpy.append(first[1:], True)[: len(names)]
        if dialogues is None:
            self.position = numpy.arange(len(names)) - numpy.flatnonzero(first)[self.dialogue]
            self.longest = int(self.position.max(initial=-1)) + 1
            self.whole = numpy.ones(len(names), bool)
        else:
            positions = {
                (name, turn): position
                for name, each in dialogues.items()
                for position, turn in enumerate(each.supporter_turns)
            }
            if unknown := [key for key in keys if key not in positions]:
                raise InputError(f"dialogue {unknown[0][0]} has no supporter turn {unknown[0][1]}, but it is predicted")
            self.position = numpy.array([positions[key] for key in keys], int)
            self.longest = max(positions.values(), default=-1) + 1
            expected = numpy.array([len(dialogues[name].supporter_turns) for name in names], int)
            self.whole = expected == numpy.bincount(self.dialogue)[self.dialogue]
        self.predicted = numpy.array([each.strategy or 0 for each in self.predictions], int)
        self.reference = numpy.array([each.reference_strategy for each in self.predictions], int)

    def __len__(self) -> int:
        return len(self.predictions)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(dialogue id, turn) of each turn."""
        return [each.key for each in self.predictions]

    def shuffled_indices(self, seed: int) -> list[int]:
        """Indices of all turns in a random order; the order of two turns does not depend on the other turns."""
        hashes = [digest([seed, *key]) for key in self.keys]
        return sorted(range(len(self)), key=hashes.__getitem__)

    @property
    def predicts_strategy(self) -> bool:
        """Whether the system chose the strategies itself."""
        return all(each.predicts_strategy for each in self.predictions)

    @property
    def pairs(self) -> list[TextPair]:
        """(reply, reference reply) of each turn."""
        return [(each.response, each.reference_response) for each in self.predictions]

    @property
    def segment(self) -> Callable[[str], list[str]]:
        """The words of a text; see `word_unit`."""
        return self.cache.of(split_words if self._spaced else _segment)

    @cached_property
    def words(self) -> list[tuple[list[str], list[str]]]:
        """`pairs` in words."""
        return [(self.segment(reply), self.segment(reference)) for reply, reference in self.pairs]

    def rows(self, function: Callable, prepare: Callable | None = None) -> numpy.ndarray:
        """See `TextCache.rows`, of `pairs`."""
        return self.cache.rows(function, self.pairs, prepare)

    @property
    def _spaced(self) -> bool:
        return get_language(self.language).spaced_words

    @property
    def word_unit(self) -> str:
        """What `words` are: of jieba, or where white space separates words of sacrebleu's tokenizer 13a."""
        return "words" if self._spaced else "jieba words"

    @property
    def segmenter(self) -> str:
        """What makes `words`, for signatures."""
        if self._spaced:
            return f"words in lower case by the tokenizer 13a of sacrebleu {version('sacrebleu')}"
        return f"jieba {version('jieba')} words"

    @cached_property
    def correct(self) -> numpy.ndarray:
        """bool [turns]: whether the strategy equals the reference's; an unparsed one is wrong."""
        return self.predicted == self.reference

    @cached_property
    def gold(self) -> "PredictionTable":
        """The same turns with the reference's strategies and replies as predictions."""
        predictions = [
            replace(
                each,
                strategy=each.reference_strategy,
                response=each.reference_response,
                predicts_strategy=True,
                context="reference",
            )
            for each in self.predictions
        ]
        return PredictionTable(predictions, self.dialogues, self.language, self.cache)


def align_tables(
    one: Sequence[Prediction],
    other: Sequence[Prediction],
    name: str,
    other_name: str,
    dialogues: Sequence[Mapping[str, Dialogue] | None] = (None, None),
    language: str = "zh",
    cache: TextCache | None = None,
) -> tuple[tuple[PredictionTable, PredictionTable], int]:
    """Two tables of the same turns in the same order, and the number of turns that only one of them has.

    Args:
        name, other_name: what errors call the two.
        dialogues: of each side, by id; None if not known.
        language: of the dialogues.
        cache: of the two; defaults to one that they share.

    Raises:
        InputError: the references of a turn differ, or a turn is predicted twice.
    """
    cache = cache or TextCache()
    keys = [{each.key for each in side} for side in (one, other)]
    shared = keys[0] & keys[1]
    left, right = (
        PredictionTable([each for each in side if each.key in shared], known, language, cache)
        for side, known in zip((one, other), dialogues, strict=True)
    )
    for first, second in zip(left.predictions, right.predictions, strict=True):
        references = {(each.reference_strategy, each.reference_response) for each in (first, second)}
        if len(references) > 1:
            place = f"turn {first.turn} of dialogue {first.dialogue_id}"
            raise InputError(f"{name} and {other_name}: the references of {place} differ: evaluate the same dialogues")
    return (left, right), len(keys[0] ^ keys[1])
