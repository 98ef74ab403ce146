"""Inside of the machine that run.sh has made: python -m tests.deploy.steps. Ends with the first step that fails."""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.rig.traced import WALL, stopped
from tests.rig.waiting import until
from xdpnet.control.client import ask
from xdpnet.demo import initramfs
from xdpnet.metrics.snapshot import Snapshot

DEPLOY = Path(__file__).parents[2] / "deploy"
CONFIG = Path("/etc/xdpnet.toml")
INITRAMFS = Path("/var/lib/guest.initramfs")
SHELL = Path("/var/lib/libvirt/qemu/web.shell")
FAR, GUEST = "10.9.9.1", "10.9.9.2"
CLIENT_SOCKET = "/run/xdpnet/client/web.sock"
HEALTH_S = 3.0  # promised: a frozen worker is unhealthy by then
BOOT_S = 180.0
RESTART_S = 120.0

start = time.monotonic()
marks = itertools.count()


def say(kind: str, text: str) -> None:
    print(f"{time.monotonic() - start:6.1f} s  {kind:<5} {text}", flush=True)


def run(*words: str, status: int | None = 0, timeout: float = 120) -> str:
    """Its output; None: whatever its status is."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout)
    said = (done.stdout + done.stderr).strip()
    if status is not None and done.returncode != status:
        raise SystemExit(f"{' '.join(words)}: status {done.returncode}: {said}")
    return said


def journal(*words: str) -> str:
    return run("journalctl", "--no-pager", "-o", "cat", "-u", "xdpnet", *words)


def shown(name: str) -> str:
    return run("systemctl", "show", "--value", "-p", name, "xdpnet")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:  # it starts just now
        return 0, str(error)


def health() -> tuple[int, str]:
    return get("http://127.0.0.1:9100/healthz")


# ---- the network, the guest ----


def make_network() -> None:
    """eth1 as the example configuration has it, and somebody at its far end."""
    for words in (
        "netns add far",
        "link add eth1 type veth peer name far0 netns far",
        "link set eth1 up",
        "-n far link set far0 up",
        f"-n far address add {FAR}/24 dev far0",
    ):
        run("ip", *words.split())


def domain(listens: bool) -> str:
    """deploy/libvirt-domain.xml, changed as for where KVM is not; with a kernel, and a shell at a serial port."""
    kernel = initramfs.find_kernel()
    initramfs.build(kernel, INITRAMFS, programs=())
    text = (DEPLOY / "libvirt-domain.xml").read_text()
    boot = f"<kernel>{kernel.image}</kernel><initrd>{INITRAMFS}</initrd><cmdline>console=ttyS0 panic=-1 quiet</cmdline>"
    serials = "<serial type='null'/>" + f"<serial type='unix'><source mode='bind' path='{SHELL}'/></serial>"
    changes = {
        "type='kvm'": "type='qemu'",
        "<cpu mode='host-passthrough'/>": "<cpu mode='maximum'/>",
        "</domain>": (DEPLOY / "libvirt-emulated.xml").read_text() + "</domain>",
        "<os>": f"<os>{boot}",
        "<devices>": f"<devices>{serials}",
        "<memory unit='GiB'>1</memory>": "<memory unit='MiB'>256</memory>",
    }
    for old, new in changes.items():
        if old not in text:
            raise SystemExit(f"libvirt-domain.xml has no {old}")
        text = text.replace(old, new)
    if listens:
        source = re.search(r"<source type='unix' path='[^']*' mode='server'/>", text)
        if source is None:
            raise SystemExit("libvirt-domain.xml does not say what client = true needs")
        text = re.sub(r"<source type='unix' path='[^']*' mode='client'>.*?</source>", source[0], text, flags=re.DOTALL)
    return text


def start_domain(listens: bool) -> None:
    file = Path("/root/web.xml")
    file.write_text(domain(listens))
    run("virsh", "destroy", "web", status=None)
    run("virsh", "undefine", "web", status=None)
    run("virsh", "define", str(file))
    run("virsh", "start", "web", timeout=60)
    tell(f"ip link set eth0 up && ip address flush dev eth0 && ip address add {GUEST}/24 dev eth0")


def tell(script: str) -> str:
    """Runs it in the guest; xdpnet/demo/initramfs.py."""
    mark = next(marks)
    asked = f"{mark} {base64.b64encode(script.encode()).decode()}\n".encode()
    answer = re.compile(rb"begin %d\r?\n(.*?)end %d (\d+)\r?\n" % (mark, mark), re.DOTALL)
    said = b""
    with socket.socket(socket.AF_UNIX) as shell:
        shell.connect(str(SHELL))
        shell.settimeout(1)
        now = time.monotonic()
        deadline, again = now + BOOT_S, now
        while not (found := answer.search(said)):
            now = time.monotonic()
            if now > deadline:
                raise SystemExit(f"the guest does not answer: {said[-200:]!r}")
            if now >= again:  # nobody may have been there to read it
                shell.sendall(asked)
                again = now + 15
            with contextlib.suppress(TimeoutError):
                said += shell.recv(65536)
    output = base64.b64decode(found[1]).decode()
    if found[2] != b"0":
        raise SystemExit(f"the guest: {script}: {output}")
    return output


def pings(patience: float = 30) -> str:
    """Both ways, nothing lost once the first one has come back."""
    until(lambda: "bytes from" in run("ip", *f"netns exec far ping -c 1 -W 1 {GUEST}".split(), status=None), patience)
    said = run("ip", *f"netns exec far ping -c 5 -i 0.2 -W 5 {GUEST}".split())
    summary = re.search(r"\d+ packets transmitted.*", said)
    if summary is None or " 0% packet loss" not in summary[0]:
        raise SystemExit(said)
    tell(f"ping -c 3 -W 5 {FAR}")
    return summary[0]


# ---- the steps ----


def install() -> str:
    """As the head of the unit says."""
    shutil.copy(DEPLOY / "xdpnet.service", "/etc/systemd/system/")
    shutil.copy(DEPLOY / "xdpnet.toml", CONFIG)
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--now", "xdpnet")
    return journal("-n", "1")


def look() -> str:
    """xdpnet check beside the daemon."""
    said = run("/opt/xdpnet/.venv/bin/xdpnet", "check", "eth1")
    return "\n".join(line for line in said.splitlines() if "KVM" in line or "eth1 state" in line)


def watch() -> str:
    """In place of Debian's own configuration, which looks for another program at this port; of that nothing is kept."""
    run("systemctl", "stop", "prometheus")
    run("find", "/var/lib/prometheus/metrics2", "-mindepth", "1", "-delete")
    for name in ("prometheus.yml", "prometheus-rules.yml"):
        shutil.copy(DEPLOY / name, "/etc/prometheus/")
    run("systemctl", "start", "prometheus")
    until(lambda: prometheus("query?query=up")["result"])
    return "prometheus scrapes it"


