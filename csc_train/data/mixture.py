"""Mix several sources of training dialogues: how often an epoch goes over each dialogue of each source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from csc_train.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """The sources of the training dialogues, and their parts of an epoch.

    Attributes:
        names: of the sources.
        weights: their shares of an epoch, in any unit; None if `epochs` says how often each is seen.
        epochs: how many times an epoch of the training goes over each source.
        unit: what is shared out, "tokens" or "dialogues".
        members: by a dialogue's id, its source and a number in [0, 1) that was drawn for it.
    """

    names: Sequence[str]
    weights: Sequence[float] | None
    epochs: Sequence[float]
    unit: str
    members: Mapping[str, tuple[int, float]]

    def choose(self, ids: Sequence[str], tokens: Sequence[int]) -> list[int]:
        """The dialogues of an epoch, as indices into `ids`, with repeats; in the order of `ids`, repeats together.

        A source whose part is no whole number of passes repeats those dialogues once more, or leaves those out, that
        were drawn for it. Its part misses the wanted one by at most half a dialogue.

        Args:
            ids: of the dialogues that training can take.
            tokens: of their turns.

        Raises:
            InputError: a source has no dialogue among them, or its part is less than one.
        """
        sources = numpy.array([self.members[each][0] for each in ids])
        drawn = numpy.array([self.members[each][1] for each in ids])
        sizes = numpy.asarray(tokens) if self.unit == "tokens" else numpy.ones(len(ids), int)
        totals = numpy.bincount(sources, sizes, minlength=len(self.names))
        if not totals.all():
            name = self.names[int(totals.argmin())]
            raise InputError(
                f"data.mix: no dialogue of {name} fits packing.max_length: raise it, or take {name} out of the mix"
            )
        passes = numpy.array(self.epochs, float)
        if self.weights is not None:
            passes = totals.sum() * numpy.array(self.weights) / sum(self.weights) / totals
        times = numpy.floor(passes).astype(int)[sources]
        for source, name in enumerate(self.names):
            own = numpy.flatnonzero(sources == source)
            own = own[numpy.argsort(drawn[own], kind="stable")]
            rest = (passes[source] % 1) * totals[source]
            reached = numpy.concatenate([[0], sizes[own].cumsum()])
            times[own[: int(numpy.abs(reached - rest).argmin())]] += 1
            if not times[own].any():
                measure = "epochs" if self.weights is None else "weight"
                raise InputError(
                    f"data.mix: the part of {name} in an epoch is less than one dialogue: raise its {measure}"
                )
        return numpy.repeat(numpy.arange(len(ids)), times).tolist()
