"""Tests of what the daemon tells of itself, and of Prometheus with it."""
