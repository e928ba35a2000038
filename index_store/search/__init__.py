"""Nearest-neighbour search in one version: shards, their FAISS indexes, filters, and rows added online.

Every search returns `Hits`; the snapshot turns hits into neighbours with ids and vectors.
"""
