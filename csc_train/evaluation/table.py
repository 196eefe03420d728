"""The predictions of one system in one context, as columns."""

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy

from csc_train.data.dialogue import Dialogue
from csc_train.errors import InputError
from csc_train.evaluation.metrics import lexical
from csc_train.files import digest
from csc_train.inference.predictions import Prediction

TextPairs = list[tuple[str, str]]


class PredictionTable:
    """Predicted turns, sorted by dialogue and turn.

    Attributes:
        predictions: the turns themselves.
        dialogue: int [turns], the dialogue of each, counted from 0.
        position: int [turns], the how many-th supporter turn of its dialogue each is, counted from 0.
        longest: supporter turns of the longest dialogue.
        last: bool [turns], whether it is the last predicted of its dialogue.
        whole: bool [turns], whether all supporter turns of its dialogue are there; turns that failed are not.
        predicted: int [turns], the strategy's number, 0 where none was read.
        reference: int [turns], the reference strategy's number.
    """

    def __init__(self, predictions: Sequence[Prediction], dialogues: Mapping[str, Dialogue] | None = None):
        """Sort the predictions.

        Args:
            dialogues: by id, those that were to be predicted. Where not given, they are taken to be `whole`.

        Raises:
            InputError: a turn is predicted twice, or is none of its dialogue's.
        """
        self.predictions = sorted(predictions, key=lambda each: (each.dialogue_id, each.turn))
        keys = self.keys
        for key, following in itertools.pairwise(keys):
            if key == following:
                raise InputError(f"dialogue {key[0]}, turn {key[1]} is predicted twice")
        names = numpy.array([dialogue for dialogue, _ in keys], dtype=object)
        first = numpy.append(True, names[1:] != names[:-1])[: len(names)].astype(bool)
        self.dialogue = numpy.cumsum(first) - 1
        counted = numpy.arange(len(names)) - numpy.flatnonzero(first)[self.dialogue]
        self.last = numpy.append(first[1:], True)[: len(names)]
        if dialogues is None:
            self.position, self.longest = counted, int(counted.max(initial=-1)) + 1
            self.whole = numpy.ones(len(names), bool)
        else:
            places = {
                (name, turn): place
                for name, each in dialogues.items()
                for place, turn in enumerate(each.supporter_turns)
            }
            if unknown := [key for key in keys if key not in places]:
                raise InputError(f"dialogue {unknown[0][0]} has no supporter turn {unknown[0][1]}, but it is predicted")
            self.position = numpy.array([places[key] for key in keys], int)
            self.longest = max(places.values(), default=-1) + 1
            expected = numpy.array([len(dialogues[name].supporter_turns) for name in names], int)
            self.whole = expected == numpy.bincount(self.dialogue)[self.dialogue]
        self.predicted = numpy.array([each.strategy or 0 for each in self.predictions], int)
        self.reference = numpy.array([each.reference_strategy for each in self.predictions], int)

    def __len__(self) -> int:
        return len(self.predictions)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(dialogue id, turn) of each."""
        return [(each.dialogue_id, each.turn) for each in self.predictions]

    def shuffled(self, seed: int) -> list[int]:
        """Indices of all turns in a random order, in which two turns stand whatever other turns there are."""
        hashes = [digest([seed, *key]) for key in self.keys]
        return sorted(range(len(self)), key=hashes.__getitem__)

    @property
    def predicts_strategy(self) -> bool:
        """Whether the system chose the strategies itself, so that their accuracy means something."""
        return all(each.predicts_strategy for each in self.predictions)

    @property
    def pairs(self) -> TextPairs:
        """(reply, reference reply) of each."""
        return [(each.response, each.reference_response) for each in self.predictions]

    @cached_property
    def words(self) -> list[lexical.TokenPair]:
        """The pairs in jieba words."""
        return lexical.word_pairs(self.pairs)

    @cached_property
    def rouge(self) -> numpy.ndarray:
        """float [turns]: ROUGE-L F1 on characters, white space left out, in percent."""
        return lexical.rouge_l([(lexical.characters(reply), lexical.characters(text)) for reply, text in self.pairs])

    @cached_property
    def correct(self) -> numpy.ndarray:
        """bool [turns]: whether the strategy is the reference's; one that was not read is wrong."""
        return self.predicted == self.reference
