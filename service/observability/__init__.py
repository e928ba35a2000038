"""What an operator sees: Prometheus metrics, logs and traces."""
