"""What is counted about one vhost-user socket; it outlives every connection and never runs backwards."""

from dataclasses import dataclass, field

from xdpnet.virtq.message import REASONS, ProtocolError


@dataclass(slots=True)
class Counters:
    """Counters of one socket."""

    messages: int = 0
    connects: int = 0
    disconnects: int = 0
    rests: int = 0  # times that nothing was read of the frontend, for it had cost others too much
    rarp_limited: int = 0  # SEND_RARP that came too soon after others: nothing was sent
    mem_unsealed: int = 0  # regions accepted whose file the frontend may still shrink
    errors: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    # connections turned away: another frontend is served; no descriptors or memory to accept it with; too many
    # descriptors of its predecessors are not closed yet; its user is not the guest's
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("busy", "resources", "closing", "peer"), 0))

    def count_error(self, error: ProtocolError) -> None:
        self.errors[error.reason] += 1
