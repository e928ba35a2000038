import numpy as np
import pytest

from index_store.float16 import CHUNK_SIZE, MAX_ASTYPE_SIZE, to_float32


def test_every_float16_keeps_its_value() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    assert len(halves) > MAX_ASTYPE_SIZE
    np.testing.assert_array_equal(
        to_float32(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32)
    )  # -0.0 stays -0.0


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7,), (3, 4, 5), (130, 4, 50), (CHUNK_SIZE // 512 * 3 + 1, 512)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    np.testing.assert_array_equal(to_float32(rows), rows.astype(np.float32))


def test_views_byte_orders_and_float32() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 120)).astype(np.float16)
    for same in (rows[::2], rows[:, ::3], rows.T, rows.astype(">f2")):
        np.testing.assert_array_equal(to_float32(same), same.astype(np.float32))
    singles = rows.astype(np.float32)
    assert to_float32(singles) is singles
