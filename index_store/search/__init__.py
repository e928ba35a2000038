"""Nearest-neighbour search in one version: shards, their faiss indexes, filters, and edits on top.

Searches return `Hits`, which are row numbers; the snapshot turns them into ids and vectors.
"""
