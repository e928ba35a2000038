"""Load tests: programs that speak HTTP to a running service and import none of its packages."""
