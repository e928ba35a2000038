"""The path of an item through the model: decoding, the worker of each tower, and the stages it
runs.

The watchdog sends test items through idle towers.
"""
