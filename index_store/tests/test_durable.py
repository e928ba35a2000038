import hashlib
from pathlib import Path

import pytest

from index_store.durable import digest, replace_text, writing
from index_store.errors import StoreUnwritable


def test_digest_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert digest(tmp_path / "file") == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_replace_text_leaves_no_trace(tmp_path: Path) -> None:
    for text in ("one\n", "zwei ä\n"):
        replace_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/secret/place"), "cannot write the rows: No space left on device; free some room"),
        (OSError("odd"), "cannot write the rows: odd; free some room"),
        (
            RuntimeError("Error in virtual size_t F() at /build/io.cpp:170: Error: 'wrote' failed\nmore"),
            "cannot write the rows: 'wrote' failed; free",
        ),
        (RuntimeError("plain"), "cannot write the rows: plain; free some room"),
    ],
)
def test_failures_to_write_become_one_line(error: Exception, message: str) -> None:
    with pytest.raises(StoreUnwritable) as refused, writing("the rows"):
        raise error
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing("the rows"):
        raise ZeroDivisionError
