"""Benchmarks of parts of the service without HTTP, where loading the data over HTTP would take an
hour.
"""
