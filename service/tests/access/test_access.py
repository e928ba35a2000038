"""Keys, limits, the token and the hosts, each alone."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.access import keys_file, rates
from service.access.gate import Gate
from service.access.hosts import AllowedHosts
from service.access.keys_file import KeysFile
from service.access.token import TOKEN_FILE, keep_token, read_token
from service.errors import MissingKey, RateExceeded, WrongHost, WrongKey
from service.settings import Settings, UsageError

FILE = """
[keys.shop]
key = "shop-secret"
role = "read"
requests_per_s = 2

[keys.editor]
sha256 = "{editor}"
role = "write"
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds that rates and files see; tests set it."""
    now = [100.0]
    monkeypatch.setattr("service.access.rates.time.monotonic", lambda: now[0])
    return now


def write(path: Path, text: str) -> Path:
    from hashlib import sha256

    path.write_text(text.replace("{editor}", sha256(b"editor-secret").hexdigest()))
    path.chmod(0o600)
    return path


def bearer(key: str) -> str:
    return f"Bearer {key}"


def gate(tmp_path: Path, **settings: object) -> Gate:
    return Gate(Settings(store=tmp_path / "store", **settings))  # type: ignore[arg-type]


def test_a_keys_file_gives_names_roles_and_limits(tmp_path: Path) -> None:
    guard = gate(tmp_path, keys_file=write(tmp_path / "keys.toml", FILE))
    assert guard.admit(bearer("shop-secret"), "read", over_unix_socket=False).name == "shop"
    assert guard.admit(bearer("editor-secret"), "write", over_unix_socket=False).name == "editor"
    assert guard.admit(bearer("editor-secret"), "read", over_unix_socket=False).name == "editor"
    for key, role in (("shop-secret", "write"), ("editor-secret", "admin")):
        with pytest.raises(WrongKey, match=f"this route needs {role}"):
            guard.admit(bearer(key), role, over_unix_socket=False)  # type: ignore[arg-type]
    for header in ("", "Basic shop-secret", "Bearer ", "Bearer shop-secre", "Bearer ünknown", "Bearer \udcff"):
        with pytest.raises(MissingKey):
            guard.admit(header, "read", over_unix_socket=False)
    assert guard.token is not None  # no admin key in the file
    assert guard.admit(bearer(guard.token), "admin", over_unix_socket=False).name == "token"
    assert "secret" not in repr(vars(guard))


def test_a_changed_keys_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.toml", FILE)
    file = KeysFile(path)
    kept = file.current()[0].usage
    write(path, FILE + '[keys.late]\nkey = "late-secret"\nrole = "admin"\n')
    clock[0] += keys_file.CHECK_S
    assert [key.name for key in file.current()] == ["shop", "editor", "late"]
    assert file.current()[0].usage is kept  # what was used stays used
    for broken in ('[keys.shop]\nkey = "half a secret', "", '[keys.shop]\nkey = "shop-secret"\nrole = "root"\n'):
        write(path, broken)
        clock[0] += keys_file.CHECK_S
        assert [key.name for key in file.current()] == ["shop", "editor", "late"]
    path.unlink()
    clock[0] += keys_file.CHECK_S
    assert len(file.current()) == 3
    assert caplog.text.count("the keys stay as they were") >= 3
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no key"),
        ("[keys]\n", "names no key"),
        ('[key.shop]\nkey = "12345678"\n', "key is no table of a keys file"),
        ('[keys.shop]\nkey = "12345678"\n', r"keys\.shop\.role: Field required"),
        ('[keys.shop]\nrole = "read"\n', "give either key or sha256"),
        ('[keys.shop]\nkey = "1234567"\nrole = "read"\n', r"keys\.shop\.key"),
        ('[keys.shop]\nkey = "12345678"\nrole = "read"\nrequest_per_s = 1\n', "did you mean requests_per_s"),
        ('[keys.shop]\nkey = "12345678"\nrole = "read"\nitems_per_s = 0\n', r"keys\.shop\.items_per_s"),
        ('[keys."a b"]\nkey = "12345678"\nrole = "read"\n', "is no name of a key"),
        ('[keys.a]\nkey = "12345678"\nrole = "read"\n[keys.b]\nkey = "12345678"\nrole = "admin"\n', "the same key"),
        ('[keys.shop]\nkey = "12345678', "is not TOML"),
    ],
)
def test_a_keys_file_that_cannot_be_used_refuses_to_start(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        gate(tmp_path, keys_file=write(tmp_path / "keys.toml", text))
    assert "1234567" not in str(refused.value)
    with pytest.raises(UsageError, match="No such file"):
        gate(tmp_path, keys_file=tmp_path / "missing.toml")


def test_a_rate_is_paid_off_and_never_refuses_for_ever(clock: list[float]) -> None:
    allowance = rates.Allowance(4, "items")
    allowance.spend(3)
    with pytest.raises(RateExceeded) as refused:
        allowance.spend(2)
    assert refused.value.retry_after_s == pytest.approx(0.25)
    clock[0] += 0.25
    allowance.spend(2)
    clock[0] += 60
    allowance.spend(400)  # more than a second's worth, once the allowance is full
    clock[0] += 99
    with pytest.raises(RateExceeded):
        allowance.spend(1)
    clock[0] += 1.5
    allowance.spend(1)
    slow = rates.Allowance(0.5, "requests")
    slow.spend(1)
    clock[0] += 1.9
    with pytest.raises(RateExceeded):
        slow.spend(1)


def test_a_token_is_made_once_with_mode_600(tmp_path: Path) -> None:
    store, start = tmp_path / "store", threading.Barrier(8)

    def begin(_: int) -> str:
        start.wait()
        return keep_token(store)

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(begin, range(8)))
    assert made == {read_token(store)}
    assert [path.name for path in store.iterdir()] == [TOKEN_FILE]
    assert (store / TOKEN_FILE).stat().st_mode & 0o777 == 0o600
    assert keep_token(store) in made


@pytest.mark.parametrize("damage", ["open", "torn", "a link"])
def test_a_token_that_is_no_secret_is_replaced(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    before, path = keep_token(tmp_path), tmp_path / TOKEN_FILE
    if damage == "open":
        path.chmod(0o644)
    elif damage == "torn":
        os.truncate(path, 5)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert read_token(tmp_path) is None
    after = keep_token(tmp_path)
    assert after not in ("", before)
    assert read_token(tmp_path) == after
    assert "a new one replaces it" in caplog.text
    assert after not in caplog.text


def test_a_store_that_cannot_be_written_gets_a_token_for_one_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert len(keep_token(tmp_path / "file")) > 32
    assert "it changes with each start" in caplog.text


def test_no_token_is_made_where_an_admin_key_is_set(tmp_path: Path) -> None:
    assert gate(tmp_path, admin_key="swordfish").token is None
    admin = '[keys.root]\nkey = "root-secret"\nrole = "admin"\n'
    assert gate(tmp_path, keys_file=write(tmp_path / "keys.toml", admin)).token is None
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "10.1.2.3:8000", "[::1]:80", "a.localhost", "Box", ""])
def test_addresses_and_own_names_are_answered(host: str) -> None:
    if host:
        AllowedHosts((), "box", keyless=True).check(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil", "1e3", ""]
)
def test_any_other_name_is_refused_where_no_key_is_asked_for(host: str) -> None:
    with pytest.raises(WrongHost, match="RECO_ALLOWED_HOSTS"):
        AllowedHosts((), "127.0.0.1", keyless=True).check(host)
    with pytest.raises(WrongHost):
        AllowedHosts(("shop.example", "*.shop.example"), "127.0.0.1", keyless=False).check(host)
    AllowedHosts((), "127.0.0.1", keyless=False).check(host)  # a page of another site has no key
    AllowedHosts(("*",), "127.0.0.1", keyless=True).check(host)


def test_the_operators_names_are_answered() -> None:
    hosts = AllowedHosts(("shop.example", "*.cluster.local"), "0.0.0.0", keyless=True)
    for host in ("shop.example", "SHOP.example:443", "reco.svc.cluster.local:8000", "10.0.0.1"):
        hosts.check(host)


def test_a_keyless_service_on_every_interface_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for host in ("127.0.0.1", "::1", "localhost"):
        gate(tmp_path, host=host)
    gate(tmp_path, host="0.0.0.0", api_keys=("shop-secret",))
    assert "without API keys" not in caplog.text
    gate(tmp_path, host="0.0.0.0")
    assert "listening on 0.0.0.0 without API keys" in caplog.text
