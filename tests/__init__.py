"""Tests of xdpnet; deploy/bootstrap.sh test runs them all."""
