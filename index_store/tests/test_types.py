from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from index_store.errors import PairsRefused
from index_store.tests.support.small import some_pairs, unit_rows
from index_store.types import Pairs, other


def test_other_side() -> None:
    assert (other("image"), other("text")) == ("text", "image")


def test_values_and_keys() -> None:
    pairs = some_pairs(5, 8, key_width=12)
    assert len(pairs) == 5
    assert pairs.keys("image") is pairs.image_key
    assert pairs.keys("text") is pairs.values("text") is pairs.text
    assert (pairs.has_own_keys("image"), pairs.has_own_keys("text")) == (True, False)


def test_float16_rows_count_as_unit_rows() -> None:
    wide = unit_rows(50, 1280, 0).astype(np.float16)
    assert len(replace(some_pairs(50), image=wide, text=wide)) == 50


def spoiled(row: int, value: float) -> np.ndarray:
    rows = unit_rows(60, 16, 0)
    rows[row] = value
    return rows


REFUSALS: dict[str, tuple[Callable[[Pairs], dict[str, Any]], str]] = {
    "nan": (lambda p: {"image": spoiled(7, np.nan)}, "image vectors: row 7 has length nan"),
    "infinite": (lambda p: {"text": spoiled(3, np.inf)}, "text vectors: row 3 has length inf"),
    "zero row": (lambda p: {"image": spoiled(59, 0)}, "image vectors: row 59 has length 0"),
    "not unit": (lambda p: {"image": p.image * 1.01}, "row 0 has length 1.01"),
    "keys not unit": (lambda p: {"text_key": p.text * 2}, "text keys: row 0 has length 2"),
    "misaligned": (lambda p: {"image": p.image[:-1]}, r"image vectors must be \(60, width\) beside 60 ids"),
    "keys misaligned": (lambda p: {"image_key": p.image[1:]}, r"image keys must be \(60, width\)"),
    "two widths": (lambda p: {"text": unit_rows(60, 8, 0)}, "one width"),
    "flat": (lambda p: {"image_key": p.image[:, 0]}, r"image keys must be \(60, width\)"),
    "float64": (lambda p: {"image_key": p.image.astype(np.float64)}, "float16 or float32, not float64"),
    "few records": (lambda p: {"records": p.records[:-1]}, "59 records beside 60 ids"),
    "no caption": (lambda p: {"records": [{"price": 1}] * 60}, 'row 0 has no "caption"'),
    "caption is not text": (lambda p: {"records": [{"caption": 3}] * 60}, 'row 0 has no "caption"'),
    "id in record": (lambda p: {"records": [{"caption": "", "id": 3}] * 60}, 'field "id"'),
    "float ids": (lambda p: {"ids": np.arange(60.0)}, "int64 or str, not float64"),
    "object ids": (lambda p: {"ids": np.array(["a"] * 60, object)}, "int64 or str, not object"),
    "small ids": (lambda p: {"ids": np.arange(60, dtype=np.int32)}, "int64 or str, not int32"),
    "empty id": (lambda p: {"ids": np.array(["a", ""] * 30)}, "id ''"),
    "long id": (lambda p: {"ids": np.array(["é" * 129] * 60)}, "1 to 256 bytes"),
    "nul in id": (lambda p: {"ids": np.array(["a\0b"] * 60)}, "without NUL"),
    "half a surrogate": (lambda p: {"ids": np.array(["\udc80"] * 60)}, "valid UTF-8"),
}


@pytest.mark.parametrize(("value", "length"), [(np.nan, "nan"), (np.inf, "inf")])
def test_rows_that_are_not_finite_are_named_in_float16_too(value: float, length: str) -> None:
    rows = unit_rows(60, 512, 0).astype(np.float16)
    rows[7, 100] = value
    with pytest.raises(PairsRefused, match=f"image vectors: row 7 has length {length}, not 1"):
        replace(some_pairs(), image=rows, text=unit_rows(60, 512, 1))


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_rows_are_refused_at_construction(case: str) -> None:
    change, message = REFUSALS[case]
    pairs = some_pairs()
    with pytest.raises(PairsRefused, match=message) as refused:
        replace(pairs, **change(pairs))
    assert "\n" not in str(refused.value)
