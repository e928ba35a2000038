"""The models of RECO: a frozen CLIP encoder, retrieval from a memory, and a trained fusion.

Read `models.reco` first. This package imports nothing itself: torch takes seconds to import, which
`reco --help` must not.
"""
