"""The frozen CLIP encoder: loading open_clip models, their two towers, preprocessing, optimisation.

The rest of the project uses `encoder.Encoder` alone.
"""
