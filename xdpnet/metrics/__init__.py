"""What the daemon tells about itself: one snapshot, shown as a table, as JSON and as Prometheus metrics."""
