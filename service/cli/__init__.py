"""The command line `reco`: one module per command or group of commands, assembled in `main`.

Modules here import torch, faiss and the web framework inside functions, so that `--help` is fast.
"""
