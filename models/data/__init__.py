"""Readers of image folders, tables, webdataset tars and embedding folders, and their encoding.

They never change a file; an item that cannot be read becomes a `Reject` with its reason.
"""
