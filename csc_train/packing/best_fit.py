"""Best-fit decreasing bin packing over lengths."""

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into packs of at most `capacity`, longest first, each into the fullest pack that still takes it.

    Deterministic: equal lengths keep their order. Runs in O(n log n) for the sort, plus one operation on a
    `capacity`-bit integer per item.

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
