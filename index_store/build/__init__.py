"""Building a version from a source of pairs: writing shards, resuming after a stop, choosing and
training indexes.

A version exists only once its manifest is written and its folder renamed.
"""
