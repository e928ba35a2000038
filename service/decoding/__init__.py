"""Decoding of images in processes that can be killed.

    event loop ─ decoder ─ worker ══ socket: image bytes, answer ══> child: one decoding process
                    │                 shared memory: (3, H, W) uint8 <══   │ forked by
                    └── fork_server ══ control socket: fork, end ══> child: the fork server

The children import Pillow, numpy and our reader of images, never torch. An image that takes too
long, too much memory or the process itself costs its own caller an error, and nobody else more
than the milliseconds of a fork.
"""
