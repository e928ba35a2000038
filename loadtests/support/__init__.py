"""Shared by all load tests: prepared requests, photos, readings of /metrics, reports, pictures.

Also the start of a service, and the requests of hostile callers.
"""
