"""Files of a memory on disk: manifest, columns, blocks, checksums, and durable file operations.

No module here searches; `index_store/FORMAT.md` describes the same files for other programs.
"""
