"""Tests of the daemon as a process, of its parts, and of the commands around it."""
