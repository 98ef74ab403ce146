"""Numbers and paths that more than one part goes by: what holds unless a person sets it, and limits of what he may set.

Limits of the core are those of c/xdpnet.h; xdpnet.core has them.
"""

CONTROL = "/run/xdpnet/control.sock"
SPIN_US = 50  # a wake-up across CPUs costs 30-60 us: polling for as long as that never costs more than sleeping did
AGEING_S = 300  # as IEEE 802.1D has it
FRAMES_PER_QUEUE = 4096  # 16 MiB a queue: a few milliseconds of 64-byte frames at line rate
MACS_PER_PORT = 64  # room for a guest's macvlans and containers, none for a flood of forged addresses
MAX_MEMORY = 256 << 30  # few guests have more, and as many as there may be fit

MTU = (68, 65535)  # that a guest is told: virtio 1.2, 5.1.4.1
MEMORY = (1 << 20, 8 << 40)  # of one guest; our own address space of 47 bits has room for a dozen such
