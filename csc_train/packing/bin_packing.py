"""Bin packing of items by their lengths: best-fit decreasing, and a tighter packer that fills bins exactly."""

from collections.abc import Sequence

import numpy

SUBSET_SIZES = (2, 3, 4)
"""Sizes of the subset that ends a pack; each is tried, since the best one depends on the lengths."""
MAX_ATTEMPTS = 32
"""Candidates for the longest item of a subset of three or more, before its sum is given up."""


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into packs, longest first, each into the fullest pack that has room for it.

    Deterministic: equal lengths keep their order. Costs a sort, and one operation on a `capacity`-bit integer per item.

    Args:
        lengths: item lengths in tokens, each in 1..capacity.
        capacity: tokens in a pack.

    Returns:
        Packs of item indices, in order of creation; every index exactly once.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> packs with exactly that room
    rooms = 0  # bit r is set while a pack with room r is open, so the tightest fit is the lowest bit from `length` up
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = int(lengths[item])
        if not 1 <= length <= capacity:
            raise ValueError(f"item {item} has length {length}; a pack takes 1 to {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[room].pop()
            if not open_packs[room]:
                rooms ^= 1 << room
            packs[pack].append(item)
        else:
            room, pack = capacity, len(packs)
            packs.append([item])
        room -= length
        if room:
            open_packs.setdefault(room, []).append(pack)
            rooms |= 1 << room
    return packs


def subset_sum_packing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into packs, in as few packs as a quick search finds.

    One pack at a time is filled: first with items that fit, then, once only a few more fit, with the few of all items
    left whose sum comes closest to the room. Among thousands of items with hundreds of lengths, some pair, triple or
    quadruple nearly always fills the room exactly. The most even pair is taken: on RoleCS-like lengths it left better
    items for the last packs than the most uneven one. With few distinct lengths, or two items per pack, the search can
    lose to best-fit decreasing, whose packs are then returned.

    A pack starts with random items or with the longest; on a tie, the random start wins. Random starts make packs
    alike. After longest starts, the first packs hold few long items and the last many short ones, so a global batch of
    a few packs is a poor sample; but with few items per pack, they leave better items for the last packs.

    Deterministic: the random order is fixed. Each step is a few operations on `capacity`-bit integers. Items are never
    put back, so a sum that was missed once is never searched again, and all misses together cost at most one search for
    each sum up to `capacity`.

    Args:
        lengths: item lengths in tokens, each in 1..capacity.
        capacity: tokens in a pack.

    Returns:
        Packs of item indices; every index exactly once; never more packs than `best_fit_decreasing` makes.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    packs = best_fit_decreasing(lengths, capacity)
    fewest = -(-sum(map(int, lengths)) // capacity)
    for shuffled in (False, True):
        for most in SUBSET_SIZES:
            if shuffled or len(packs) > fewest:
                packs = min(_ItemPool(lengths, capacity, most, shuffled).packs(), packs, key=len)
    return packs


class _ItemPool:
    """The items not yet packed, by length. Bit n of a bit set of lengths stands for length n."""

    def __init__(self, lengths: Sequence[int], capacity: int, most: int, shuffled: bool):
        self.capacity, self.most = capacity, most
        # Lengths that start packs, the next one last; empty to start with the longest.
        self.order = numpy.random.default_rng(0).permutation(numpy.asarray(lengths, int)).tolist() if shuffled else []
        self.items: dict[int, list[int]] = {}
        for item in reversed(range(len(lengths))):
            self.items.setdefault(int(lengths[item]), []).append(item)
        self.present = sum(1 << length for length in self.items)
        self.mirrored = sum(1 << (capacity - length) for length in self.items)  # bit n: length capacity - n is present
        # By number of items: a bit set of the sums not yet found impossible.
        self.sums = dict.fromkeys(range(2, most + 1), (2 << capacity) - 1)

    def packs(self) -> list[list[int]]:
        """Pack all items."""
        packs = []
        while self.present:
            pack, room = [], self.capacity
            while chosen := self.choose(room, whole=not pack):
                for length in chosen:
                    pack.append(self.take(length))
                room -= sum(chosen)
            packs.append(pack)
        return packs

    def choose(self, room: int, whole: bool) -> list[int]:
        """Lengths to put into the room: one item while more than `most` fit, then the best subset."""
        longest = _highest(self.present, room)
        shortest = (self.present & -self.present).bit_length() - 1
        if longest < 1:
            return []
        if whole or room >= (self.most + 1) * shortest:
            while self.order and not self.items[self.order[-1]]:
                self.order.pop()
            return [self.order.pop() if self.order and self.order[-1] <= room else longest]
        best = [longest]
        for count in self.sums:
            while (total := _highest(self.sums[count], room)) > sum(best):
                if found := self.find(total, count):
                    best = found
                else:
                    self.sums[count] ^= 1 << total
        return best

    def find(self, total: int, count: int) -> list[int] | None:
        """`count` lengths with exactly this sum: the most even pair, or more items with the longest first."""
        if count == 2:
            half = (total + 1) // 2
            longer = (self.present & (self.mirrored >> (self.capacity - total))) >> half
            if longer & 1 and 2 * half == total and len(self.items[half]) < 2:
                longer ^= 1
            if not longer:
                return None
            first = half + (longer & -longer).bit_length() - 1
            return [first, total - first]
        shortest = (self.present & -self.present).bit_length() - 1
        first = total - (count - 1) * shortest
        for _ in range(MAX_ATTEMPTS):
            first = _highest(self.present, first)
            if first * count < total:
                return None
            rest = self.find(total - first, count - 1) if self.sums[count - 1] >> (total - first) & 1 else None
            if rest and all(len(self.items[length]) >= [first, *rest].count(length) for length in rest):
                return [first, *rest]
            first -= 1
        return None

    def take(self, length: int) -> int:
        """Remove and return the first item of this length."""
        item = self.items[length].pop()
        if not self.items[length]:
            self.present ^= 1 << length
            self.mirrored ^= 1 << (self.capacity - length)
        return item


def _highest(lengths: int, limit: int) -> int:
    """The greatest length in a bit set that is at most `limit`; -1 for none."""
    return (lengths & ((2 << limit) - 1)).bit_length() - 1 if limit >= 0 else -1
