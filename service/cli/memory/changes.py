"""`reco memory activate`, `compact` and `delete`: in the store, or in a running service."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from service.cli.options import STORE, complete_memory, with_settings
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from index_store import Store
    from service.client import RecoClient

app = typer.Typer(rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_memory)]
Ref = Annotated[str, typer.Argument(metavar="NAME@VERSION", autocompletion=complete_memory)]


@app.command("compact")
@with_settings(*STORE)
def compact(
    settings: Settings,
    name: Name,
    url: Annotated[
        str | None,
        typer.Option(help="do it in the running service that edits it, e.g. http://127.0.0.1:8000 or unix:PATH"),
    ] = None,
) -> None:
    """Fold the online edits into a new version; with --url, in the running service."""
    from index_store import Store
    from index_store.editor import Editor
    from index_store.store import check_name
    from models.progress import progress

    if url:
        check_name(name)
        job = _run_job(settings, url, lambda client: client.compact(name, wait_s=math.inf))
        print(f"{name}@{job['version']} is being served, with every edit of {job['retired']}")
        return
    store = Store(settings.store)
    editor = Editor.open(store, name, encoder=store.manifest(name).encoder)
    before = editor.snapshot
    if not before.edits:
        print(f"{before.ref} has no edits: there is nothing to compact")
        return
    with progress(len(before), f"compact {before.ref}") as meter:
        after = editor.compact(on_progress=lambda done, _: meter.advance(done - meter.done))
    editor.close()
    print(f"{after.ref}: {len(after)} pairs, with every edit of {before.ref}; it is what the next start serves")


@app.command("delete")
@with_settings(*STORE)
def delete(
    settings: Settings,
    ref: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@VERSION]",
            help="a version, an unfinished build, or a whole memory",
            autocompletion=complete_memory,
        ),
    ],
    yes: Annotated[
        str | None, typer.Option(metavar="NAME", help="the memory's name again, to delete all of it")
    ] = None,
) -> None:
    """Remove a version that is not the current one, an unfinished build, or a whole memory."""
    from index_store import Store
    from index_store.build.staging import discard_build, unfinished_builds

    store = Store(settings.store)
    if "@" not in ref:
        _delete_memory(store, ref, yes)
        return
    name, version = _split_ref(ref)
    for build in unfinished_builds(store.root, name):
        if build.version == version and not (store.root / name / version).exists():
            discard_build(store.root, build)
            print(f"{ref}, an unfinished build of {build.pairs:,} pairs, is deleted")
            return
    lost = _lost_with(store, name, version)
    store.delete(name, version)
    print(f"{ref} is deleted{lost}")


def _lost_with(store: Store, name: str, version: str) -> str:
    """What goes with a version, in words."""
    from index_store import StoreError

    lost = ""
    with suppress(StoreError):  # a version that cannot be read is deleted all the same
        edits = store.count_edits(name, version)
        lost += f", and the {edits:,} edits made on it" if edits else ""
    with suppress(StoreError):
        lost += "; a rollback would have gone to it" if store.previous(name) == version else ""
    return lost


def _delete_memory(store: Store, name: str, yes: str | None) -> None:
    """Delete a whole memory, once its name is given twice. Raises UsageError, StoreError."""
    from index_store.build.staging import discard_build, unfinished_builds
    from index_store.store import check_name

    builds, finished = unfinished_builds(store.root, check_name(name)), name in store.names()
    versions = [] if builds and not finished else store.versions(name)
    content = f"{name} holds {len(versions)} versions and {len(builds)} unfinished builds"
    if yes is None and sys.stdin.isatty():
        yes = typer.prompt(f"{content}; nothing brings them back. Its name again")
    if yes != name:
        raise UsageError(f"{content}: to delete all of it give --yes {name}, to delete one version NAME@VERSION")
    for build in builds:
        discard_build(store.root, build)
    if finished:
        store.delete_memory(name)
    print(f"{name} is deleted: {len(versions)} versions with their edits, {len(builds)} unfinished builds")


@app.command("activate")
@with_settings(*STORE)
def activate(
    settings: Settings,
    ref: Ref,
    url: Annotated[
        str | None,
        typer.Option(
            help="swap it in a running service instead, e.g. http://127.0.0.1:8000 or unix:PATH; RECO_ADMIN_KEY is "
            "sent if set, else, on this machine, the token of the store"
        ),
    ] = None,
) -> None:
    """Choose what the next start serves; with --url, swap it in the running service."""
    from index_store import Store

    name, version = _split_ref(ref)
    if url:
        job = _run_job(settings, url, lambda client: client.activate(name, version, wait_s=math.inf))
        print(f"{name}@{version} is being served" + (f", {job['retired']} was before" if job["retired"] else ""))
        return
    Store(settings.store).activate(name, version)
    print(f"{ref} is what the next start serves; add --url to swap it in a running service")


def _split_ref(ref: str) -> tuple[str, str]:
    """The name and the version of NAME@VERSION. Raises UsageError without a version."""
    from index_store.store import check_name

    name, _, version = ref.partition("@")
    if not version:
        raise UsageError(f"{ref}: name the version too, as NAME@VERSION; `reco memory list` shows them")
    return check_name(name), check_name(version)


def _run_job(settings: Settings, url: str, start: Callable[[RecoClient], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Run a job in a running service to its end.

    The token of the store is sent to this machine alone: an address elsewhere is not the service of
    this store.
    """
    import httpx

    from service.access.token import read_token
    from service.client import Limits, RecoClient, RecoError
    from service.errors import ServiceError

    local = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    key = os.environ.get("RECO_ADMIN_KEY") or (read_token(settings.store) if local else None)
    try:
        with RecoClient(url, api_key=key, timeout_s=30, limits=Limits(retries=0)) as client:
            return start(client)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url} is not the address of a service ({error}), e.g. http://127.0.0.1:8000") from error
    except RecoError as error:
        refused = f"refused ({error.status})" if error.status else "did not do it"
        raise ServiceError(f"{url} {refused}: {error}") from error
