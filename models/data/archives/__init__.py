"""Readers of webdataset archives."""
