"""Builds of a version from a source of pairs: writing shards, resuming, choosing and training
indexes.

A version exists only once its manifest is written and its folder renamed.
"""
