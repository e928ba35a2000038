"""The models of RECO: a frozen CLIP, a memory it asks, a fusion that listens. Read `models.reco` first.

Nothing is imported here: torch takes seconds, and `reco --help` has none to spare.
"""
