"""How many descriptors a configuration may need, and a limit that has room for them.

What guests, scrapers and operators may take is bounded for each; with room for all of it together nobody can keep a
guest from its descriptors by holding others.
"""

import logging
import resource

from xdpnet.closer import MAX_PENDING
from xdpnet.config import Config
from xdpnet.core import MAX_REGIONS
from xdpnet.virtq.message import MAX_FDS, SCM_MAX_FD

OWN = 128  # standard streams, event loops, listening sockets, what libraries keep; clients of metrics and control
WORKER = 3
NETDEV = 64  # program, maps, link, netlink; a socket for each of its queues
# Sockets; memory, and as much of the core's; half a message; what is being closed, of the frontend and of others that
# were turned away.
GUEST = 4 + 2 * MAX_REGIONS + MAX_FDS + MAX_PENDING + SCM_MAX_FD + MAX_PENDING
QUEUE_PAIR = 2 * 3 * 2  # rings, each with three events, of which the core has copies

log = logging.getLogger(__name__)


def needed(config: Config) -> int:
    """The most that this configuration can come to need."""
    rings = QUEUE_PAIR * sum(guest.queues for guest in config.guests)
    return OWN + WORKER * config.worker_count + NETDEV * len(config.netdevs) + GUEST * len(config.guests) + rings


def guests_of(limit: int, pairs: int) -> int:
    """For how many guests of so many queue pairs, with one worker and one interface, a limit is enough."""
    return max(0, limit - OWN - WORKER - NETDEV) // (GUEST + pairs * QUEUE_PAIR)


def reserve(wanted: int) -> None:
    """Raises our soft limit to the hard one; says so if that is too low."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if wanted > most:
        log.warning(
            "at most %d descriptors may be open, %d may be needed: guests that open many can hinder others; "
            "raise the hard limit (LimitNOFILE= of the unit, ulimit -Hn)", most, wanted,
        )  # fmt: skip
