"""What each `reco` command does, one function each. torch and open_clip are imported where a model is really loaded."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from index_store import Store
from index_store.store import plain
from service.errors import ServiceError
from service.settings import Settings, UsageError, read_settings

if TYPE_CHECKING:
    from tqdm import tqdm

Args = argparse.Namespace
LINE_S = 10  # between two lines of progress in a log


def settings_of(args: Args) -> Settings:
    """Settings from the flags, the environment and the configuration file. Raises UsageError."""
    flags = {name: value for name, value in vars(args).items() if name in Settings.model_fields}
    return read_settings(flags, args.config)


def serve(args: Args) -> None:
    """reco serve."""
    settings = settings_of(args)
    from service.server.server import serve as answer

    answer(settings)


def info(args: Args) -> None:
    """reco info: what would be served, without serving it."""
    from importlib.metadata import version

    from service.pipeline.load import load_encoder

    settings = settings_of(args)
    encoder, store = load_encoder(settings), Store(settings.store)
    packages = (
        "reco-serve",
        "torch",
        "torchvision",
        "open_clip_torch",
        "faiss-gpu" if sys.platform == "linux" else "faiss-cpu",
    )
    print(
        json.dumps(
            {
                "versions": {name: version(name) for name in packages},
                "model": {
                    "fingerprint": encoder.fingerprint,
                    "dim": encoder.dim,
                    "trunk_dim": encoder.trunk_dim,
                    "device": str(encoder.device),
                },
                "memories": {name: store.versions(name) for name in store.names()},
            },
            indent=2,
        )
    )


def activate(args: Args) -> None:
    """reco memory activate: choose what the next start serves; with --url, swap it in the running service."""
    store = Store(settings_of(args).store)
    name, version = _named(args.ref)
    if args.url:
        job = _job(args.url, f"/memories/{name}/activate", {"version": version})
        print(f"{name}@{version} is being served" + (f", {job['retired']} was before" if job["retired"] else ""))
        return
    store.activate(name, version)
    print(f"{args.ref} is what the next start serves; add --url to swap it in a running service")


def compact(args: Args) -> None:
    """reco memory compact: fold online edits into a new version; with --url, in the running service."""
    if args.url:
        job = _job(args.url, f"/memories/{plain(args.name)}/compact", {})
        print(f"{args.name}@{job['version']} is being served, with every edit of {job['retired']}")
        return
    from index_store.editor import Editor

    store = Store(settings_of(args).store)
    editor = Editor.open(store, args.name, encoder=store.manifest(args.name).encoder)
    before = editor.snapshot
    with progress(len(before), f"compact {before.ref}") as bar:
        after = editor.compact(on_progress=lambda done, _: bar.update(done - bar.n))
    editor.close()
    print(f"{after.ref}: {len(after)} pairs, with every edit of {before.ref}; it is what the next start serves")


def delete(args: Args) -> None:
    """reco memory delete: remove one version, never the current one."""
    name, version = _named(args.ref)
    Store(settings_of(args).store).delete(name, version)
    print(f"{args.ref} is deleted")


def train(args: Args) -> None:
    """reco train: learn a fusion."""
    from models.training.config import TrainConfig
    from models.training.train import train as learn

    print(learn(TrainConfig.read(args.recipe), resume=args.resume))


def _named(ref: str) -> tuple[str, str]:
    """The two parts of NAME@VERSION."""
    name, _, version = ref.partition("@")
    if not version:
        raise UsageError(f"{ref}: name the version too, as NAME@VERSION; `reco memory list` shows them")
    return plain(name), plain(version)


def _job(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Start a job in a running service, and wait for how it ends."""
    import httpx

    key = os.environ.get("RECO_ADMIN_KEY")
    with httpx.Client(
        base_url=url.rstrip("/"), headers={"authorization": f"Bearer {key}"} if key else {}, timeout=30
    ) as client:
        try:
            job = _answered(client.post(path, json=body))
            while job["state"] == "running":
                time.sleep(0.1)
                job = _answered(client.get(f"/jobs/{job['id']}"))
        except httpx.HTTPError as error:
            raise ServiceError(f"{url} does not answer ({error}): is it the service's address?") from error
    if job["state"] != "done":
        raise ServiceError(f"the {job['kind']} of {job['memory']} failed, what served goes on: {job['error']}")
    return job


def _answered(reply: Any) -> dict[str, Any]:
    body: dict[str, Any] = reply.json()
    if reply.status_code >= 400:
        raise ServiceError(f"{reply.url.host} refused ({reply.status_code}): {body['error']['message']}")
    return body


@contextmanager
def progress(total: int, what: str) -> Iterator[tqdm[Any]]:
    """A bar with rate and time left on a terminal, a plain line with both every ten seconds elsewhere."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        shown: dict[str, Any] = {"mininterval": 0.2, "file": sys.stderr}
    else:
        shown = {
            "mininterval": LINE_S,
            "file": _Lines(),
            "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
        }
    with tqdm(total=total, desc=what, unit="item", **shown) as bar:
        yield bar


class _Lines:
    """Standard error as a log file wants it: each state of a bar on a line of its own, none over another."""

    def write(self, text: str) -> None:
        """One state, or the newline at the end of all."""
        if state := text.strip():
            print(state, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Every line is flushed as it is written."""
