"""Bin packing of items by their lengths: best-fit decreasing, and a tighter packer that fills bins exactly.

Both pack counts of lengths, not items: millions of dialogues have a few thousand lengths. Which item of a length goes
where is decided at the end, by the items' order.
"""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy

from csc_train.packing.ragged import Ragged, offsets_of

SUBSET_SIZES = (2, 3, 4)
"""Sizes of the subset that ends a pack; each is tried, since the best one depends on the lengths."""
MAX_ATTEMPTS = 32
"""Candidates for the longest item of a subset of three or more, before its sum is given up."""
CHUNK = 100_000
"""Lengths of a random order that are made Python numbers at a time."""


def best_fit_decreasing(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> Ragged:
    """Put items into packs, longest first, each into the fullest pack that has room for it.

    Deterministic: equal lengths keep their order. Costs a sort, and an operation on a `capacity`-bit integer for each
    run of packs with equal room that items of one length go into.

    Args:
        lengths: item lengths in tokens, each in 1..capacity.
        capacity: tokens in a pack.

    Returns:
        Packs of item indices, in order of creation; every index exactly once.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    lengths = _checked(lengths, capacity)
    # Room left -> runs of packs with exactly that room. The last run is filled first, from its first pack on.
    open_packs: dict[int, list[numpy.ndarray]] = {}
    rooms = 0  # bit r is set while a pack with room r is open, so the tightest fit is the lowest bit from `length` up
    slots, packs = [numpy.zeros(0, numpy.int64)], 0  # by item, longest first: its pack
    for length, left in sorted(_count(lengths).items(), reverse=True):
        while left:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                run = open_packs[room].pop()
            else:
                room = capacity
                run = numpy.arange(packs, packs - (-left // (capacity // length)))
                packs += len(run)
            whole = min(len(run), left // (room // length))
            rest = left % (room // length) if whole < len(run) else 0
            parts = [(run[:whole], room // length), (run[whole : whole + (rest > 0)], rest)]
            for part, times in parts:
                slots.append(part.repeat(times))
                left -= len(slots[-1])
            parts.append((run[whole + (rest > 0) :][::-1], 0))
            for part, times in parts:
                if len(part) and (now := room - times * length):
                    open_packs.setdefault(now, []).append(part[::-1])
                    rooms |= 1 << now
            if not open_packs.get(room):
                rooms &= ~(1 << room)
    slot_packs = numpy.concatenate(slots)
    items = (-lengths).argsort(kind="stable")[slot_packs.argsort(kind="stable")]
    return Ragged(items, offsets_of(numpy.bincount(slot_packs, minlength=packs)))


def subset_sum_packing(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> Ragged:
    """Put items into packs, in as few packs as a quick search finds.

    One pack at a time is filled: first with items that fit, then, once only a few more fit, with the few of all items
    left whose sum comes closest to the room. Among thousands of items with hundreds of lengths, some pair, triple or
    quadruple nearly always fills the room exactly. The most even pair is taken: on RoleCS-like lengths it left better
    items for the last packs than the most uneven one. With few distinct lengths, or two items per pack, the search can
    lose to best-fit decreasing, whose packs are then returned.

    A pack starts with random items or with the longest; on a tie, the random start wins. Random starts make packs
    alike. After longest starts, the first packs hold few long items and the last many short ones, so a global batch of
    a few packs is a poor sample; but with few items per pack, they leave better items for the last packs.

    Deterministic: the random order is fixed. Each step is a few operations on `capacity`-bit integers; subsets are
    remembered by the room that they fill, and packs that start with the longest items are repeated, until a length
    runs short. Items are never put back, so a sum that was missed once is never searched again, and all misses together
    cost at most one search for each sum up to `capacity`. A search that leaves more room unused than the best one is
    given up.

    Args:
        lengths: item lengths in tokens, each in 1..capacity.
        capacity: tokens in a pack.

    Returns:
        Packs of item indices; every index exactly once; never more packs than `best_fit_decreasing` makes.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    lengths = _checked(lengths, capacity)
    counts, fewest = _count(lengths), -(-int(lengths.sum()) // capacity)
    best, limit = None, len(lengths)  # packs that the next search may make
    searches = [(most, True) for most in reversed(SUBSET_SIZES)] + [(most, False) for most in (0, *SUBSET_SIZES)]
    for most, shuffled in searches:
        if best is not None and len(best) <= fewest:
            break
        if most:
            found = _LengthPool(counts, capacity, most, lengths if shuffled else lengths[:0]).packs(limit)
            found = found and _assign(lengths, found)
        else:
            found = best_fit_decreasing(lengths, capacity)
        if found is not None and len(found) <= limit:
            best, limit = found, len(found) - shuffled
    assert best is not None
    return best


def _checked(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> numpy.ndarray:
    """The lengths in the smallest type, which sorts fastest."""
    lengths = numpy.asarray(lengths, numpy.int64)
    for item in ((lengths < 1) | (lengths > capacity)).nonzero()[0].tolist():
        raise ValueError(f"item {item} has length {lengths[item]}; a pack takes 1 to {capacity}")
    return lengths.astype(numpy.min_scalar_type(capacity))


def _count(lengths: numpy.ndarray) -> dict[int, int]:
    """The number of items of each length."""
    counts = numpy.bincount(lengths)
    return {length: int(counts[length]) for length in counts.nonzero()[0].tolist()}


def _assign(lengths: numpy.ndarray, packs: Ragged) -> Ragged:
    """The items of packs of lengths: those of each length in their order."""
    items = numpy.empty(len(lengths), numpy.int64)
    items[packs.values.argsort(kind="stable")] = lengths.argsort(kind="stable")
    return Ragged(items, packs.offsets)


class _LengthPool:
    """The number of items not yet packed, by length. Bit n of a bit set of lengths stands for length n."""

    def __init__(self, counts: dict[int, int], capacity: int, most: int, starts: numpy.ndarray):
        """Take all items.

        Args:
            starts: lengths of all items, of which random ones start packs; empty to start with the longest.
        """
        self.capacity, self.most, self.counts = capacity, most, dict(counts)
        self.unused = -sum(length * count for length, count in counts.items())
        order = numpy.random.default_rng(0).permutation(starts)[::-1]
        chunks = (order[start : start + CHUNK].tolist() for start in range(0, len(order), CHUNK))
        self.order = itertools.chain.from_iterable(chunks)
        self.present = sum(1 << length for length in counts)
        self.mirrored = sum(1 << (capacity - length) for length in counts)  # bit n: length capacity - n is present
        # By number of items: a bit set of the sums not yet found impossible.
        self.sums = dict.fromkeys(range(2, most + 1), (2 << capacity) - 1)
        self.subsets: dict[int, list[int]] = {}  # by room: what `choose` found, while no length runs short
        self.shortest = min(counts, default=0)

    def packs(self, limit: int) -> Ragged | None:
        """Pack all items, as lengths; None once they cannot be in `limit` packs."""
        counts, most, taken, ends = self.counts, self.most, [], [0]
        unused = limit * self.capacity + self.unused  # room that may stay empty
        start = next(self.order, 0)
        while self.present:
            room = self.capacity
            while self.present and (room >= (most + 1) * self.shortest or len(taken) == ends[-1]):
                while start and not counts[start]:
                    start = next(self.order, 0)
                if 0 < start <= room:
                    length, start = start, next(self.order, 0)
                else:
                    length = _highest(self.present, room)
                taken.append(length)
                room -= length
                counts[length] -= 1
                if counts[length] < most:
                    self.note_shortage(length)
            while chosen := self.subsets.get(room) or self.choose(room):
                taken += chosen
                room -= sum(chosen)
                for length in chosen:
                    counts[length] -= 1
                    if counts[length] < most:
                        self.note_shortage(length)
            pack = taken[ends[-1] :]
            ends.append(len(taken))
            unused -= room
            if not start:
                # The same again, while no length runs short
                times = max(0, min((counts[length] - most) // used for length, used in Counter(pack).items()))
                taken += pack * times
                ends += range(ends[-1] + len(pack), len(taken) + 1, len(pack))
                unused -= room * times
                for length in pack:
                    counts[length] -= times
            if unused < 0:
                return None
        return Ragged(numpy.array(taken, numpy.min_scalar_type(self.capacity)), numpy.array(ends))

    def choose(self, room: int) -> list[int]:
        """The lengths of the best subset to put into the room; empty if no item fits."""
        longest = _highest(self.present, room)
        if longest < 1:
            return []
        best = [longest]
        for count in self.sums:
            while (total := _highest(self.sums[count], room)) > sum(best):
                if found := self.find(total, count):
                    best = found
                else:
                    self.sums[count] ^= 1 << total
        self.subsets[room] = best
        return best

    def find(self, total: int, count: int) -> list[int] | None:
        """`count` lengths with exactly this sum: the most even pair, or more items with the longest first."""
        if count == 2:
            half = (total + 1) // 2
            longer = (self.present & (self.mirrored >> (self.capacity - total))) >> half
            if longer & 1 and 2 * half == total and self.counts[half] < 2:
                longer ^= 1
            if not longer:
                return None
            first = half + (longer & -longer).bit_length() - 1
            return [first, total - first]
        first = total - (count - 1) * self.shortest
        for _ in range(MAX_ATTEMPTS):
            first = _highest(self.present, first)
            if first * count < total:
                return None
            rest = self.find(total - first, count - 1) if self.sums[count - 1] >> (total - first) & 1 else None
            if rest and all(self.counts[length] >= [first, *rest].count(length) for length in rest):
                return [first, *rest]
            first -= 1
        return None

    def note_shortage(self, length: int) -> None:
        """Forget what was found with more items of a length, and the length if none is left."""
        self.subsets.clear()
        if not self.counts[length]:
            self.present ^= 1 << length
            self.mirrored ^= 1 << (self.capacity - length)
            self.shortest = (self.present & -self.present).bit_length() - 1


def _highest(lengths: int, limit: int) -> int:
    """The greatest length in a bit set that is at most `limit`; -1 for none."""
    return (lengths & ((2 << limit) - 1)).bit_length() - 1 if limit >= 0 else -1
