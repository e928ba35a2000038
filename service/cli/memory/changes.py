"""`reco memory activate`, `compact` and `delete`: in the store, or in a running service."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from service.cli.options import STORE, complete_memory, with_settings
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from index_store import Store

app = typer.Typer(rich_markup_mode=None)
UNIX = "unix:"
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
        job = _run_job(settings, url, f"/memories/{check_name(name)}/compact", {})
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
        job = _run_job(settings, url, f"/memories/{name}/activate", {"version": version})
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


def _run_job(settings: Settings, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Start a job in a running service, and wait for its end."""
    import httpx

    from service.errors import ServiceError

    with _open_client(settings.store, url) as client:
        try:
            job = _body(client.post(path, json=body))
            while job["state"] == "running":
                time.sleep(0.1)
                job = _body(client.get(f"/jobs/{job['id']}"))
        except httpx.HTTPError as error:
            raise ServiceError(f"{url} does not answer ({error}): is it the service's address?") from error
    if job["state"] != "done":
        raise ServiceError(f"the {job['kind']} of {job['memory']} failed, what served goes on: {job['error']}")
    return job


def _open_client(store: Path, url: str) -> Any:
    """An httpx client with the admin key, or with the token of the store.

    The token is sent to this machine alone: an address elsewhere is not the service of this store,
    and a proxy of the environment (HTTP_PROXY) is not asked for an address of this machine.
    """
    import httpx

    from service.access.token import read_token

    if url.startswith(UNIX):
        return httpx.Client(
            base_url="http://localhost", transport=httpx.HTTPTransport(uds=url.removeprefix(UNIX)), timeout=30
        )
    local = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    key = os.environ.get("RECO_ADMIN_KEY") or (read_token(store) if local else None)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=30, trust_env=not local)


def _body(reply: Any) -> dict[str, Any]:
    from service.errors import ServiceError

    try:
        body: dict[str, Any] = reply.json()
    except ValueError as error:  # not ours: a proxy's page, say
        raise ServiceError(
            f"{reply.url.host} answered {reply.status_code} without JSON: is it the service's address, or is a proxy "
            "(HTTP_PROXY) between?"
        ) from error
    if reply.status_code >= 400:
        raise ServiceError(f"{reply.url.host} refused ({reply.status_code}): {body['error']['message']}")
    return body
