"""Route handlers, one module per family."""