def prometheus(question: str) -> Any:
    status, text = get(f"http://127.0.0.1:9090/api/v1/{question}")
    return json.loads(text)["data"] if status == 200 else {"result": [], "alerts": []}


def prepare_libvirt() -> str:
    """What a container takes from it, and no machine: control groups of its own."""
    with Path("/etc/libvirt/qemu.conf").open("a") as file:
        file.write("\ncgroup_controllers = []\n")
    run("systemctl", "restart", "libvirtd")
    return run("virsh", "version").splitlines()[-1]


def qemu_connects() -> str:
    start_domain(listens=False)
    return pings()


def restarts() -> str:
    run("systemctl", "restart", "xdpnet")
    return pings()


def qemu_listens() -> str:
    text = CONFIG.read_text().replace("/run/xdpnet/web.sock", CLIENT_SOCKET)
    CONFIG.write_text(text.replace("# client = false", "client = true", 1))
    run("virsh", "destroy", "web")
    run("systemctl", "reload", "xdpnet")
    start_domain(listens=True)
    return pings()


def mistakes() -> str:
    """Of each kind: what the parser sees, what this machine has not, what shows only when it is tried."""
    right, pid, told = CONFIG.read_text(), shown("MainPID"), []
    for old, new, fails in (
        ("queues = 2", "queus = 2", True),
        ("[[netdev]]", "[[netdev]", True),
        ('interface = "eth1"', 'interface = "eht1"', True),
        ('metrics = "127.0.0.1:9100"', 'metrics = "192.0.2.1:9100"', False),
    ):
        before = journal("-q").count("going on with the configuration as it was")
        CONFIG.write_text(right.replace(old, new))
        said = run("systemctl", "reload", "xdpnet", status=1 if fails else 0)
        if not fails:
            until(lambda before=before: journal("-q").count("going on with the configuration") > before)  # type: ignore[misc]
        pings()
        if (shown("MainPID"), shown("ActiveState"), shown("NRestarts")) != (pid, "active", "0"):
            raise SystemExit(f"{new}: the daemon did not go on")
        told.append(f"{new}: {said.splitlines()[0] if said else 'told in the journal'}")
    CONFIG.write_text(right)
    run("systemctl", "reload", "xdpnet")
    return "\n".join([*told, "in the journal:", *journal("-p", "err", "-n", "8").splitlines()])


