"""The XDP program of a netdev port: steer.c, and what compiles and loads it."""
