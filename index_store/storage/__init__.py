"""How a memory lies on disk: the manifest, the column files, checksums, and durable file operations.

Nothing here searches; `index_store/FORMAT.md` describes the same bytes for readers of other languages.
"""
