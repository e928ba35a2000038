"""flag > environment > file > default."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import UsageError
from service.settings import read


def test_the_order(tmp_path: Path) -> None:
    config = tmp_path / "reco.toml"
    config.write_text('port = 1\nhost = "file"\nstore = "file"\n')
    found = read({"port": 3, "host": None, "unrelated": "x"}, config, {"RECO_PORT": "2", "RECO_HOST": "environment"})
    assert (found.port, found.host, found.store, found.model) == (3, "environment", Path("file"), "starter")


def test_keys_are_split_and_never_shown() -> None:
    found = read({}, None, {"RECO_API_KEYS": "a-key, b-key", "RECO_ADMIN_KEY": "c-key"})
    assert [key.get_secret_value() for key in found.api_keys] == ["a-key", "b-key"]
    assert "-key" not in repr(found)


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "70000"), ("DEVICE", "tpu"), ("MAX_BATCH", "0"), ("MAX_QUEUE", "5")]
)
def test_a_wrong_value_is_named_with_its_place(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name.lower()) as caught:
        read({}, None, {f"RECO_{name}": value})
    assert "\n" not in str(caught.value)


def test_a_secret_is_not_repeated_in_an_error(tmp_path: Path) -> None:
    config = tmp_path / "reco.toml"
    config.write_text("admin_key = 12345\n")
    with pytest.raises(UsageError) as caught:
        read({}, config, {})
    assert "12345" not in str(caught.value)
