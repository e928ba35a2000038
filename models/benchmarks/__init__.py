"""Programs that measure training beside bare PyTorch and bare faiss.

Part of the repository, not of the package that is installed.
"""
