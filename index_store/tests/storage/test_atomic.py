import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest

from index_store.errors import StoreUnwritable
from index_store.storage.atomic import BLOCK_BYTES, file_digest, first_difference, replace_text, translate_write_errors


def test_file_digest(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "crc32": f"{zlib.crc32(data):08x}",
    }
    (tmp_path / "file").write_bytes(b"")
    assert file_digest(tmp_path / "file") == {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0, "crc32": ""}


def test_a_large_file_has_a_crc_per_block(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 7)
    (tmp_path / "file").write_bytes(data)
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    assert file_digest(tmp_path / "file")["crc32"] == "".join(f"{zlib.crc32(block):08x}" for block in blocks)


@pytest.mark.parametrize(
    ("found", "blocks"),
    [
        *(("abc", None), ("Abc", (0, 0)), ("aBc", (1, 1)), ("aBC", (1, 2)), ("AbC", (0, 0)), ("ABC", (0, 2))),
        *(
            ("ab", (2, 2)),
            ("a", (1, 2)),
            ("", (0, 2)),
            ("abcd", (3, 3)),
            ("Ab", (0, 0)),
            ("aB", (1, 2)),
        ),  # truncated, or longer
    ],
)
def test_first_difference_is_the_first_run_of_wrong_blocks(found: str, blocks: tuple[int, int] | None) -> None:
    sums = ["".join(letter * 8 for letter in text) for text in (found, "abc")]
    where = None if blocks is None else (blocks[0] * BLOCK_BYTES, (blocks[1] + 1) * BLOCK_BYTES - 1)
    assert first_difference(*sums) == where


def test_replace_text_leaves_no_temporary_file(tmp_path: Path) -> None:
    for text in ("one\n", "zwei ä\n"):
        replace_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "/secret/place"),
            "cannot write the rows: No space left on device; free some room",
        ),
        (OSError("odd"), "cannot write the rows: odd; free some room"),
        (
            RuntimeError("Error in virtual size_t F() at /build/io.cpp:170: Error: 'wrote' failed\nmore"),
            "cannot write the rows: 'wrote' failed; free",
        ),
        (RuntimeError("plain"), "cannot write the rows: plain; free some room"),
    ],
)
def test_write_errors_become_one_line(error: Exception, message: str) -> None:
    with pytest.raises(StoreUnwritable) as refused, translate_write_errors("the rows"):
        raise error
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), translate_write_errors("the rows"):
        raise ZeroDivisionError
