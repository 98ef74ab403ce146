"""One frontend's session: which request is legal now, and what it does.

The table RULES is the protocol as we speak it. A request that cannot be served is refused: with a non-zero REPLY_ACK if
the frontend asked for one, else by ending the connection, the only other answer there is. Invariant: handle() closes
every descriptor that no handler took over, whatever happens.

Reference: QEMU docs/interop/vhost-user.rst, "Front-end message types".
"""

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from xdpnet.core import MAX_REGIONS
from xdpnet.virtq import features
from xdpnet.virtq.counters import Counters
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.fd import Fd
from xdpnet.virtq.features import ProtocolFeature
from xdpnet.virtq.filling import MemoryChange
from xdpnet.virtq.memory import check_call, check_eventfd, check_socket
from xdpnet.virtq.message import (
    MAX_FDS,
    REQUESTS,
    U64,
    Address,
    FramingError,
    Log,
    MemoryTable,
    Message,
    Nothing,
    Payload,
    ProtocolError,
    Request,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
    reply,
)
from xdpnet.virtq.virtqueue import Virtqueue

SUCCESS, FAILURE = U64(0), U64(1)

log = logging.getLogger(__name__)  # of the conversation, which nobody sees who has not asked for it

P = TypeVar("P")


class Session:
    """The state machine that a connection feeds with messages."""

    def __init__(self, device: GuestDevice, counters: Counters) -> None:
        self.device = device
        self.counters = counters
        self.protocol_features = 0
        self.status = 0
        self.asked_queues = False  # and was answered how many there are
        self.had_memory = False
        self.refused = ""  # what it was, last, and went on
        self.backend_channel: Fd | None = None
        self.filling: MemoryChange | None = None  # what the request that came last waits for
        self._unanswered: Message | None = None
        self._fds: list[Fd] = []  # of the request being served; a handler takes out what it keeps

    def handle(self, message: Message, fds: list[Fd]) -> bytes | None:
        """Serves one request; the reply, if it has one. A ProtocolError means that the connection must end.

        If `filling` is something afterwards, that is to be filled, and finish() called, before the next request.
        """
        self.counters.messages += 1
        self._fds = fds
        rule = RULES.get(message.header.request)
        try:
            return self._answer(message, lambda: self._serve(rule, message))
        finally:
            for fd in fds:
                fd.close()

    def finish(self) -> bytes | None:
        """Serves the rest of the request whose memory was to be filled."""
        if self.filling is None or self._unanswered is None:
            raise ValueError("nothing is being filled")
        change, self.filling = self.filling, None
        return self._answer(self._unanswered, lambda: self._apply(change))

    def _answer(self, message: Message, serve: Callable[[], Payload | None]) -> bytes | None:
        rule = RULES.get(message.header.request)
        asked = message.header.need_reply and not (rule and rule.own_reply)
        acked = asked and self._has(ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        try:
            answer = serve()
            if self.filling is not None:
                self._unanswered = message
                return None
            # The request that negotiates it may be the first that asks for it, as user-mode Linux does.
            if answer is None and (acked or (asked and self._has(ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK))):
                answer = SUCCESS
        except FramingError:
            raise
        except ProtocolError as error:
            if not acked:
                raise
            self.counters.count_error(error)
            self.device.log.warning("%s refused: %s", message.name, error)
            self.refused = f"{message.name}: {error}"
            answer = FAILURE
        if answer is None:
            return None
        log.debug("guest %s: %s is answered %s", self.device.name, message.name, answer)
        return reply(message.header.request, answer)

    def close(self) -> None:
        """The connection is over: the device forgets this frontend."""
        if self.backend_channel is not None:
            self.backend_channel.close()
        if self.filling is not None:
            self.filling.close()
        self.device.release()

    def _serve(self, rule: "Rule[Any] | None", message: Message) -> Payload | None:
        if rule is None:
            known = message.header.request in REQUESTS
            raise ProtocolError("unsupported" if known else "request", f"{message.name} is not offered")
        if rule.feature is not None and not self._has(rule.feature):
            raise ProtocolError("features", f"{message.name} without {rule.feature.name}")
        if len(self._fds) not in rule.fds:
            raise ProtocolError("fds", f"{message.name} with {len(self._fds)} descriptors")
        payload = rule.payload(message.payload)
        log.debug("guest %s: %s %s, descriptors %d", self.device.name, message.name, payload, len(self._fds))
        return rule.handler(self, payload)

    def _has(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features >> feature & 1)

    @property
    def _rarp(self) -> bool:
        return self._has(ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP)

    def _ring(self, index: int) -> Virtqueue:
        if index >= len(self.device.rings):
            raise ProtocolError("index", f"ring {index}, there are {len(self.device.rings)}")
        return self.device.rings[index]

    # ---- features ----

    def get_features(self, _: Nothing) -> Payload:
        return U64(features.for_frontend(self.device.offered, self._rarp, self.device.multiqueue))

    def set_features(self, bits: U64) -> None:
        self.device.set_features(bits.value)
        if bits.value & features.MULTIQUEUE and not self.device.multiqueue:
            self.device.log.warning(
                "its frontend has one queue pair, and its card VIRTIO_NET_F_MQ without a control queue, which Linux "
                "refuses; start the guest again, for now we know, or set queues=1"
            )

    def get_protocol_features(self, _: Nothing) -> Payload:
        return U64(features.offered_protocol())

    def set_protocol_features(self, bits: U64) -> None:
        if unknown := bits.value & ~features.offered_protocol():
            names = ", ".join(features.names(unknown, ProtocolFeature))
            raise ProtocolError("features", f"protocol features not offered: {names}")
        self.protocol_features = bits.value
        self.device.multiqueue = self._has(ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ)

    def get_queue_num(self, _: Nothing) -> Payload:
        """Of pairs for QEMU, as DPDK's backend has it, and of virtqueues for others, as rust-vmm's have.

        The specification does not say, and each frontend compares it with what it is about to use. Only QEMU asks for
        RARP before.
        """
        self.asked_queues = True
        return U64(self.device.pairs if self._rarp else len(self.device.rings))

    # ---- device ----

    def set_owner(self, _: Nothing) -> None:
        """Nothing to do: a frontend owns the device as long as it is connected."""

    def reset_owner(self, _: Nothing) -> None:
        for ring in self.device.rings:
            self.device.enable(ring, False)

    def reset_device(self, _: Nothing) -> None:
        self.device.reset()
        self.status = 0

    def set_status(self, status: U64) -> None:
        if status.value > 0xFF:
            raise ProtocolError("status", f"device status {status.value:#x} is wider than 8 bits")
        if status.value == 0:
            self.device.driver_reset()
        self.status = status.value

    def get_status(self, _: Nothing) -> Payload:
        return U64(self.status)

    def net_set_mtu(self, mtu: U64) -> None:
        self.device.set_mtu(mtu.value)

    def send_rarp(self, address: Address) -> None:
        """One announcement too many is no fault: the others have been heard."""
        if not self.device.announce(address.mac):
            self.counters.rarp_limited += 1

    def set_backend_req_fd(self, _: Nothing) -> None:
        check_socket(self._fds[0])
        if self.backend_channel is not None:
            self.backend_channel.close()
        self.backend_channel = self._fds.pop()

    # ---- memory ----

    def set_mem_table(self, table: MemoryTable) -> None:
        if len(self._fds) != len(table.regions):
            raise ProtocolError("mem", f"{len(table.regions)} regions with {len(self._fds)} descriptors")
        self._change_memory(self.device.new_table(table.regions, tuple(self._fds)))

    def get_max_mem_slots(self, _: Nothing) -> Payload:
        return U64(MAX_REGIONS)

    def add_mem_reg(self, single: SingleRegion) -> None:
        self._change_memory(self.device.new_region(single.region, self._fds[0]))

    def rem_mem_reg(self, single: SingleRegion) -> None:
        self.device.remove_region(single.region)

    def _change_memory(self, change: MemoryChange) -> None:
        self._fds.clear()  # the change's now
        if change.wants_filling:
            self.filling = change
        else:
            self._apply(change)

    def _apply(self, change: MemoryChange) -> None:
        self.counters.unsealed_regions += change.apply()
        self.had_memory = True

    # ---- the dirty log ----

    def set_log_base(self, log: Log) -> Payload:
        """Answered whether or not that was asked for: QEMU waits for it, and takes any payload. Whoever asked for a
        verdict gets it in the same answer."""
        self.device.set_log(log, self._fds[0])
        return SUCCESS

    def set_log_fd(self, _: Nothing) -> None:
        check_eventfd(self._fds[0])
        self.device.set_log_call(self._fds[0])
        self._fds.clear()  # the device's now

    # ---- rings ----

    def set_vring_num(self, state: VringState) -> None:
        self.device.set_num(self._ring(state.index), state.num)

    def set_vring_addr(self, addr: VringAddr) -> None:
        self.device.set_addr(self._ring(addr.index), addr)

    def set_vring_base(self, state: VringState) -> None:
        self.device.set_base(self._ring(state.index), state.num)

    def get_vring_base(self, state: VringState) -> Payload:
        return VringState(state.index, self.device.stop(self._ring(state.index)))

    def set_vring_enable(self, state: VringState) -> None:
        if state.num > 1:
            raise ProtocolError("state", f"ring {state.index}: enable is 0 or 1, not {state.num}")
        self.device.enable(self._ring(state.index), bool(state.num))

    def set_vring_kick(self, file: VringFile) -> None:
        ring, fd = self._ring_file(file)
        self.device.start(ring, fd)
        self._fds.clear()  # the ring's now

    def set_vring_call(self, file: VringFile) -> None:
        ring, fd = self._ring_file(file, check_call)
        self.device.set_call(ring, fd)
        self._fds.clear()  # the ring's now

    def set_vring_err(self, file: VringFile) -> None:
        ring, fd = self._ring_file(file)
        self.device.set_err(ring, fd)
        self._fds.clear()  # the ring's now

    def _ring_file(self, file: VringFile, check: Callable[[Fd], None] = check_eventfd) -> tuple[Virtqueue, Fd | None]:
        ring = self._ring(file.index)
        if len(self._fds) != (0 if file.nofd else 1):
            raise ProtocolError(
                "fds", f"ring {file.index}: {len(self._fds)} descriptors, no-descriptor flag {file.nofd}"
            )
        if file.nofd:
            return ring, None
        check(self._fds[0])
        return ring, self._fds[0]


@dataclass(frozen=True, slots=True)
class Rule(Generic[P]):
    """How one request is served."""

    handler: Callable[[Session, P], Payload | None]
    payload: Callable[[bytes], P]
    fds: Container[int] = (0,)  # how many descriptors may come with it
    feature: ProtocolFeature | None = None  # must have been negotiated
    own_reply: bool = False  # answers by itself, so REPLY_ACK does not apply


_LOG = ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD
_REQ = ProtocolFeature.VHOST_USER_PROTOCOL_F_BACKEND_REQ
_RARP = ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP
_RESET = ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE
_SLOTS = ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
_STATUS = ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS
_MTU = ProtocolFeature.VHOST_USER_PROTOCOL_F_NET_MTU
_ANY = range(MAX_FDS + 1)

# Feature bits may be asked for, and SET_VRING_ENABLE be sent (QEMU probes with it), before anything is negotiated.
# fmt: off
RULES: dict[int, Rule[Any]] = {
    Request.GET_FEATURES:          Rule(Session.get_features, Nothing.unpack, own_reply=True),
    Request.SET_FEATURES:          Rule(Session.set_features, U64.unpack),
    Request.SET_OWNER:             Rule(Session.set_owner, Nothing.unpack),
    Request.RESET_OWNER:           Rule(Session.reset_owner, Nothing.unpack),
    Request.SET_MEM_TABLE:         Rule(Session.set_mem_table, MemoryTable.unpack, fds=_ANY),
    Request.SET_LOG_BASE:          Rule(Session.set_log_base, Log.unpack, fds=(1,), feature=_LOG),
    Request.SET_LOG_FD:            Rule(Session.set_log_fd, Nothing.unpack, fds=(1,)),
    Request.SET_VRING_NUM:         Rule(Session.set_vring_num, VringState.unpack),
    Request.SET_VRING_ADDR:        Rule(Session.set_vring_addr, VringAddr.unpack),
    Request.SET_VRING_BASE:        Rule(Session.set_vring_base, VringState.unpack),
    Request.GET_VRING_BASE:        Rule(Session.get_vring_base, VringState.unpack, own_reply=True),
    Request.SET_VRING_KICK:        Rule(Session.set_vring_kick, VringFile.unpack, fds=(0, 1)),
    Request.SET_VRING_CALL:        Rule(Session.set_vring_call, VringFile.unpack, fds=(0, 1)),
    Request.SET_VRING_ERR:         Rule(Session.set_vring_err, VringFile.unpack, fds=(0, 1)),
    Request.GET_PROTOCOL_FEATURES: Rule(Session.get_protocol_features, Nothing.unpack, own_reply=True),
    Request.SET_PROTOCOL_FEATURES: Rule(Session.set_protocol_features, U64.unpack),
    Request.GET_QUEUE_NUM:         Rule(Session.get_queue_num, Nothing.unpack, own_reply=True),
    Request.SET_VRING_ENABLE:      Rule(Session.set_vring_enable, VringState.unpack),
    Request.SEND_RARP:             Rule(Session.send_rarp, Address.unpack, feature=_RARP),
    Request.NET_SET_MTU:           Rule(Session.net_set_mtu, U64.unpack, feature=_MTU),
    Request.SET_BACKEND_REQ_FD:    Rule(Session.set_backend_req_fd, Nothing.unpack, fds=(1,), feature=_REQ),
    Request.RESET_DEVICE:          Rule(Session.reset_device, Nothing.unpack, feature=_RESET),
    Request.GET_MAX_MEM_SLOTS:     Rule(Session.get_max_mem_slots, Nothing.unpack, feature=_SLOTS, own_reply=True),
    Request.ADD_MEM_REG:           Rule(Session.add_mem_reg, SingleRegion.unpack, fds=(1,), feature=_SLOTS),
    # a descriptor here is an old frontend's mistake, tolerated and closed
    Request.REM_MEM_REG:           Rule(Session.rem_mem_reg, SingleRegion.unpack, fds=(0, 1), feature=_SLOTS),
    Request.SET_STATUS:            Rule(Session.set_status, U64.unpack, feature=_STATUS),
    Request.GET_STATUS:            Rule(Session.get_status, Nothing.unpack, feature=_STATUS, own_reply=True),
}
# fmt: on
