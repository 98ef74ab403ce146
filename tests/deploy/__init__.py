"""What README and deploy/ say, done in a fresh Debian with real systemd and libvirt: run.sh."""
