"""Measuring whether a memory helps: tasks, metrics with confidence intervals, ablations, and
reports.

Every figure compares an enhanced result with the plain one under the same prompts.
"""
