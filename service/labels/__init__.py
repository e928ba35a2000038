"""Label sets: storing them, embedding them once per memory version, and scoring items
against them.
"""
