"""Everything the models refuse, as one drawn tree.

    ModelError
    ├── EncoderUnavailable      the CLIP cannot be loaded
    ├── IncompatibleFusion      the fusion file does not fit what is running
    ├── ConfigError             an option or a training file asks for what cannot be done
    ├── DataError               a source of samples cannot be read at all
    ├── TrainingFailed          a training run ended without a usable result
    └── ImageError              one image is refused; its neighbours are not
        ├── UnsupportedImage    not one of the image types read here
        ├── ImageTooLarge       more pixels than allowed, by its header
        └── BrokenImage         the right type, but it does not decode

Every message is one line: the value, the limit, the remedy; file names, never whole paths.
"""


class ModelError(Exception):
    """Anything the models refuse to do."""


class EncoderUnavailable(ModelError):
    """The encoder cannot be loaded: unknown name, no hub, a bad weights file, no such device."""


class IncompatibleFusion(ModelError):
    """The fusion file is damaged, or was trained on another encoder or width than the one running."""


class ConfigError(ModelError):
    """An option or a configuration file asks for something impossible, such as more neighbours than the fusion takes."""


class DataError(ModelError):
    """A source of samples cannot be opened or understood as a whole; a single bad item is a Reject instead."""


class TrainingFailed(ModelError):
    """Training stopped without a usable result, for instance because the loss was no longer finite."""


class ImageError(ModelError):
    """One image is refused."""


class UnsupportedImage(ImageError):
    """The bytes are not an image of a type read here."""


class ImageTooLarge(ImageError):
    """The image's header announces more pixels than the limit."""


class BrokenImage(ImageError):
    """The bytes begin like an image and do not decode: truncated or damaged."""
