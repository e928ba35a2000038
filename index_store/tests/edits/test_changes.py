import re

import numpy as np
import pytest

from index_store.edits.changes import Change, Delete, Put, decode_change, encode_ids, make_put
from index_store.errors import PairsRefused
from index_store.tests.support.small import build_memory, some_pairs
from index_store.types import Id, Pairs


def manifest(tmp_path_factory: pytest.TempPathFactory, **options: object) -> object:
    return build_memory(tmp_path_factory.mktemp("store"), some_pairs(5, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"ints": True}, {"key_width": 24}])
def test_a_put_survives_encoding(tmp_path_factory: pytest.TempPathFactory, options: dict[str, object]) -> None:
    pairs, found = some_pairs(7, **options), manifest(tmp_path_factory, **options)  # type: ignore[arg-type]
    put = make_put(pairs, found, pairs.ids.dtype.kind.replace("U", "S"))  # type: ignore[arg-type]
    again = decode_change(put.encode())
    assert isinstance(again, Put)
    np.testing.assert_array_equal(again.ids, put.ids)
    assert again.lines == put.lines
    assert set(again.own_keys) == ({"image"} if "key_width" in options else set())
    for one, another in ((again.values, put.values), (again.own_keys, put.own_keys)):
        for side, rows in another.items():
            assert rows.dtype == np.float16
            np.testing.assert_array_equal(one[side], rows)
    np.testing.assert_array_equal(put.values["image"], pairs.image.astype(np.float16))


@pytest.mark.parametrize("ids", [["a", "ä" * 80, "日本"], [-(2**63), 0, 2**63 - 1]])
def test_a_delete_survives_encoding(ids: list[Id]) -> None:
    stored = encode_ids(ids, "i" if isinstance(ids[0], int) else "S", "things@v1")
    again = decode_change(Delete(stored).encode())
    assert isinstance(again, Delete)
    np.testing.assert_array_equal(again.ids, stored)


def test_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    change: Change = make_put(some_pairs(3), manifest(tmp_path_factory), "S")  # type: ignore[arg-type]
    whole = change.encode()
    for wrong in (b"", whole[:3], whole[:30], whole[:-1], whole + b"x", b"\2\0\0\0{}", b"\2\0\0\0[]"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            decode_change(wrong)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            some_pairs(2, 8),
            "things@v1 holds image vectors of width 16 and compares vector keys of width 16, not vectors of width 8",
        ),
        (some_pairs(2, key_width=24), "compares vector keys of width 16, not vectors of width 16 and own keys of 24"),
        (some_pairs(2, ints=True), "id 0 is not one that things@v1 can hold: its ids are strings, write it as one"),
        (
            Pairs(np.array(["a", "a"]), some_pairs(2).image, some_pairs(2).text, some_pairs(2).records),
            "id 'a' comes twice",
        ),
        (
            Pairs(np.array(["a"]), some_pairs(1).image, some_pairs(1).text, [{"caption": "", "x": float("nan")}]),
            "record of id 'a' is not JSON",
        ),
    ],
)
def test_pairs_of_another_kind_are_refused(
    tmp_path_factory: pytest.TempPathFactory, pairs: Pairs, message: str
) -> None:
    with pytest.raises(PairsRefused, match=re.escape(message)):
        make_put(pairs, manifest(tmp_path_factory), "S")  # type: ignore[arg-type]


def test_integer_ids_may_be_given_as_text() -> None:
    assert encode_ids(["12", -3, "0"], "i", "things@v1").tolist() == [12, -3, 0]
    for wrong in ("x", "1.0", "", str(2**63), True, 2**64, " 1"):
        with pytest.raises(PairsRefused, match="whole numbers of 64 bits"):
            encode_ids([wrong], "i", "things@v1")
    with pytest.raises(PairsRefused, match="comes twice"):
        encode_ids([12, "12"], "i", "things@v1")
