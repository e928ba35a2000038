"""Shared parts of all load tests: prepared requests, photos, metrics, reports, pictures."""
