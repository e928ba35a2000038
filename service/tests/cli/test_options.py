"""Flags made of settings and of dataclasses, and lists of several values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer

from service.cli.options import ListCommand, repeat_flags, with_settings
from service.settings import Settings
from service.tests.cli.in_process import run

VALUES = {
    int: "7",
    float: "0.5",
    str: "some",
    Path: "a/folder",
    "search_devices": "0,2",
    "api_keys": "a-key,b-key",
    "admin_key": "c-key",
    "allowed_hosts": "a.example,b.example",
    "max_queue": "700",
    "max_body_bytes": "2000",
    "max_json_values": "2000",
    "max_reply_bytes": "2000",
    "max_inflight_bytes": "700000000",
    "trusted_proxies": "10.0.0.0/8",
    "max_image_bytes": "2000",
    "max_pixels_in_flight": "90000000",
}


def parse(command: Callable[..., None], *args: str) -> None:
    """Run one decorated command with these arguments."""
    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=ListCommand)(command)
    typer.main.get_command(app).main(list(args), prog_name="probe", standalone_mode=False)


def parse_settings(*args: str) -> Settings:
    """The settings that a command with every flag of `serve` gets."""
    found: list[Settings] = []

    @with_settings(*Settings.model_fields)
    def probe(settings: Settings) -> None:
        found.append(settings)

    parse(probe, *args)
    return found[0]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_a_flag(name: str) -> None:
    kind: Any = Settings.model_fields[name].annotation
    default = Settings.model_fields[name].default
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        found = getattr(parse_settings(flag.replace("--", "--no-") if default else flag), name)
        assert found is not default
        return
    (kind, *_) = [each for each in reversed(get_args(kind)) if each is not type(None)] or [kind]
    text = VALUES.get(name) or VALUES.get(kind, str(kind))  # of a Literal the last value
    found = getattr(parse_settings(flag, text), name)
    assert found == getattr(Settings.model_validate({name: text}), name)
    assert found != default


def test_flags_go_before_the_environment_and_the_file_named_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "reco.toml"
    config.write_text('port = 1\nhost = "file"\n')
    monkeypatch.setenv("RECO_CONFIG", str(config))
    monkeypatch.setenv("RECO_PORT", "2")
    assert parse_settings() == Settings(port=2, host="file")
    assert parse_settings("--port", "3") == Settings(port=3, host="file")


@dataclass(frozen=True)
class Shape:
    """Options of a probe."""

    name: Annotated[str, typer.Option(help="required")]
    kinds: Annotated[list[Literal["round", "square"]], typer.Option()] = field(default_factory=lambda: ["round"])
    sizes: Annotated[list[int], typer.Option()] = field(default_factory=list)
    deep: Annotated[bool, typer.Option("--deep")] = False


def parse_shape(*args: str) -> tuple[list[str], Shape]:
    """The value that a command gets, which has a list of sources and the options of Shape."""
    found: list[tuple[list[str], Shape]] = []

    @with_settings()
    def probe(settings: Settings, sources: Annotated[list[str], typer.Argument()], shape: Shape) -> None:
        found.append((sources, shape))

    parse(probe, *args)
    return found[0]


def test_a_dataclass_becomes_one_flag_a_field() -> None:
    assert parse_shape("a", "--name", "x") == (["a"], Shape("x"))
    given = parse_shape("a", "b", "--name", "x", "--sizes", "1", "2", "--deep", "--kinds", "square", "round")
    assert given == (["a", "b"], Shape("x", ["square", "round"], [1, 2], True))
    assert parse_shape("--sizes", "1", "--sizes", "2", "--name", "x", "a")[1].sizes == [1, 2]


@pytest.mark.parametrize(
    ("args", "word"),
    [(["a"], "--name"), (["a", "--name", "x", "--kinds", "round", "flat"], "flat"), (["--name", "x"], "sources")],
)
def test_a_dataclass_refuses_what_its_types_refuse(args: list[str], word: str) -> None:
    with pytest.raises(typer.TyperException) as caught:
        parse_shape(*args)
    assert word in caught.value.format_message()


def test_a_list_ends_at_the_next_flag() -> None:
    args = ["a", "--k", "1", "5", "10", "--limit", "3", "--k=7", "--", "-x"]
    repeated = ["a", "--k", "1", "--k", "5", "--k", "10", "--limit", "3", "--k=7", "--", "-x"]
    assert list(repeat_flags(args, {"--k"})) == repeated


def completions(line: str, store: Path) -> list[str]:
    """What the shell is offered at the end of a line."""
    words = line.split(" ")
    environ = {"_RECO_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return run(RECO_STORE=str(store), **environ).stdout.split()


def test_the_shell_completes_commands_flags_and_versions(tmp_path: Path) -> None:
    for version in ("things/v1", "things/v2", "others/v1", "things/.v3.partial"):
        (tmp_path / version).mkdir(parents=True)
        if "partial" not in version:
            (tmp_path / version / "manifest.json").touch()
    assert completions("reco mem", tmp_path) == ["memory"]
    assert completions("reco memory sh", tmp_path) == ["show"]
    assert "--shard-pairs" in completions("reco memory build --sh", tmp_path)
    assert completions("reco memory show th", tmp_path) == ["things", "things@v1", "things@v2"]
    assert completions("reco serve --device c", tmp_path) == ["cpu", "cuda"]
