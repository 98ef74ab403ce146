"""Sends numbered frames from an interface: python -m tests.rig.blast INTERFACE DESTINATION-MAC COUNT [LENGTH]."""

import socket
import sys
import time

BURST, PAUSE_S = 32, 0.001  # slow enough that nobody's ring overflows


def main(interface: str, destination: str, count: str, length: str = "64") -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, 0))
        source = raw.getsockname()[4]
        header = bytes.fromhex(destination.replace(":", "")) + source + b"\x88\xb5"  # local experimental Ethertype 1
        for number in range(int(count)):
            raw.send(header + number.to_bytes(4, "big") + bytes(int(length) - len(header) - 4))
            if number % BURST == BURST - 1:
                time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
