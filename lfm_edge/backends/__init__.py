"""What the exporter and the runtime of one backend share."""
