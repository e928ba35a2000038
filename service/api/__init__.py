"""HTTP: middleware, keys, parsing of requests, replies, and one module per family of routes.

A handler parses, calls one method of the engine, and wraps the result.
"""
