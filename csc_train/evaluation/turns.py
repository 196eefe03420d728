"""The predictions of one system in one context, as columns."""

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy

from csc_train.errors import InputError
from csc_train.evaluation import lexical
from csc_train.evaluation.predictions import Prediction
from csc_train.files import digest

TextPairs = list[tuple[str, str]]


class Turns:
    """Predicted turns, sorted by dialogue and turn.

    Attributes:
        predictions: the turns themselves.
        dialogue: int [turns], the dialogue of each, counted from 0.
        position: int [turns], the how many-th supporter turn of its dialogue each is, counted from 0.
        last: bool [turns], whether it is the last predicted of its dialogue.
        predicted: int [turns], the strategy's number, 0 where none was read.
        reference: int [turns], the reference strategy's number.
    """

    def __init__(self, predictions: Sequence[Prediction]):
        """Sort the predictions.

        Raises:
            InputError: a turn is predicted twice.
        """
        self.predictions = sorted(predictions, key=lambda each: (each.dialogue_id, each.turn))
        keys = self.keys
        for key, following in itertools.pairwise(keys):
            if key == following:
                raise InputError(f"dialogue {key[0]}, turn {key[1]} is predicted twice")
        names = numpy.array([dialogue for dialogue, _ in keys], dtype=object)
        first = numpy.append(True, names[1:] != names[:-1])[: len(names)].astype(bool)
        self.dialogue = numpy.cumsum(first) - 1
        self.position = numpy.arange(len(names)) - numpy.flatnonzero(first)[self.dialogue]
        self.last = numpy.append(first[1:], True)[: len(names)]
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
