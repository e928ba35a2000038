"""Settings: precedence of the sources, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.settings import OTHER_VARIABLES, Settings, UsageError, read_settings


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without RECO_* variables, to set some in."""
    for name in [name for name in os.environ if name.startswith("RECO_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def refusal(flags: dict[str, object] | None = None, config: Path | None = None) -> str:
    """The one line with which these settings are refused."""
    with pytest.raises(UsageError) as caught:
        read_settings(flags or {}, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flag_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, environ: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "reco.toml"
    config.write_text('port = 1\nhost = "file"\nstore = "file"\n')
    environ.setenv("RECO_PORT", "2")
    environ.setenv("RECO_HOST", "environment")
    found = read_settings({"port": 3, "host": None}, config)
    assert (found.port, found.host, found.store, found.model) == (3, "environment", Path("file"), "starter")


def test_settings_read_their_arguments_alone(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("RECO_PORT", "2")
    assert Settings().port == 8000


def test_keys_are_split_and_never_shown(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("RECO_API_KEYS", "a-key, b-key,")
    environ.setenv("RECO_ADMIN_KEY", "c-key")
    found = read_settings({})
    assert [key.get_secret_value() for key in found.api_keys] == ["a-key", "b-key"]
    assert "-key" not in repr(found)


@pytest.mark.parametrize("devices", ["0, 2", [0, 2], (0, 2)])
def test_lists_come_as_text_or_as_lists(devices: object) -> None:
    assert read_settings({"search_devices": devices}).search_devices == (0, 2)


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "70000"), ("DEVICE", "tpu"), ("MAX_BATCH", "0"), ("MAX_QUEUE", "5"), ("PORT", "x")]
)
def test_a_wrong_value_is_named_with_its_variable(name: str, value: str, environ: pytest.MonkeyPatch) -> None:
    environ.setenv(f"RECO_{name}", value)
    assert refusal().startswith(f"{name.lower()} = {value!r} (from RECO_{name}): ")


def test_a_wrong_value_is_named_with_its_flag_or_file(tmp_path: Path) -> None:
    assert refusal({"max_batch": 0}).startswith("max_batch = 0 (from --max-batch): ")
    config = tmp_path / "reco.toml"
    config.write_text("max_batch = 0\n")
    assert refusal(config=config).startswith(f"max_batch = 0 (in {config}): ")


def test_the_default_queue_must_fit_the_largest_request(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("RECO_MAX_ITEMS", "5000")
    assert refusal() == "max_queue = 1024 (the default): must be at least max_items, which is 5000"


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("RECO_MAX_BATHC", "did you mean RECO_MAX_BATCH?"),
        ("RECO_API_KEY", "did you mean RECO_API_KEYS?"),
        ("RECO_QXZ", "`reco serve --help` lists all"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest(
    variable: str, nearest: str, environ: pytest.MonkeyPatch
) -> None:
    environ.setenv(variable, "secret-64")
    line = refusal()
    assert line.startswith(f"{variable} (in the environment) is no setting: ")
    assert line.endswith(nearest)
    assert "secret-64" not in line


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "reco.toml"
    config.write_text('port = 1\nmax_bathc = 64\napi_key = "x"\n')
    assert refusal(config=config) == f"max_bathc (in {config}) is no setting: did you mean max_batch?"


@pytest.mark.parametrize("variable", sorted(OTHER_VARIABLES))
def test_variables_that_are_no_settings_are_left_alone(variable: str, environ: pytest.MonkeyPatch) -> None:
    environ.setenv(variable, "3")
    assert read_settings({}) == Settings()


def test_what_kubernetes_sets_for_a_service_of_our_name_is_left_alone(environ: pytest.MonkeyPatch) -> None:
    for variable, value in {
        "RECO_SERVICE_HOST": "10.0.0.7",
        "RECO_SERVICE_PORT": "8000",
        "RECO_SERVICE_PORT_HTTP": "8000",
        "RECO_PORT": "tcp://10.0.0.7:8000",
        "RECO_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "RECO_PORT_8000_TCP_ADDR": "10.0.0.7",
        "RECO_GRAFANA_PORT": "tcp://10.0.0.8:3000",
        "RECO_GRAFANA_SERVICE_HOST": "10.0.0.8",
    }.items():
        environ.setenv(variable, value)
    assert read_settings({}) == Settings()


@pytest.mark.parametrize(
    ("variable", "value"), [("API_KEYS", " , "), ("API_KEYS", ","), ("SEARCH_DEVICES", " "), ("ADMIN_KEY", " ")]
)
def test_a_value_of_nothing_is_refused_and_not_served_openly(
    variable: str, value: str, environ: pytest.MonkeyPatch
) -> None:
    environ.setenv(f"RECO_{variable}", value)
    line = refusal()
    assert line.startswith(f"{variable.lower()} = ")
    assert line.endswith("or leave the setting out")


@pytest.mark.parametrize("text", ["api_keys = []", 'api_keys = [""]', 'api_keys = ""', 'admin_key = " "'])
def test_a_value_of_nothing_in_the_file_is_refused(text: str, tmp_path: Path) -> None:
    config = tmp_path / "reco.toml"
    config.write_text(text)
    assert refusal(config=config).endswith("or leave the setting out")


def test_an_empty_variable_counts_as_unset(environ: pytest.MonkeyPatch) -> None:
    """deploy/compose.yaml passes RECO_API_KEYS on, empty where the operator has set none."""
    for name in ("RECO_API_KEYS", "RECO_ADMIN_KEY", "RECO_PORT", "RECO_MAX_BATHC"):
        environ.setenv(name, "")
    assert read_settings({}) == Settings()


def test_a_secret_is_not_repeated_in_an_error(tmp_path: Path) -> None:
    config = tmp_path / "reco.toml"
    config.write_text("admin_key = 12345\n")
    assert "12345" not in refusal(config=config)


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
