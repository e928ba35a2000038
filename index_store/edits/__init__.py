"""Online edits of one version: the journal on disk and the overlay that shows the edits in memory.

An edit is written to the journal before it is visible.
"""
