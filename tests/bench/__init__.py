"""How fast, how frugal, how soon back: xdpnet beside DPDK's own vhost and af_xdp backend, on one machine.

python -m tests.bench [ROW...]: see __main__ for the command; throughput, latency, scale and neighbours for what
is measured.
"""
