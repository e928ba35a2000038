"""Keys, limits, the token and the hosts, each alone."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import IO

import pytest

from service.access import keys_file, rates
from service.access.gate import Gate
from service.access.hosts import AllowedHosts, is_within
from service.access.keys import Key
from service.access.keys_file import KeysFile
from service.access.token import TOKEN_FILE, keep_token, read_token
from service.api.capacity import ForwardedCallers
from service.errors import CapacityExceeded, MissingKey, RateExceeded, WrongHost, WrongKey
from service.observability.logging import RequestContext
from service.server.connection_limits import ConnectionLimits
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
    for no_toml in (b"\xff\xfe", b"[keys.shop]\nrequests_per_s = " + b"1" * 5000):
        path.write_bytes(no_toml)
        clock[0] += keys_file.CHECK_S
        assert len(file.current()) == 3
    path.unlink()
    clock[0] += keys_file.CHECK_S
    assert len(file.current()) == 3
    assert caplog.text.count("the keys stay as they were") == 6
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


def test_bytes_that_are_no_text_refuse_to_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for content in (b"\xff\xfe", b"[keys.shop]\nrequests_per_s = " + b"1" * 5000):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="is not TOML"):
            gate(tmp_path, keys_file=path)


def test_a_keys_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, late = write(tmp_path / "keys.toml", FILE), write(tmp_path / "late.toml", FILE.replace("shop", "late"))
    read = Path.open

    def change_after(opened: Path, mode: str) -> IO[bytes]:
        file = read(opened, mode)
        late.replace(path)
        return file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", change_after)
        file = KeysFile(path)
    assert [key.name for key in file.current()] == ["shop", "editor"]
    clock[0] += keys_file.CHECK_S
    assert [key.name for key in file.current()] == ["late", "editor"]


@pytest.mark.parametrize(
    "settings",
    [
        {"api_keys": ("shop-secret",)},
        {"admin_key": "editor-secret"},
        {"api_keys": ("one-secret",), "admin_key": "one-secret"},
    ],
)
def test_one_secret_under_two_names_refuses_to_start(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="are the same key: give each its own") as refused:
        gate(tmp_path, keys_file=write(tmp_path / "keys.toml", FILE), **settings)
    assert "secret" not in str(refused.value)


def test_a_key_of_the_settings_does_not_become_another_by_the_file(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.toml", FILE)
    guard = gate(tmp_path, keys_file=path, api_keys=("reader-secret",))
    for secret in ("reader-secret", str(guard.token)):
        write(path, FILE + f'[keys.root]\nkey = "{secret}"\nrole = "admin"\n')
        clock[0] += keys_file.CHECK_S
        with pytest.raises(WrongKey):
            guard.admit(bearer("reader-secret"), "admin", over_unix_socket=False)
        assert guard.admit(bearer(str(guard.token)), "admin", over_unix_socket=False).name == "token"
    assert "RECO_API_KEYS[0] and root are the same key" in caplog.text
    assert "token and root are the same key" in caplog.text


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


def test_bytes_that_came_after_a_rest_are_charged_in_full(clock: list[float]) -> None:
    allowance = rates.Allowance(100, "bytes")
    clock[0] += 60  # the allowance is full, and no more than that
    allowance.charge(400)
    with pytest.raises(RateExceeded) as refused:
        allowance.spend(1)
    assert refused.value.retry_after_s == pytest.approx(3.01)


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


@pytest.mark.parametrize(
    ("address", "networks", "inside"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
        ("::ffff:10.1.2.3", "::ffff:0:0/96", True),
        ("::ffff:11.1.2.3", "10.0.0.0/8", False),
        ("::1", "127.0.0.0/8,::1/128", True),
        ("fe80::1%eth0", "10.0.0.0/8", False),
        ("unknown", "0.0.0.0/0", False),
    ],
)
def test_an_address_is_of_a_network_in_either_notation(address: str, networks: str, inside: bool) -> None:
    assert is_within(address, [ip_network(each) for each in networks.split(",")]) is inside


def test_the_caller_of_a_request_is_the_key_that_it_has_now() -> None:
    scope: dict[str, dict[str, Key]] = {"state": {}}
    request = RequestContext("id", "GET", scope)
    assert request.caller is None
    scope["state"]["key"] = Key("shop", "read")
    assert request.caller == "shop"


def test_a_proxy_is_trusted_in_either_notation() -> None:
    limits = ConnectionLimits(trusted=(IPv4Network("10.0.0.0/8"),))
    assert limits.trusts("::ffff:10.1.2.3")
    assert not limits.trusts("::ffff:192.0.2.1")
    callers = ForwardedCallers(1, limits.trusted)
    scope = {"client": ("::ffff:10.1.2.3", 1), "headers": [(b"x-forwarded-for", b"192.0.2.1, ::ffff:10.9.9.9")]}
    with (
        callers.count(scope),
        pytest.raises(CapacityExceeded, match=r"192\.0\.2\.1 has 1 requests"),
        callers.count(scope),
    ):
        pass


def test_a_keyless_service_on_every_interface_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for host in ("127.0.0.1", "::1", "localhost"):
        gate(tmp_path, host=host)
    gate(tmp_path, host="0.0.0.0", api_keys=("shop-secret",))
    assert "without API keys" not in caplog.text
    gate(tmp_path, host="0.0.0.0")
    assert "listening on 0.0.0.0 without API keys" in caplog.text
