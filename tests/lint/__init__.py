"""What the house has to be, as tests: floors, counters, capabilities, the catalogue of hostile inputs."""
