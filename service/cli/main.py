"""`reco`: the tree of commands, and the one place where errors become a line and an exit code.

A command's own module is imported when that command runs: `reco --help` imports typer alone.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

EXAMPLES = """\b
Examples:
  reco serve                                     the bundled starter on 127.0.0.1:8000
  reco memory build catalog photos/ --activate   a folder with captions.csv, .jsonl or .parquet
  reco memory build catalog shards/*.tar --caption "a photo of {class}"
  reco memory import catalog embeddings/ --model ViT-B-32 --pretrained laion2b_s34b_b79k
  reco eval classify test.tar --memory catalog   does it help on my data?

Every flag of `serve` is also RECO_<FLAG> in the environment and a key of a TOML file (--config)."""
# Of each group: command -> (module of this package that registers it, summary).
COMMANDS = {
    "serve": ("serve", "answer over HTTP"),
    "train": ("train", "train a fusion from a TOML file"),
    "info": ("info", "print versions, the model and the store as JSON"),
}
MEMORY = {
    "build": ("memory.build", "encode image-text pairs into a new version"),
    "import": (
        "memory.build",
        "import embeddings of clip-retrieval, or another version",
    ),
    "list": ("memory.listing", "all memories and versions"),
    "show": ("memory.listing", "what one version holds, takes and finds"),
    "verify": ("memory.listing", "read every byte of a version and answer its probe queries"),
    "compact": ("memory.changes", "fold the online edits of a memory into a new version"),
    "delete": ("memory.changes", "remove a version, an unfinished build or a memory"),
    "activate": ("memory.changes", "choose the version to serve"),
}
EVAL = {
    "classify": ("evaluate.commands", "zero-shot accuracy, plain against enhanced"),
    "retrieve": ("evaluate.commands", "text to image and image to text over all captions"),
    "entities": ("evaluate.commands", "entities seen and never seen in training, apart"),
    "ablate": ("evaluate.commands", "every claim of the method as a row of one table"),
}


class LazyGroup(TyperGroup):
    """A group of placeholders with names and summaries; the command that is named is imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The name, the command itself in place of its placeholder, and the arguments left over."""
        name, found, rest = super().resolve_command(ctx, args)
        if name is None or found is None or found.callback is None or isinstance(found, TyperGroup):
            return name, found, rest
        module = import_module(f"service.cli.{found.callback()}")
        command = typer.main.get_group(module.app).commands[name]
        command.help = found.help
        return name, command, rest


def build_app() -> typer.Typer:
    """The tree of commands, without typer's rendering in rich, which costs 0.5 s of --help."""
    app = typer.Typer(
        cls=LazyGroup,
        help="Retrieval-enhanced CLIP embeddings.",
        epilog=EXAMPLES,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    _add(app, COMMANDS)
    for name, commands, summary in (
        ("memory", MEMORY, "build, list, check and choose memories"),
        ("eval", EVAL, "does it help on my data?"),
    ):
        group = typer.Typer(cls=LazyGroup, help=summary, rich_markup_mode=None)
        _add(group, commands)
        app.add_typer(group, name=name)
    return app


def _add(app: typer.Typer, commands: Mapping[str, tuple[str, str]]) -> None:
    for name, (module, summary) in commands.items():
        app.command(name, help=summary)(lambda module=module: module)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 failed, 2 wrong usage.

    An error is one line on stderr; its stack is logged under --verbose, and always for a bug.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        _print_error(str(stop) if stop.args else "stopped; nothing half-made is left")
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return 0
    except typer.TyperException as error:
        _print_error(_usage_line(error, argv))
        return 2
    except Exception as error:  # noqa: BLE001  the last line of defence: a message and an exit code
        return _report(error)
    return code


def _run(argv: list[str]) -> int:
    command = typer.main.get_command(build_app())
    if "_RECO_COMPLETE" in os.environ:  # the shell's request for completions, which ends the process
        command.main(argv, prog_name="reco")
    try:
        with command.make_context("reco", argv) as context:
            command.invoke(context)
    except typer.Exit as stop:  # after --help
        return stop.exit_code
    return 0


def _report(error: Exception) -> int:
    """Print the error's line; log its stack under --verbose, or if it is none of our own errors."""
    from service.settings import UsageError

    code = 2 if isinstance(error, UsageError) else 1
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    if verbose or not (code == 2 or _is_expected(error)):
        logging.getLogger("reco").error("%s", error, exc_info=error)
    _print_error(str(error))
    return code


def _is_expected(error: Exception) -> bool:
    from index_store.errors import StoreError
    from models.errors import ModelError
    from service.errors import ServiceError

    return isinstance(error, ServiceError | StoreError | ModelError)


def _usage_line(error: typer.TyperException, argv: Sequence[str]) -> str:
    """typer's message with the value that is wrong, and the command whose --help tells more."""
    message = error.format_message().strip().removesuffix(".")
    cause = error.__cause__  # of a value that has the wrong type: pydantic's error
    if cause is not None and hasattr(cause, "errors"):
        value, (start, _, reason) = cause.errors()[0]["input"], message.partition(": ")
        reason = reason.removeprefix("Value error, ")
        message = f"{start.replace('value', f'value {value!r}', 1)}: {reason[:1].lower()}{reason[1:]}"
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else " ".join(["reco", *_command_path(argv)])
    return f"{message[:1].lower()}{message[1:]}; see `{path} --help`"


def _command_path(argv: Sequence[str]) -> Sequence[str]:
    """The words of the command, without its arguments."""
    return argv[: 2 if {"memory", "eval"} & {*argv[:1]} else 1]


def _print_error(message: str) -> None:
    """One line on stderr, whatever breaks the message holds; the prefix is red on a terminal."""
    prefix = typer.style("reco:", fg="red", bold=True) if sys.stderr.isatty() else "reco:"
    print(f"{prefix} {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
