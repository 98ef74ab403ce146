"""Target: vhost-user sessions against the control plane in this process, coverage-guided.

Real sockets, the real core, the real control loop on its own thread; what must hold is that the backend ends the
session without an internal error, has no descriptor more than before, and answers another frontend.
"""

import os

import atheris

with atheris.instrument_imports(include=["xdpnet"]):
    from tests.fuzz.programs import PATIENCE_S, fuzz, play, settled
    from tests.rig.backend import Backend, ControlThread
    from tests.rig.waiting import until
    from xdpnet.core import Bridge
    from xdpnet.virtq import allowance
    from xdpnet.virtq.message import Request


CHECK_EVERY = 8
AT_ONCE_S, PER_S = 0.001, 10.0  # of a guest's allowance: who overdraws it rests, and for moments


class Sessions:
    def __init__(self) -> None:
        self.control = ControlThread()
        self.bridge = self.control.call(lambda: Bridge(workers=1))
        self.control.call(self.bridge.start)
        allowance.AT_ONCE_S, allowance.PER_S = AT_ONCE_S, PER_S
        self.victim = Backend(self.control, self.bridge, 2, 1500)
        self.neighbour = Backend(self.control, self.bridge, 1, None)
        self.good, _ = self.neighbour.connect()
        self.good.negotiate()
        self.one(b"")
        self.runs = 0
        self.fds = settled(self._open_fds)

    def _open_fds(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def one(self, data: bytes) -> None:
        frontend, guest = self.victim.connect()
        with frontend:
            play(data, frontend)
        self.control.run(guest.stop())
        self.victim.frontends.clear()
        self.victim.sockets.clear()
        if guest.counters.errors["internal"]:
            raise RuntimeError("an internal error, see the log")

    def check(self, data: bytes) -> None:
        self.one(data)
        self.runs += 1
        if self.runs % CHECK_EVERY != 1:
            return
        until(lambda: self._open_fds() <= self.fds, PATIENCE_S)
        self.good.ask_u64(Request.GET_FEATURES)


def main() -> None:
    sessions = Sessions()
    fuzz(sessions.check)


if __name__ == "__main__":
    main()
