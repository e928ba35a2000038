"""Dynamic batching: a queue of tickets, the batcher that forms batches, and the threads that run
them.

Standard library alone: nothing here knows about images, models or HTTP.
"""
