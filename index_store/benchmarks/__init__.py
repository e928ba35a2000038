"""Programs that measure the memory beside bare faiss. Part of the repository, not of the package that is installed."""
