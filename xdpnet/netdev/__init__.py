"""A network interface as a port of the bridge."""
