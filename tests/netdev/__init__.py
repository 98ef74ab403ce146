"""Tests of interfaces and of the core behind them: AF_XDP on veth pairs, XDP, the kernel's own stack."""
