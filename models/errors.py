"""Errors raised by the models, as a tree.

    ModelError
    ├── EncoderUnavailable      the CLIP model cannot be loaded
    ├── IncompatibleFusion      the fusion file does not fit the encoder in use
    ├── ConfigError             an option or a configuration file holds an impossible value
    ├── DataError               a source of samples cannot be read as a whole
    ├── TrainingFailed          a training run ended without a usable result
    └── ImageError              one image is refused, the others of its batch are not
        ├── UnsupportedImage    not one of the accepted image formats
        ├── ImageTooLarge       more pixels than allowed, according to its header
        ├── CostlyImage         takes more time or memory than its size explains
        └── BrokenImage         an accepted format that does not decode

Every message is one line with the value, the limit and the remedy; it names files, never whole
paths.
"""


class ModelError(Exception):
    """Any error raised by the models on purpose."""


class EncoderUnavailable(ModelError):
    """The encoder cannot be loaded: unknown name, no hub access, bad weights, or missing device."""


class IncompatibleFusion(ModelError):
    """The fusion file is damaged, or was trained for another encoder or width."""


class ConfigError(ModelError):
    """An option or a configuration file holds an impossible value, such as k above max_k."""


class DataError(ModelError):
    """A source of samples cannot be read as a whole; a single bad item becomes a Reject instead."""


class TrainingFailed(ModelError):
    """Training stopped without a usable result, for instance when the loss was not finite."""


class ImageError(ModelError):
    """One image is refused."""


class UnsupportedImage(ImageError):
    """The bytes are not in one of the accepted image formats."""


class ImageTooLarge(ImageError):
    """The image's header states more pixels than the limit."""


class CostlyImage(ImageError):
    """Decoding takes more time, memory or parts than an image of its size needs."""


class BrokenImage(ImageError):
    """The bytes begin like an image but do not decode: truncated or damaged."""
