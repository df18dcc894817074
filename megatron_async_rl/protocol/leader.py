"""A leader's requests for its share of each batch, and the agreement of all leaders on it.

Controller, connections and ranks may fail between the messages of one step, so one leader may have
its share while another is told to end. Replicas that then did different things would wait for each
other in collectives. So a leader with an answer waits until all have one, and they train only if
none of them was told to end.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol import messages, weight_messages
from megatron_async_rl.protocol.sync_link import SyncLink

POLL_S = 5.0  # a waiting leader returns this often, so that no collective reaches its timeout
Answer = messages.TrainBatch | messages.Republish | messages.Shutdown


class Leader:
    """`is_any`: returns whether the argument is true for any leader; collective over all leaders,
    which call it once per request."""

    def __init__(self, link: SyncLink, is_any: Callable[[bool], bool]) -> None:
        self._link = link
        self._is_any = is_any

    def request(self, version: int) -> None:
        """Requests the share of the batch to train on `version`."""
        self._link.send(messages.GetBatch(version))

    def receive(self, version: int) -> Answer | None:
        """Returns an answer to `request`; None after POLL_S, or after a message that is none.

        TrainBatch and Shutdown are final: all leaders return the same of the two. Raises
        ProtocolError.
        """
        try:
            message = self._link.ended or self._link.receive(POLL_S)
        except TimeoutError:
            return None
        match message:
            case messages.Republish():
                return message
            case messages.TrainBatch() if message.version < version:
                return None  # requested twice, because the controller restarted
            case weight_messages.Published():
                return None  # offered twice, likewise
            case messages.Shutdown():
                self._is_any(True)
                return message
            case messages.TrainBatch() if message.version == version:
                is_ended = self._is_any(False)
                return messages.Shutdown("another leader was told to end") if is_ended else message
        raise ProtocolError(
            f"expected the batch of version {version} from the controller, got "
            f"{type(message).__name__}"
        )
