"""What is counted about one vhost-user socket, and why its messages and connections are refused."""

from dataclasses import dataclass, field

from xdpnet.counters import VhostUser
from xdpnet.virtq.message import REASONS, ProtocolError

# Connections are turned away: another frontend is served; no descriptors or memory to accept it with; too many
# descriptors of its predecessors are not closed yet; its user is not the guest's.
REFUSALS = ("busy", "resources", "closing", "peer")


@dataclass(slots=True)
class Counters(VhostUser):
    """Counters of one socket; every reason is there from the start."""

    errors: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REFUSALS, 0))

    def count_error(self, error: ProtocolError) -> None:
        self.errors[error.reason] += 1
