"""Who runs the daemon: the control socket, signals, the service manager."""
