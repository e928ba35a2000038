"""The messages between the service and its decoding processes, and those to the fork server.

request      length of the image, whether its pixels are granted; then the image
answer       kind and number; bytes follow where the kind says so

PIXELS       number bytes of pixels are in the shared memory
PIXELS_SENT  number bytes of pixels follow
REFUSED      number bytes of JSON follow: the name of an ImageError and its message
ASKS         decoding needs number pixels of memory: send the image again once they are granted
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TypedDict

from models.encoder.preprocess import Crop
from models.errors import BrokenImage, CostlyImage, ImageError, ImageTooLarge, UnsupportedImage

REQUEST = struct.Struct("<IB")
ANSWER = struct.Struct("<BI")
PIXELS, PIXELS_SENT, REFUSED, ASKS = 1, 2, 3, 4
FOLLOWED = (PIXELS_SENT, REFUSED)
MAX_REFUSAL_BYTES = 2**16
MAX_MESSAGE = 1000

_ERRORS: dict[str, type[ImageError]] = {
    kind.__name__: kind for kind in (BrokenImage, CostlyImage, ImageTooLarge, UnsupportedImage)
}


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """What a decoding process does with every image.

    max_pixels: of one image.  free_pixels: up to here it decodes unasked.  cpu_s: CPU seconds of
    one image.
    """

    crop: Crop
    max_pixels: int
    free_pixels: int
    cpu_s: float

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one decoded image: 3 * H * W."""
        return 3 * self.crop.size[0] * self.crop.size[1]

    def as_dict(self) -> dict[str, object]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, object]) -> DecodeJob:
        """The inverse of `as_dict`."""
        crop = dict(given["crop"])  # type: ignore[call-overload]
        height, width = crop.pop("size")
        return cls(**{**given, "crop": Crop((height, width), **crop)})  # type: ignore[arg-type]


class Order(TypedDict, total=False):
    """To the fork server, as JSON; one of: fork, a `DecodeJob.as_dict()`; end, the id of a process.

    With `fork` go a socket, and shared memory where there is some.
    """

    fork: dict[str, object]
    end: int


class OrderReply(TypedDict, total=False):
    """To `fork`: pid, or error.  To `end`: status, the exit code or minus the ending signal."""

    pid: int
    error: str
    status: int


def allowed_numbers(job: DecodeJob, *, granted: bool, shared: bool) -> dict[int, range]:
    """The numbers that an answer of each kind may have; of a kind that is missing, none.

    granted: whether the image has its pixels already.  shared: whether there is shared memory.
    """
    asked = range(0) if granted else range(job.free_pixels + 1, job.max_pixels + 1)
    pixels = range(job.pixel_bytes, job.pixel_bytes + 1)
    return {PIXELS if shared else PIXELS_SENT: pixels, REFUSED: range(1, MAX_REFUSAL_BYTES + 1), ASKS: asked}


def pack_refusal(error: ImageError) -> bytes:
    """The bytes of a refusal."""
    return json.dumps([type(error).__name__, str(error)[:MAX_MESSAGE]]).encode()


def unpack_refusal(data: bytes) -> ImageError | None:
    """The error of a refusal, None where it is none: a process that hostile bytes took over may
    send anything.
    """
    with suppress(ValueError, RecursionError):
        match json.loads(data):
            case [str(name), str(message)] if name in _ERRORS:
                printable = (each if each.isprintable() else "?" for each in message[:MAX_MESSAGE])
                return _ERRORS[name]("".join(printable))
    return None
