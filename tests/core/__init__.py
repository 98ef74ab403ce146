"""Tests of the C core, driven by a guest's side in Python on memory that is shared as a guest's is."""
