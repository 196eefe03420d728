"""Bin packing over lengths that ends each pack with the best small subset."""

from collections.abc import Sequence

import numpy

from csc_train.packing.best_fit import best_fit_decreasing

MAX_SUBSETS = (2, 3, 4)
"""How many items may end a pack; each is tried, since which serves best depends on the lengths."""
MAX_ATTEMPTS = 32
"""Items tried as the longest of three or more before their sum is given up."""


def subset_sum_packing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into packs of at most `capacity`, in as few packs as a quick search finds.

    Best-fit decreasing lets a room wait for the item that happens to come: long items meet long ones, and the short
    ones left at the end fill few of those rooms well. Here one pack at a time is filled (issue 3, "A tighter packer"):
    items that fit, until the room takes only a few more, then those few, out of all that are left, whose sum comes
    closest to the room. Among thousands of items with hundreds of lengths some pair, triple or quadruple nearly always
    meets the room exactly, so that packs are full until little is left. Of pairs the most even is taken: on RoleCS-like
    lengths this left better items for the end than the most uneven one. Where few sums meet the room, as with few
    lengths or two items a pack, the search can lose to best-fit decreasing, whose packs are then returned.

    A pack is begun with random items, or with the longest. Random ones make packs alike: with the longest, the first
    packs hold few long items and the last many short ones, so that packs cost unlike work and a step of a few packs is
    a poor sample. With few items a pack, the longest first leave better ones for the end. Of ways that make as few
    packs a random one is taken.

    Deterministic: the random order is a fixed one. A step is a few operations on `capacity`-bit integers. Items are
    only taken, never put back, so a sum looked for in vain is not looked for again: all misses together cost at most
    one search for each sum up to `capacity`, and otherwise the time grows with the number of items.

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
        for most in MAX_SUBSETS:
            if shuffled or len(packs) > fewest:
                packs = min(_ItemPool(lengths, capacity, most, shuffled).packs(), packs, key=len)
    return packs


class _ItemPool:
    """The items not yet packed, by length. In a bit set of lengths, bit n stands for length n."""

    def __init__(self, lengths: Sequence[int], capacity: int, most: int, shuffled: bool):
        self.capacity, self.most = capacity, most
        # The lengths that begin packs where it is not the longest, the next one last.
        self.order = numpy.random.default_rng(0).permutation(numpy.asarray(lengths, int)).tolist() if shuffled else []
        self.items: dict[int, list[int]] = {}
        for item in reversed(range(len(lengths))):
            self.items.setdefault(int(lengths[item]), []).append(item)
        self.present = sum(1 << length for length in self.items)
        self.mirrored = sum(1 << (capacity - length) for length in self.items)  # bit n: length capacity - n is present
        # By number of items: sums that they may have. All at first; what is found impossible is struck off.
        self.sums = dict.fromkeys(range(2, most + 1), (2 << capacity) - 1)

    def packs(self) -> list[list[int]]:
        """Pack the whole stock."""
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
        """Lengths to put into the room: the next of the order or else the longest that fits, or, where at most `most`
        fit, the best few."""
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
        """`count` lengths with exactly this sum: of pairs the most even one, of more items the longest first."""
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
        """Take the first item of this length out of the stock."""
        item = self.items[length].pop()
        if not self.items[length]:
            self.present ^= 1 << length
            self.mirrored ^= 1 << (self.capacity - length)
        return item


def _highest(lengths: int, limit: int) -> int:
    """The greatest length of a bit set that is at most `limit`; -1 if none."""
    return (lengths & ((2 << limit) - 1)).bit_length() - 1 if limit >= 0 else -1
