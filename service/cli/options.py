"""Flags of the commands: generated from the fields of `Settings` and of dataclasses of options."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from service.server.malloc import set_malloc_options
from service.settings import Settings, read_settings

STORE = ("store",)
MODEL = (*STORE, "model", "pretrained", "tokenizer", "fusion", "device", "precision")
METAVARS = {
    "store": "DIR",
    "memory": "NAME",
    "model": "NAME|FILE",
    "pretrained": "TAG|FILE",
    "tokenizer": "DIR",
    "fusion": "none|mean|core|FILE",
    "host": "ADDRESS",
    "search_devices": "N,N,…",
    "api_keys": "KEY,KEY,…",
    "admin_key": "KEY",
    "keys_file": "TOML",
    "allowed_hosts": "NAME,NAME,…",
    "unix_socket": "PATH",
}

Config = Annotated[
    Path | None,
    typer.Option(
        metavar="TOML",
        envvar="RECO_CONFIG",
        show_envvar=False,
        help="a file of settings; flags and RECO_* variables go before it",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="log more, and show the stack of an error")]


class ListCommand(TyperCommand):
    """A command whose list options take several values at once, as in `--k 1 5 10`.

    typer itself takes one value each time, as in `--k 1 --k 5 --k 10`; both work.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, parsed once every further value of a list has its own flag."""
        lists = {flag for each in self.params if getattr(each, "multiple", False) for flag in each.opts}
        return super().parse_args(ctx, list(repeat_flags(args, lists)))


def repeat_flags(args: Iterable[str], lists: Collection[str]) -> Iterator[str]:
    """Put its flag before each further value of a list: up to the next flag all are values.

    >>> list(repeat_flags(["a.tar", "--k", "1", "5", "--limit", "3"], {"--k"}))
    ['a.tar', '--k', '1', '--k', '5', '--limit', '3']
    """
    flag, first = "", False
    for arg in args:
        if arg.startswith("-"):
            flag, first = (arg, True) if arg in lists else ("", False)
        elif flag and not first:
            yield flag
        else:
            first = False
        yield arg


def complete_memory(ctx: typer.Context, incomplete: str) -> list[str]:
    """NAME and NAME@VERSION of the finished versions in the store, for the shell's completion."""
    store = Path(ctx.params.get("store") or os.environ.get("RECO_STORE") or Settings.model_fields["store"].default)
    folders = [path.parent for path in sorted(store.glob("[!.]*/[!.]*/manifest.json"))]
    names = dict.fromkeys(folder.parent.name for folder in folders)
    found = [*names, *(f"{folder.parent.name}@{folder.name}" for folder in folders)]
    return [each for each in found if each.startswith(incomplete)]


def with_settings(*fields: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command whose first parameter is `Settings`: a flag per named field of it.

    --config and --verbose are added. Each other parameter whose type is a dataclass becomes one
    parameter per field of that dataclass.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        groups: dict[str, Any] = {
            each.name: each.annotation for each in own if dataclasses.is_dataclass(each.annotation)
        }

        @wraps(command)
        def run(*, config: Path | None, verbose: bool, **given: Any) -> None:
            _set_up_logging(verbose)
            set_malloc_options()
            settings = read_settings({name: given.pop(name) for name in fields}, config)
            for name, kind in groups.items():
                given[name] = kind(**{each.name: given.pop(each.name) for each in dataclasses.fields(kind)})
            command(settings, **given)

        parameters = [one for each in own for one in _expand(each)]
        parameters += [_parameter(name, _flag(name), None) for name in fields]
        parameters += [_parameter("config", Config, None), _parameter("verbose", Verbose, False)]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        return run

    return decorate


def _set_up_logging(verbose: bool) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger().setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("reco").setLevel(logging.INFO)


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _expand(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """The parameter itself, or one per field where its type is a dataclass."""
    kind = parameter.annotation
    if not dataclasses.is_dataclass(kind):
        yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        return
    types = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        default: object = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield _parameter(field.name, _list_of_choices(types[field.name]), default)


def _list_of_choices(annotation: Any) -> Any:
    """A list of an enumeration in place of list[Literal[...]], which typer does not know.

    The members are str, so that the command sees the type that it declares.
    """
    kind, *extra = get_args(annotation)
    (item,) = get_args(kind) if get_origin(kind) is list else (None,)
    if get_origin(item) is not Literal:
        return annotation
    enumeration: Any = StrEnum  # the function, called with names that mypy does not know
    choices: Any = enumeration("Choices", {str(each): str(each) for each in get_args(item)})
    return Annotated[list[choices], *extra]


def _flag(name: str) -> object:
    """The flag of one setting; unset it is None, so that the environment or the file decides.

    Numbers and lists stay text here: `Settings` checks them, with one message for every source.
    """
    field = Settings.model_fields[name]
    kind: Any = field.annotation
    if kind not in (bool, Path) and get_origin(kind) is not Literal:
        kind = str
    text = field.description or ""
    if field.default not in (None, ()) and field.default_factory is None:
        default = {True: "on", False: "off"}[field.default] if kind is bool else field.default
        text += f"  [default: {default}]"
    complete = complete_memory if name == "memory" else None
    return Annotated[kind | None, typer.Option(metavar=_metavar(name), help=text, autocompletion=complete)]


def _metavar(name: str) -> str | None:
    kind = Settings.model_fields[name].annotation
    if name in METAVARS:
        return METAVARS[name]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    for ending, unit in {"_s": "SECONDS", "_bytes": "BYTES"}.items():
        if name.endswith(ending):
            return unit
    return {int: "N", float: "SHARE"}.get(kind)  # type: ignore[arg-type]
