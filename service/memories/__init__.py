"""The memories being served: which snapshot answers a name, swaps, online edits, and what is
measured about them.

The registry alone decides what is served.
"""
