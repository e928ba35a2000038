"""What `loadtests.bench` measures, beside open_clip alone in a process of its own (`yardstick`).

Each function of `figures` is one figure with its targets.
"""
