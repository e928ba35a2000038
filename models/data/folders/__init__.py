"""Readers of folders: by a table of captions, or by a walk with sidecars or class names."""
