"""Measurements of the service from the inside, where HTTP would take an hour to bring the data in.

Not installed.
"""
