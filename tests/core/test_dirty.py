"""The dirty log: every page that the device has written is marked there, and it stays within its bounds."""

import contextlib
import os
import random
import select
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.rig.driver import Driver, QueuePair
from tests.rig.guests import MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.logged import PAGE, DirtyLog, SparseMemory
from tests.rig.offloads import SENDS, TAKES, TCP4, data
from tests.rig.rings import EVENT_IDX, IN_ORDER, MERGEABLE, MIB, MODERN, SPLIT_REGIONS, Span
from tests.rig.segments import TSO4
from tests.rig.waiting import until, until_equal
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

MakeLog = Callable[..., DirtyLog]


@pytest.fixture
def logs() -> Iterator[MakeLog]:
    with contextlib.ExitStack() as stack:

        def make(driver: Driver, size: int | None = None) -> DirtyLog:
            log = DirtyLog(driver, size)
            stack.callback(log.close)
            return log

        yield make


# ---- nothing is missed ----

# The used ring, and the descriptors of a packed one, have more pages than that of the index.
ENTRIES = 1024
LARGE = tuple(Span(span.guest_addr, 4 * MIB, span.user_addr, 4 * MIB * i) for i, span in enumerate(SPLIT_REGIONS[::2]))


def some_frame(dice: random.Random, to: int, source: int) -> tuple[bytes, bytes]:
    """A frame, and the header that goes with it."""
    if dice.random() < 0.2:
        whole = replace(TCP4, payload=data(dice.randint(1, 30000)), to=mac(to), source=mac(source))
        whole = replace(whole, ports=(dice.randrange(65536), 2000))
        return whole.frame(partial=True), whole.header(TSO4, 1448).ljust(12, b"\0")
    size = dice.choice([64, 1514, PAGE - 12, PAGE - 11, 9014, dice.randint(60, 20000)])
    return frame(mac(to), mac(source), size, mark=dice.randbytes(4)), bytes(12)


