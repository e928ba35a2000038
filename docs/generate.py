"""MkDocs hook: pages that are made from the code, and pages that live elsewhere in the tree.

Nothing generated is committed, so that no page can differ from the code; the committed files of
those names are placeholders, so that links also work in the repository. The build fails where a
public name has no docstring or is missing from the Python reference.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # page of the site -> file of the tree
    "concepts/architecture.md": "ARCHITECTURE.md",
    "reference/file-format.md": "index_store/FORMAT.md",
    "reference/changes.md": "CHANGELOG.md",
    "how-to/deploy.md": "deploy/README.md",
    "how-to/load-tests.md": "loadtests/README.md",
}
PUBLIC = ("index_store", "service.client")  # packages whose `__all__` is documented by name
COMMANDS = (
    *("reco", "reco serve", "reco info", "reco train"),
    *(f"reco memory {name}" for name in ("build", "import", "list", "show", "verify", "activate", "compact", "delete")),
    *(f"reco eval {name}" for name in ("classify", "retrieve", "entities", "ablate")),
)
FIXED_LIMITS = ("service/access", "service/api", "service/server", "service/labels", "index_store/types")
FIXED_LIMIT = re.compile(r"^(MAX_\w+|LINGER_S|MIN_SEND_BYTES|FILES_SHARE) = [^#\n]*(?:# (.+))?$", re.M)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    check_python_reference()
    pages = {page: (ROOT / source).read_text("utf-8") for page, source in ELSEWHERE.items()}
    pages |= {
        "reference/http.md": http_page(),
        "reference/settings.md": settings_page(),
        "reference/cli.md": cli_page(),
        "reference/metrics.md": metrics_page(),
    }
    for page, text in pages.items():
        source = ELSEWHERE.get(page)
        content = text if source is None else relink(text, source, page)
        placeholder = files.get_file_from_path(page)
        if placeholder is not None:
            files.remove(placeholder)
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of committed pages to files outside docs/ into the file's name."""
    source = page.file.src_uri
    return markdown if source in ELSEWHERE else relink(markdown, f"docs/{source}", source)


def relink(text: str, source: str, page: str) -> str:
    """Links of a file at `source` of the tree, as links of `page` of the site."""
    there = {file: target for target, file in ELSEWHERE.items()}

    def replace(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in there:
            path = f"docs/{there[path]}"
        if path.startswith("docs/") and not path.endswith((".py", ".sh")):
            relative = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(page) or ".")
            return f"{image}[{label}]({relative}{anchor})"
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links to {target}, which does not exist")
        return label if label.startswith("`") or image else f"{label} (`{path}`)"

    return LINK.sub(replace, text)


def check_python_reference() -> None:
    """Fail where an exported name has no docstring or is not in the Python reference."""
    from importlib import import_module

    page = (ROOT / "docs/reference/python.md").read_text("utf-8")
    for package in PUBLIC:
        for name in import_module(package).__all__:
            exported = getattr(import_module(package), name)
            if (inspect.isclass(exported) or inspect.isfunction(exported)) and not exported.__doc__:
                raise PluginError(f"{package}.{name} has no docstring")
            if not re.search(rf"^::: \S+\.{name}$|`{name}`", page, re.M):
                raise PluginError(f"{package}.{name} is exported, but docs/reference/python.md does not name it")


def http_page() -> str:
    """The routes, from the application's own OpenAPI document."""
    from typing import cast

    from service.api.routes.reference import operations
    from service.app import create_app
    from service.engine import Engine

    document = create_app(cast(Engine, None)).openapi()  # an engine is needed to answer, not to describe
    lines = [
        "# HTTP reference",
        "",
        "Made from the OpenAPI document, as the page that a running service shows at `/docs`.",
        "",
    ]
    for operation in operations(document):
        lines += [f"## {operation.title}", "", operation.description, ""]
        lines += _rows(("parameter", "in", "meaning"), operation.parameters)
        for kind, fields in operation.bodies.items():
            if not fields:
                lines += [f"`{kind}`: the bytes themselves; options are query parameters.", ""]
                continue
            rows = [(each.name, each.kind, each.default, each.meaning) for each in fields]
            lines += [f"`{kind}`", "", *_rows(("field", "type", "default", "meaning"), rows)]
    return "\n".join(lines)


def _rows(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table whose first column is code; nothing without rows."""
    if not rows:
        return []
    lines = [[f"`{name}`", *(str(cell).replace("|", "&#124;") for cell in cells)] for name, *cells in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)] + [""]


def settings_page() -> str:
    """Every setting, from the fields of `Settings`."""
    from pydantic_core import PydanticUndefined

    from service.settings import Settings

    lines = [
        "# Settings",
        "",
        "Each is a flag of `reco serve`, a variable `RECO_…`, and a key of the TOML file of `--config`; a flag",
        "goes before the environment, the environment before the file. An unknown key refuses to start and",
        "names the nearest. Sizes are bytes or items, times are seconds.",
        "",
        "| setting | variable | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = "computed" if field.default is PydanticUndefined else field.default
        shown = "none" if default in (None, ()) else f"`{default}`"
        meaning = (field.description or "").replace("|", "&#124;")
        lines.append(f"| `--{name.replace('_', '-')}` | `RECO_{name.upper()}` | {shown} | {meaning} |")
    lines += ["", "## Limits without a setting", "", "Bytes, items and seconds, as constants of the code.", ""]
    return "\n".join([*lines, *_rows(("constant", "value", "of what"), fixed_limits())])


def fixed_limits() -> list[tuple[str, str, str]]:
    """(constant, value, meaning) of each limit that no setting changes. The comment on its line is
    the meaning; PluginError without one.
    """
    from importlib import import_module

    found = []
    for place in FIXED_LIMITS:
        for path in sorted((ROOT / place).rglob("*.py")) or [ROOT / f"{place}.py"]:
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            for name, meaning in FIXED_LIMIT.findall(path.read_text("utf-8")):
                if not meaning:
                    raise PluginError(f"{module}.{name} is a limit: a comment on its line must say of what")
                found.append((name, f"`{getattr(import_module(module), name)}`", meaning))
    return found


def cli_page() -> str:
    """The help of every command, as the command line prints it."""
    lines = ["# Command line", "", "Exit codes: 0 done, 1 failed, 2 wrong usage. Errors are one line on stderr.", ""]
    for command in COMMANDS:
        lines += [f"## {command}", "", "```text", help_of(command.split()[1:]).rstrip(), "```", ""]
    return "\n".join(lines)


def help_of(arguments: list[str]) -> str:
    """What `reco … --help` prints, 100 columns wide."""
    from service.cli.main import main

    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    if not printed.getvalue():
        raise PluginError(f"reco {' '.join(arguments)} --help prints nothing")
    return printed.getvalue()


def metrics_page() -> str:
    """Every series, from the registry of `Metrics`."""
    from service.observability.metrics import Metrics

    lines = [
        "# Metrics",
        "",
        "Prometheus text at `/metrics`, without a key. Durations are seconds.",
        "",
        "| series | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for series in vars(Metrics(version="0", torch="0", faiss="0")).values():
        name, kind = getattr(series, "_name", None), getattr(series, "_type", None)
        if name and kind:
            suffix = "_total" if kind == "counter" else ""
            labels = ", ".join(f"`{label}`" for label in series._labelnames)
            lines.append(f"| `{name}{suffix}` | {kind} | {labels} | {series._documentation} |")
    return "\n".join(lines)
