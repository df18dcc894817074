"""Chooses which samples share a micro-batch: few micro-batches, equally many on every rank.

trainer.packing selects the method:

    ffd             first fit decreasing (algorithm 1 of AReaL), improved by a bounded search
    karmarkar_karp  micro-batches of equal cost, so that no rank and no pipeline stage waits for one

The cost of a sequence of n tokens is its FLOPs, forward and backward, in units of one token without
attention: n (1 + n / attention_length).
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_async_rl.errors import DataError

_MAX_SEARCHED = 512  # sequences; with more, the one bin that a search may save is under 0.5 percent
_SEARCH_STEPS = 1 << 14  # for all bins together: about 20 ms


def fewest_bins(lengths: Sequence[int], capacity: int) -> int:
    """Returns a lower bound on the number of bins."""
    # The tokens have to fit; and two sequences of more than half a bin cannot share one.
    return max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))


def allocate(lengths: Sequence[int], capacity: int, min_bins: int = 1) -> list[list[int]]:
    """Returns bins of indices into `lengths`, each of at most `capacity` tokens in total.

    Few bins, but at least `min_bins`, or as many as there are sequences where those are fewer.
    """
    bins = first_fit_decreasing(lengths, capacity, min_bins)
    if len(bins) > max(min_bins, fewest_bins(lengths, capacity)) and len(lengths) <= _MAX_SEARCHED:
        denser = minimum_bin_slack(lengths, capacity)
        if min_bins <= len(denser) < len(bins):
            return denser
    return bins


def minimum_bin_slack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns bins filled one after another, each with a bounded depth-first search.

    A bin gets the longest remaining sequence and those others that leave the least room.
    Source: J. N. D. Gupta, J. C. Ho, Production Planning & Control 10 (6), 1999.
    """
    left = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    steps = max(16, _SEARCH_STEPS // max(1, len(left)))
    bins = []
    while left:
        negative = [-lengths[n] for n in left]  # ascending, for bisect
        chosen, room, start = [0], capacity + negative[0], 1
        best, least = [0], room
        for _ in range(steps):
            fits = max(start, bisect.bisect_left(negative, -room))  # the longest that fits
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


def first_fit_decreasing(
    lengths: Sequence[int], capacity: int, min_bins: int = 1
) -> list[list[int]]:
    """Returns bins as `allocate` does, without its search.

    Longest sequence first. It opens a new bin if there are fewer than `min_bins` or it fits into
    none, else it joins the bin with the fewest sequences. Raises DataError if a sequence is longer
    than `capacity`.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if lengths[n] > capacity:
            raise DataError(
                f"a sample of {lengths[n]} tokens exceeds trainer.max_tokens_per_microbatch = "
                f"{capacity}; raise it to at least model.context_tokens"
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
    """Returns the FLOPs of a sequence in units of one token without attention.

    `attention_length`: the length at which attention doubles them (model/flops.py).
    """
    return length * (1 + length / attention_length)


def karmarkar_karp(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Returns `bins` bins of indices into `costs` with nearly equal sums; some may be empty.

    Largest differencing method: each item begins as a partition of its own. The two partitions with
    the largest spreads are merged, the heaviest bin of one with the lightest of the other.
    Source: N. Karmarkar, R. M. Karp, "The differencing method of set partitioning", 1982.
    """
    tie = itertools.count()  # orders partitions of equal spread in the heap
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for n, c in enumerate(costs):
        heap.append((-c, next(tie), [(c, [n])] + [(0.0, []) for _ in range(bins - 1)]))
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [
            (a + b, items + others)
            for (a, items), (b, others) in zip(first, reversed(second), strict=True)
        ]  # from the heaviest of the first and the lightest of the second
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], next(tie), merged))
    return [items for _, items in heap[0][2]] if heap else [[] for _ in range(bins)]


def allocate_balanced(
    lengths: Sequence[int], capacity: int, min_bins: int = 1, *, attention_length: float
) -> list[list[int]]:
    """Returns bins as `allocate` does, of equal cost, each longest sequence first.

    Takes the smallest number of bins, from that of `allocate` up, in which balanced bins keep
    within `capacity`. Equal cost puts more tokens into the bins of short samples and so takes more
    bins, about 5 % on a long-tailed mix. Falls back to `allocate` if twice as many do not suffice.
    """
    fewest = len(allocate(lengths, capacity))
    costs = [cost(n, attention_length) for n in lengths]
    for count in range(max(fewest, min_bins, 1), max(2 * fewest, min_bins) + 1):
        balanced = karmarkar_karp(costs, count)
        if all(sum(lengths[n] for n in bin_) <= capacity for bin_ in balanced):
            return [sorted(bin_, key=lambda n: -lengths[n]) for bin_ in balanced]
    return allocate(lengths, capacity, min_bins)


def agree_on_bins(
    allocate_bins: Callable[[int], list[list[int]]],
    group: dist.ProcessGroup,
    device: torch.device,
    multiple: int = 1,
) -> list[list[int]]:
    """Returns bins, equally many on every rank of `group`; collective over it.

    `allocate_bins(min_bins)` returns this rank's bins. Their number becomes a multiple of
    `multiple`; some bins may be empty.
    """
    bins = allocate_bins(1) or [[]]
    while True:
        # One reduction finds both the largest count and, negated, the smallest.
        count = torch.tensor([len(bins), -len(bins)], device=device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
        most, least = int(count[0]), -int(count[1])
        if most == least and most % multiple == 0:
            return bins
        most = -(-most // multiple) * multiple
        bins = allocate_bins(most)
        bins += [[] for _ in range(most - len(bins))]
