"""Which sample goes into which micro-batch: as few as the token budget allows, as many on every data-parallel rank.

ffd: first fit decreasing, AReaL's algorithm 1, and where that is not surely the fewest, bins filled one by one.
karmarkar_karp: bins of equal cost: the longest micro-batch then holds up no
other rank and no pipeline stage. Cost is the FLOPs of forward and backward, n (1 + n / attention_length)
for a sequence of n tokens: attention_length is where attention costs as much as the matrix products.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_async_rl.errors import DataError

_SEARCHED = 512  # sequences at most: among more, the one bin that a search may save is less than half a percent
_SEARCH_STEPS = 1 << 14  # for all bins together: some 20 ms


def fewest_bins(lengths: Sequence[int], capacity: int) -> int:
    """No packing needs fewer: what the tokens fill, and the sequences of which no two share a bin."""
    return max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))


def allocate(lengths: Sequence[int], capacity: int, min_bins: int = 1) -> list[list[int]]:
    """Indices into `lengths`, in bins whose lengths add up to at most `capacity`, few of them but at least `min_bins`.

    Fewer than `min_bins` come back only where there are fewer sequences.
    """
    bins = first_fit(lengths, capacity, min_bins)
    if len(bins) > max(min_bins, fewest_bins(lengths, capacity)) and len(lengths) <= _SEARCHED:
        denser = fill_one_by_one(lengths, capacity)
        if min_bins <= len(denser) < len(bins):
            return denser
    return bins


def fill_one_by_one(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each bin: the longest that is left, and of the others a set that leaves little room, by a bounded depth-first search.

    (The minimum bin slack heuristic: J. N. D. Gupta, J. C. Ho, Production Planning & Control 10 (6), 1999.)
    """
    left = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    steps = max(16, _SEARCH_STEPS // max(1, len(left)))
    bins = []
    while left:
        negative = [-lengths[n] for n in left]  # ascending, for bisect
        chosen, room, start = [0], capacity + negative[0], 1
        best, least = [0], room
        for _ in range(steps):
            fits = max(start, bisect.bisect_left(negative, -room))  # the longest that does
            if fits < len(left):
                chosen.append(fits)
                room += negative[fits]
                start = fits + 1
                continue
            if room < least:
                best, least = chosen.copy(), room
            if not least or len(chosen) == 1:
                break
            start = chosen.pop() + 1  # without it
            room -= negative[start - 1]
        if room < least:
            best = chosen
        bins.append([left[i] for i in best])
        taken = set(best)
        left = [n for i, n in enumerate(left) if i not in taken]
    return bins


def first_fit(lengths: Sequence[int], capacity: int, min_bins: int = 1) -> list[list[int]]:
    """First fit decreasing: indices into `lengths`, in bins whose lengths add up to at most `capacity`.

    Longest first; a new bin while there are fewer than `min_bins` or where none fits, else the fitting bin with the
    fewest sequences. Fewer than `min_bins` come back only where there are fewer sequences.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if lengths[n] > capacity:
            raise DataError(
                f"a sample of {lengths[n]} tokens exceeds trainer.max_tokens_per_microbatch = {capacity}; raise it to at "
                "least model.context_tokens"
            )
        fitting = [b for b in range(len(bins)) if loads[b] + lengths[n] <= capacity]
        if len(bins) < min_bins or not fitting:
            bins.append([])
            loads.append(0)
            fitting = [len(bins) - 1]
        chosen = min(fitting, key=lambda b: len(bins[b]))
        bins[chosen].append(n)
        loads[chosen] += lengths[n]
    return bins


def cost(length: int, attention_length: float) -> float:
    """FLOPs of a sequence, in those of one token without attention."""
    return length * (1 + length / attention_length)


def karmarkar_karp(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Largest differencing: indices into `costs`, in `bins` bins of sums as equal as it finds; some may be empty.

    (N. Karmarkar, R. M. Karp, "The differencing method of set partitioning", 1982.) Each item begins as a partition of its
    own; the two partitions with the largest spreads are merged, the heaviest bin of one with the lightest of the other.
    """
    tie = itertools.count()  # partitions of equal spread are not compared further
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for n, c in enumerate(costs):
        heap.append((-c, next(tie), [(c, [n])] + [(0.0, []) for _ in range(bins - 1)]))
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [
            (a + b, items + others)
            for (a, items), (b, others) in zip(first, reversed(second), strict=True)
        ]  # first is heaviest first, and second turned round
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], next(tie), merged))
    return [items for _, items in heap[0][2]] if heap else [[] for _ in range(bins)]


def allocate_even(
    lengths: Sequence[int], capacity: int, min_bins: int = 1, *, attention_length: float
) -> list[list[int]]:
    """Bins of equal cost under the budget, each longest first: the fewest, from what first fit decreasing needs upwards.

    Equal FLOPs means more tokens in the bins of short samples, so that it takes more bins, some 5 % on a
    long-tailed mix; a batch that does not come out even in twice as many is packed by first fit decreasing.
    """
    fewest = len(allocate(lengths, capacity))
    costs = [cost(n, attention_length) for n in lengths]
    for count in range(max(fewest, min_bins, 1), max(2 * fewest, min_bins) + 1):
        even = karmarkar_karp(costs, count)
        if all(sum(lengths[n] for n in bin_) <= capacity for bin_ in even):
            return [sorted(bin_, key=lambda n: -lengths[n]) for bin_ in even]
    return allocate(lengths, capacity, min_bins)


def agree_on_bins(
    lengths: Sequence[int],
    capacity: int,
    group: dist.ProcessGroup,
    device: torch.device,
    divisor: int = 1,
    method: Callable[[Sequence[int], int, int], list[list[int]]] = allocate,
) -> list[list[int]]:
    """`method`'s, with as many bins on every rank of `group`: a multiple of `divisor`, at least one; some may be empty."""
    bins = method(lengths, capacity, 1) or [[]]
    while True:
        # One number tells both the largest and, negated, the smallest count.
        count = torch.tensor([len(bins), -len(bins)], device=device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
        most, least = int(count[0]), -int(count[1])
        if most == least and most % divisor == 0:
            return bins
        most = -(-most // divisor) * divisor
        bins = method(lengths, capacity, most)
        bins += [[] for _ in range(most - len(bins))]
