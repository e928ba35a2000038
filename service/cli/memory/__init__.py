"""`reco memory`: list, check, build, import, compact, delete and activate versions of memories.

Each command is one function; what a build would take is estimated in `dry_run`.
"""
