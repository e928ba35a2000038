"""The frozen CLIP: loading any open_clip model, its two towers, preprocessing, and faster ways to run it.

`encoder.Encoder` is the only face that the rest of the project sees.
"""
