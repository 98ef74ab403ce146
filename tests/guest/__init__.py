"""Tests with guests that nobody here wrote: Linux in QEMU and in user mode, DPDK's virtio-user."""
