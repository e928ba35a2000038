"""The fusion: the network that adds retrieved vectors to a query, its file format and its losses.

`fusion.Fusion.forward` reads like the figure of the paper.
"""
