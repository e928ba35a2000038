"""Measurements of `loadtests.bench`, beside open_clip in a process of its own (`bare_model`)."""
