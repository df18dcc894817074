"""Collects the experts that the engine chose for the tokens of a sample (model/routing.py).

SGLang returns the experts of the positions that a request computed or found in its prefix cache,
except for the last token, which it has sampled but not computed. A request after an interruption
asks only for the positions that no earlier one has returned: a token keeps the experts of the pass
that sampled it, although the engine prefills it again under the new weights.
"""

from __future__ import annotations

import msgspec
import numpy as np

from megatron_async_rl.errors import EngineError
from megatron_async_rl.model.routing import Routing
from megatron_async_rl.protocol.types import Partial, Sample


class CallExperts:
    """The experts of the positions of one call of `policy.generate`, while it grows."""

    def __init__(self, routing: Routing, known: np.ndarray | None = None) -> None:
        """`known`: [positions, width] of the first tokens of the call's input."""
        self._routing = routing
        self._parts = [np.empty((0, routing.width), routing.dtype) if known is None else known]

    @property
    def num_known(self) -> int:
        """Number of positions with known experts; the next request asks for the later ones."""
        return sum(map(len, self._parts))

    def add(self, returned: np.ndarray | None, num_tokens: int) -> None:
        """Adds the experts that a request returned; it ended with `num_tokens` tokens in all.

        None changes nothing: the request was aborted in the queue. Raises EngineError if they are
        not those of the missing positions, or not of this model.
        """
        if returned is None:
            return
        routing = self._routing
        missing = (num_tokens - 1 - self.num_known) * routing.width
        if len(returned) < missing or len(returned) % routing.width:
            raise EngineError(
                f"the server returned {len(returned)} experts, needed are {missing}: "
                f"{routing.width} for each position ({routing.num_layers} layers x {routing.top_k})"
            )
        returned = returned[len(returned) - missing :]
        if missing and not 0 <= returned.min() <= returned.max() < routing.num_experts:
            raise EngineError(
                f"the server returned experts {returned.min()} to {returned.max()}, the model has "
                f"{routing.num_experts}"
            )
        self._parts.append(returned.astype(routing.dtype).reshape(-1, routing.width))

    def positions(self) -> np.ndarray:
        """Returns [num_known, width]."""
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def of_tokens(self, num_tokens: int) -> np.ndarray:
        """Returns the experts beside the first tokens, as in a Sample; 0 where not known."""
        beside = np.zeros((num_tokens, self._routing.width), self._routing.dtype)
        known = self.positions()[: num_tokens - 1]
        beside[1 : len(known) + 1] = known
        return beside.reshape(-1)


class SampleExperts:
    """The experts of all calls of one sample."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._calls: list[tuple[np.ndarray, CallExperts]] = []

    def begin(self, ids: list[int], partial: Partial | None) -> CallExperts:
        """Returns the experts known for a call: those of its partial sample, or of its context."""
        width = self._routing.width
        if partial and len(partial.experts) == len(partial.ids) * width:
            known = partial.experts.reshape(-1, width)[1:]
            chosen = np.flatnonzero(known.any(axis=1))  # the last ones may be missing
            return CallExperts(self._routing, known[: chosen.max(initial=-1) + 1])
        # the last position of the input is computed again, to sample from it
        known = self._positions(np.asarray(ids, np.int32))
        return CallExperts(self._routing, known[: len(ids) - 1])

    def end(self, ids: list[int], experts: CallExperts) -> None:
        """Keeps the experts of a call that returned these tokens, input and response.

        Earlier calls that this one continues are dropped: it has their experts too.
        """
        tokens = np.asarray(ids, np.int32)
        self._calls = [call for call in self._calls if _num_common(call[0], tokens) < len(call[0])]
        self._calls.append((tokens, experts))

    def added_to(self, sample: Sample) -> Sample:
        """Returns the sample with the experts of its tokens."""
        beside = np.zeros((len(sample.ids), self._routing.width), self._routing.dtype)
        for s in sample.sequences():
            known = self._positions(sample.ids[s])[: s.stop - s.start - 1]
            beside[s.start + 1 : s.start + 1 + len(known)] = known
        return msgspec.structs.replace(sample, experts=beside.reshape(-1))

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """Returns the experts of the call that begins with the most of these tokens."""
        common = [_num_common(ids, tokens) for tokens, _ in self._calls]
        if not common:
            return np.empty((0, self._routing.width), self._routing.dtype)
        most = max(common)
        return self._calls[common.index(most)][1].positions()[:most]


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
