"""Tests of vhost-user over a real socket, with a scripted frontend."""
