"""RECO Serve: HTTP, batching, lifecycle and the command line."""