def storm(dice: random.Random, pair: QueuePair, to: int, source: int) -> None:
    """Frames and buffers of all kinds, as many as there is room for; what came back is taken."""
    with contextlib.suppress(MemoryError):
        pair.reap()
        pair.packets()
        for _ in range(dice.choice([0, 1, 30])):
            size = dice.choice([200, 1600, 5000, 20000])
            pair.post(1, size, [dice.randint(1, 100)] * dice.randint(0, 2))
        for _ in range(dice.choice([0, 1, 20])):
            packet, header = some_frame(dice, to, source)
            pair.queue(packet, header=header[: pair.hdr_len])
    pair.rx.publish()
    pair.tx.kick()
    pair.rx.kick(always=dice.random() < 0.1)


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "features", [MODERN, MODERN & ~EVENT_IDX | IN_ORDER, MODERN & ~MERGEABLE], ids=["modern", "in order", "one buffer"]
)
def test_every_page_that_was_written_is_in_the_log(
    make_bridge: MakeBridge,
    guests: MakeGuest,
    logs: MakeLog,
    pytestconfig: pytest.Config,
    workers: int,
    pairs: int,
    features: int,
) -> None:
    """Of both of two guests that talk. The log is started, fetched and cleared while they do, and so the rings stop."""
    dice = random.Random(1000 * workers + 10 * pairs + features.bit_count())
    # The log is fetched while the device is awake and while it sleeps.
    bridge = make_bridge(workers=workers, spin_us=5000 if pairs == 1 else 20)
    options = {"features": features | SENDS | TAKES, "pairs": pairs, "num": ENTRIES, "spans": LARGE}
    both = [guests(bridge, memory=SparseMemory, **options) for _ in range(2)]
    for number, driver in enumerate(both):
        driver.port.set_mac(mac(number + 1), False)
    each = [logs(driver) for driver in both]

    def talk() -> None:
        for number, driver in enumerate(both):
            for pair in driver.pairs:
                storm(dice, pair, 2 - number, number + 1)

    written = 0
    for _ in range(-(-pytestconfig.getoption("--log-rounds") // 12)):  # of the variations of a layout
        talk()
        for log in each:
            log.start(dice.sample(range(3), 3))
        for _ in range(dice.randint(1, 3)):
            talk()
            if dice.random() < 0.1:
                each[0].stop()
                talk()
                each[0].start(dice.sample(range(3), 3))
            for log in each:
                log.sync()
        talk()
        if dice.random() < 0.5:
            # Asleep: what it says before that is marked too.
            for driver in both:
                for pair in driver.pairs:
                    until(pair.tx.waits)
        for log in each:
            bases = log.driver.stop()
            assert log.missed() == []
            written += len(log.driver.memory.changed_pages(PAGE))
            live = dice.random() < 0.3
            if not live:
                log.set_features(False)
            for index, base in enumerate(bases):
                log.restart_ring(index, base, live)
            if live:
                log.stop()
    assert written
    for driver in both:
        assert not any(driver.state(index).broken for index in range(2 * pairs))


# ---- what is marked ----


@pytest.fixture
def receiver(bridge: core.Bridge, guests: MakeGuest) -> Driver:
    driver = guests(bridge, memory=SparseMemory, spans=LARGE)
    driver.port.set_mac(mac(1), False)
    return driver


@pytest.fixture
def sender(bridge: core.Bridge, guests: MakeGuest) -> Driver:
    return guests(bridge)


def rings_of(driver: Driver) -> set[int]:
    """Pages that a device may write of the rings."""
    areas = [area for ring in driver.rings() for area in ring.device_areas()]
    return {page for addr, size in areas for page in range(addr // PAGE * PAGE, addr + size, PAGE)}


@pytest.mark.parametrize(("size", "pages"), [(PAGE - 12, 1), (PAGE - 11, 2), (2 * PAGE - 12, 2), (2 * PAGE - 11, 3)])
def test_a_frame_marks_the_pages_that_it_touches_and_no_others(
    receiver: Driver, sender: Driver, logs: MakeLog, size: int, pages: int
) -> None:
    log = logs(receiver)
    at = receiver.memory.take(4 * PAGE)
    receiver.pair.post_at(at, 4 * PAGE)
    log.start()
    before = log.marked()
    assert before
    assert before <= rings_of(receiver)
    sender.pair.send(frame(mac(1), mac(2), size))
    until(receiver.pair.packets)
    receiver.stop()
    assert log.marked() - rings_of(receiver) == {at + PAGE * i for i in range(pages)}


def test_frames_are_logged_by_the_feature_and_rings_by_their_flag(
    receiver: Driver, sender: Driver, logs: MakeLog
) -> None:
    log = logs(receiver)
    at = [receiver.memory.take(PAGE) for _ in range(3)]

    def written() -> set[int]:
        receiver.pair.post_at(at[0], PAGE)
        sender.pair.send(frame(mac(1), mac(2)))
        until(receiver.pair.packets)
        log.driver.stop()
        marked = log.marked()
        log.clear()
        for index, ring in enumerate(receiver.rings()):
            receiver.port.ring_start(index, ring.config())
        return marked

    log.set_base()
    assert written() == set()
    log.set_features(True)
    assert written() == {at[0]}
    log.set_features(False)
    log.set_ring(core.RX, True)
    assert log.marked()
    assert log.marked() <= rings_of(receiver)


def test_a_ring_is_logged_where_its_frontend_says(receiver: Driver, sender: Driver, logs: MakeLog) -> None:
    """An address of the frontend's choice; of a packed ring it is that of the device's structure."""
    log = logs(receiver)
    elsewhere = LARGE[1].guest_addr + 0x100000
    log.set_base()
    receiver.port.ring_set_log(core.TX, True, elsewhere)
    marked = log.marked()
    assert elsewhere in marked
    descriptors = {page for page in rings_of(receiver) if page != log.used_at(core.TX) // PAGE * PAGE}
    assert marked - descriptors == {elsewhere}


def test_nothing_is_marked_once_the_log_has_ended(receiver: Driver, sender: Driver, logs: MakeLog) -> None:
    log = logs(receiver)
    log.start()
    log.stop()
    log.clear()
    receiver.pair.fill()
    sender.pair.send_all([frame(mac(1), mac(2)) for _ in range(20)])
    until_equal(lambda: receiver.stats(core.RX).packets, 20)
    receiver.stop()
    assert log.marked() == set()


def test_a_log_takes_another_ones_place_while_frames_flow(receiver: Driver, sender: Driver, logs: MakeLog) -> None:
    """As QEMU has it when memory is added. What the one was not told the other is."""
    first, second = logs(receiver), logs(receiver, LARGE[1].guest_addr // PAGE)
    receiver.pair.fill()
    first.start()
    for log in second, first, second:
        sender.pair.send_all([frame(mac(1), mac(2)) for _ in range(20)])
        log.set_base()
    until_equal(lambda: receiver.stats(core.RX).packets, 60)
    receiver.stop()
    marked = first.marked() | second.marked()
    assert [page for page in receiver.memory.changed_pages(PAGE) if page not in marked] == []


def test_the_log_descriptor_is_signalled_when_something_is_in_it(
    receiver: Driver, sender: Driver, logs: MakeLog
) -> None:
    told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    log = logs(receiver)
    log.start()
    receiver.port.set_log_fd(told)
    receiver.pair.fill()
    sender.pair.send(frame(mac(1), mac(2)))
    assert select.select([told], [], [], 60)[0]
    receiver.port.set_log_fd(-1)
    until(receiver.pair.packets)
    os.eventfd_read(told)
    sender.pair.send(frame(mac(1), mac(2)))
    until(receiver.pair.packets)
    receiver.stop()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(told)
    os.close(told)


# ---- bounds ----

END = max(span.guest_addr + span.size for span in LARGE)


def bits(pages: int) -> int:
    return -(-pages // 8)


def test_a_log_with_a_bit_for_every_page_is_taken_and_one_that_is_a_byte_shorter_is_not(
    receiver: Driver, logs: MakeLog
) -> None:
    least = bits(END // PAGE)
    logs(receiver, least).set_base()
    with pytest.raises(OSError, match="No space"):
        logs(receiver, least - 1).set_base()


def test_memory_beyond_the_log_is_refused_while_it_is_used(receiver: Driver, logs: MakeLog) -> None:
    log = logs(receiver)
    log.set_base()
    span = LARGE[0]
    more = core.Region(END, span.size, span.user_addr + (1 << 40), 0, receiver.memory.fd)
    for frames in True, False:
        log.set_features(frames)
        log.set_ring(core.RX, not frames)
        with pytest.raises(OSError, match="No space"):
            receiver.port.add_region(more)
        with pytest.raises(OSError, match="No space"):
            receiver.port.set_memory([*receiver.memory.regions(), more])
        log.stop()
    receiver.port.add_region(more)
    with pytest.raises(OSError, match="No space"):
        log.set_features(True)
    with pytest.raises(OSError, match="No space"):
        log.set_ring(core.RX, True)
    receiver.port.remove_region(more)
    log.start()


@pytest.mark.parametrize("start", [False, True], ids=["while it runs", "as it starts"])
def test_a_ring_that_would_be_logged_beyond_the_log_is_refused(receiver: Driver, logs: MakeLog, start: bool) -> None:
    log = logs(receiver)
    log.set_base()
    size = receiver.pair.tx.parts()[2][1] - (0 if receiver.pair.tx.event_idx or receiver.features >> 34 & 1 else 2)
    base = receiver.port.ring_stop(core.TX)
    config = replace(receiver.pair.tx.config(base), logs=True)
    for addr in END - size + 1, 1 << 52, (1 << 64) - 1, (1 << 64) - size:
        if start:
            with pytest.raises(OSError, match="No space"):
                receiver.port.ring_start(core.TX, replace(config, log_addr=addr))
        else:
            receiver.port.ring_start(core.TX, replace(config, logs=False))
            with pytest.raises(OSError, match="No space"):
                receiver.port.ring_set_log(core.TX, True, addr)
    receiver.port.ring_start(core.TX, replace(config, log_addr=END - size))
    assert END - PAGE in log.marked()


@pytest.mark.parametrize("size", [0, 1 << 63])
def test_a_log_that_is_not_in_its_file_is_refused(receiver: Driver, logs: MakeLog, size: int) -> None:
    log = logs(receiver)
    with pytest.raises(OSError, match="Invalid"):
        receiver.port.set_log(log.fd, 0, size)
    with pytest.raises(OSError, match="Invalid"):
        receiver.port.set_log(log.fd, PAGE, log.size)


def test_a_log_that_is_truncated_ends_its_guests_rings_and_nobody_elses(
    bridge: core.Bridge, guests: MakeGuest, receiver: Driver, sender: Driver, logs: MakeLog
) -> None:
    log, other = logs(receiver), guests(bridge)
    other.port.set_mac(mac(3), False)
    other.pair.fill()
    receiver.pair.fill()
    log.start()
    os.ftruncate(log.fd, 0)

    def comes_to() -> str:
        sender.pair.send_all([frame(mac(1), mac(2))])
        return receiver.state(core.RX).broken

    until_equal(comes_to, "memory")
    assert receiver.pair.rx.is_in_error()
    sender.pair.send(frame(mac(3), mac(2)))
    assert other.pair.frames() == [frame(mac(3), mac(2))]
    # Another table is no other log: a ring that starts anew breaks as well, until there is one.
    receiver.port.set_memory(receiver.memory.regions())
    receiver.restart(core.RX)
    receiver.pair.fill()
    until_equal(comes_to, "memory")
    receiver.port.set_log(-1)
    receiver.restart(core.RX)
    receiver.pair.fill()
    receiver.pair.packets()
    sender.pair.send(frame(mac(1), mac(2)))
    assert receiver.pair.frames() == [frame(mac(1), mac(2))]
