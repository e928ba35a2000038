"""The command line `reco`: one module per group of commands.

Modules here import torch, faiss and the web framework inside functions, so that `reco --help` starts fast.
"""
