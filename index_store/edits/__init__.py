"""Online edits of a version: their encoding, the journal on disk, and their effect in memory.

An edit is appended and synced to the journal before the snapshot that shows it is served.
"""
