"""The routes, one file per family. A handler parses, calls one method, wraps."""
