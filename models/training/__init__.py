"""Training a fusion: the config, the cached pairs and neighbours, the episodes drawn from them, and
the loop.

The encoder is frozen, so the loop sees arrays only.
"""
