"""Bin packing of lengths: three greedy rules, and the smallest number of bins."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence

from ..core.errors import ConfigError, DoesNotFit

# What the exact search may be asked, and how many partial packings it looks at.
LARGEST_OPTIMAL = 64
_SEARCHED = 200_000


def pack(
    lengths: Sequence[int],
    capacity: int | None = None,
    method: str = "bfd",
    max_rows: int | None = None,
) -> list[list[int]]:
    """Distribute items over bins of one capacity.

    All greedy rules take the items in decreasing order of length (ties: as given). Source:
    arXiv 2404.09529, section 3; its greedy rule is "least_loaded", its integer program "optimal".

    Args:
        lengths: Tokens of each item, >= 1.
        capacity: Tokens that a bin holds; the longest item by default.
        method: "bfd" puts an item where it leaves the least room, "ffd" into the first bin with
            room, "least_loaded" into the emptiest bin if it has room; each opens a bin
            otherwise. "optimal" uses as few bins as possible and takes at most 64 items.
        max_rows: Bins that may be opened; as many as needed by default.

    Returns:
        The items' indices, bin by bin. Every index appears once.

    Raises:
        ConfigError: An unknown method, an item without tokens or above the capacity, or too
            many items for "optimal".
        DoesNotFit: More bins are needed than `max_rows`, or the search for the optimum did not
            end.
    """
    if method not in _METHODS:
        raise ConfigError(f"method = {method!r} packs nothing", f"use {', '.join(_METHODS)}")
    sizes = [int(length) for length in lengths]
    if not sizes:
        return []
    room = max(sizes) if capacity is None else capacity
    for index, size in enumerate(sizes):
        if size < 1:
            raise ConfigError(f"item {index} is empty", "leave empty sequences out")
        if size > room:
            raise ConfigError(
                f"item {index} has {size} tokens, a row holds {room}",
                "cut it, or raise the capacity",
            )
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    bins = _METHODS[method](sizes, order, room)
    if max_rows is not None and len(bins) > max_rows:
        raise DoesNotFit(
            f"{len(sizes)} items need {len(bins)} rows of {room} tokens, max_rows = {max_rows}",
            "raise the capacity or max_rows, or pack fewer items at once",
        )
    return bins


def _best_fit(sizes: list[int], order: list[int], room: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), in increasing order
    for item in order:
        at = bisect_left(free, (sizes[item], -1))
        if at == len(free):
            left, chosen = room, len(bins)
            bins.append([])
        else:
            left, chosen = free.pop(at)
        bins[chosen].append(item)
        insort(free, (left - sizes[item], chosen))
    return bins


def _first_fit(sizes: list[int], order: list[int], room: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for item in order:
        chosen = next((b for b, left in enumerate(free) if left >= sizes[item]), len(bins))
        if chosen == len(bins):
            bins.append([])
            free.append(room)
        bins[chosen].append(item)
        free[chosen] -= sizes[item]
    return bins


def _least_loaded(sizes: list[int], order: list[int], room: int) -> list[list[int]]:
    bins: list[list[int]] = []
    loads: list[tuple[int, int]] = []
    for item in order:
        if loads and loads[0][0] + sizes[item] <= room:
            load, chosen = heapq.heappop(loads)
        else:
            load, chosen = 0, len(bins)
            bins.append([])
        bins[chosen].append(item)
        heapq.heappush(loads, (load + sizes[item], chosen))
    return bins


def _optimal(sizes: list[int], order: list[int], room: int) -> list[list[int]]:
    """Fewer and fewer bins, from best fit down to the bound that no packing beats."""
    if len(sizes) > LARGEST_OPTIMAL:
        raise ConfigError(
            f"the optimum of {len(sizes)} items is not searched for",
            f'pack at most {LARGEST_OPTIMAL} items at once, or use method="bfd"',
        )
    best = _best_fit(sizes, order, room)
    least = -(-sum(sizes) // room)
    while len(best) > least:
        fewer = _Completion(sizes, room, (len(best) - 1) * room - sum(sizes)).search(order)
        if fewer is None:
            break
        best = fewer
    return best


class _Completion:
    """Depth-first search that fills one bin after the other, each with the longest item left.

    Args:
        sizes: Length of each item.
        room: Capacity of a bin.
        waste: Room that all bins together may leave empty.
    """

    def __init__(self, sizes: list[int], room: int, waste: int) -> None:
        self.sizes, self.room, self.waste = sizes, room, waste
        self.failed: set[tuple[int, ...]] = set()
        self.looked = 0

    def search(self, order: list[int]) -> list[list[int]] | None:
        """A packing that wastes no more than allowed, or None if there is none."""
        return self._bins(order, self.waste)

    def _bins(self, items: list[int], waste: int) -> list[list[int]] | None:
        if not items:
            return []
        state = (waste, *(self.sizes[i] for i in items))
        if state in self.failed:
            return None
        head, rest = items[0], items[1:]
        for chosen in self._fillings(rest, 0, self.room - self.sizes[head], waste):
            taken = set(chosen)
            empty = self.room - self.sizes[head] - sum(self.sizes[i] for i in chosen)
            found = self._bins([i for i in rest if i not in taken], waste - empty)
            if found is not None:
                return [[head, *chosen], *found]
        self.failed.add(state)
        return None

    def _fillings(self, items: list[int], at: int, left: int, waste: int) -> Iterator[list[int]]:
        """Sets of items, the longest first, that leave at most `waste` of `left` empty."""
        self.looked += 1
        if self.looked > _SEARCHED:
            raise DoesNotFit(
                f"the optimum was not found among {_SEARCHED:,} partial packings",
                'use method="bfd", or pack fewer items at once',
            )
        previous = 0
        for index in range(at, len(items)):
            size = self.sizes[items[index]]
            # An equally long item in the same place gives the same packing.
            if size > left or size == previous:
                continue
            previous = size
            for more in self._fillings(items, index + 1, left - size, waste):
                yield [items[index], *more]
        if left <= waste:
            yield []


_METHODS: dict[str, Callable[[list[int], list[int], int], list[list[int]]]] = {
    "bfd": _best_fit,
    "ffd": _first_fit,
    "least_loaded": _least_loaded,
    "optimal": _optimal,
}