def signals() -> str:
    pid = shown("MainPID")
    for name in ("HUP", "USR1", "USR2", "ALRM"):
        run("systemctl", "kill", "--kill-whom=main", "-s", name, "xdpnet")
    until(lambda: "SIGALRM means nothing here" in journal())
    if shown("MainPID") != pid:
        raise SystemExit("a signal ended it")
    return pings()


def warnings() -> str:
    """Ours, with their priorities; nothing that is none."""
    said = journal("-p", "warning", "-q")
    if "VLAN tags" not in said or "means nothing here" not in said or "ready: " in said or "attached" in said:
        raise SystemExit(said)
    return f"{len(said.splitlines())} lines, the last: {said.splitlines()[-1]}"


def freezes() -> str:
    """Asleep, as a worker is most of the time, by somebody who holds its thread."""
    if health() != (200, "ok\n"):
        raise SystemExit(f"not well before: {health()}")
    pid, tid = shown("MainPID"), Snapshot.from_json(ask("/run/xdpnet/control.sock", "stats")).workers[0].tid
    told = []
    with contextlib.suppress(ProcessLookupError), stopped(tid):
        then = time.monotonic()
        until(lambda: health()[0] == 503)
        took = time.monotonic() - then
        told.append(f"/healthz says 503 after {took:.1f} s: {health()[1].strip()}")
        if took > HEALTH_S:
            raise SystemExit(told[-1])
        until(lambda: "XdpnetWorkerStalled" in firing(), 60)
        told.append(f"Prometheus alerts after {time.monotonic() - then:.1f} s: {', '.join(firing())}")
        until(lambda: is_gone(tid), RESTART_S)
        until(lambda: shown("MainPID") not in (pid, "0") and shown("ActiveState") == "active")
        told.append(f"restarted by the watchdog after {time.monotonic() - then:.1f} s, restarts: {shown('NRestarts')}")
    until(lambda: health() == (200, "ok\n"))
    return "\n".join([*told, pings()])


def is_gone(tid: int) -> bool:
    """Who holds a thread has to see to it that it can end."""
    return os.waitpid(tid, WALL | os.WNOHANG)[0] == tid


def firing() -> list[str]:
    return [alert["labels"]["alertname"] for alert in prometheus("alerts")["alerts"] if alert["state"] == "firing"]


STEPS: dict[str, Callable[[], str]] = {
    "the unit starts it": install,
    "xdpnet check beside it": look,
    "Prometheus, by deploy/prometheus.yml": watch,
    "libvirt": prepare_libvirt,
    "a domain with client = false pings, and is pinged": qemu_connects,
    "systemctl restart under it": restarts,
    "a domain with client = true pings, and is pinged": qemu_listens,
    "systemctl restart under this one": restarts,
    "a mistake in the configuration never ends the daemon": mistakes,
    "nor does a signal": signals,
    "journalctl -p warning": warnings,
    "a frozen worker": freezes,
}


def main() -> None:
    make_network()
    for title, step in STEPS.items():
        try:
            said = step()
        except BaseException:
            say("FAIL", title)
            print(journal("-n", "30"))
            raise
        say("ok", title)
        for line in said.splitlines():
            print(f"          {line}", flush=True)


if __name__ == "__main__":
    main()
