"""What each `reco` command does, one function each. torch and open_clip are imported where a model is really loaded."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index_store import Store, StoreError
from service.errors import ServiceError, UsageError
from service.settings import Settings, read

if TYPE_CHECKING:
    from models.clip import Encoder
    from models.sources import Reject, Sample

Args = argparse.Namespace


def serve(args: Args) -> None:
    """reco serve."""
    settings = read(vars(args), args.config)
    from service.server import serve as answer

    answer(settings)


def info(args: Args) -> None:
    """reco info: what would be served, without serving it."""
    from importlib.metadata import version

    settings = read(vars(args), args.config)
    encoder, store = _encoder(settings), Store(settings.store)
    packages = ("reco-serve", "torch", "torchvision", "open_clip_torch", "faiss-gpu" if sys.platform == "linux" else "faiss-cpu")
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


def build(args: Args) -> None:
    """reco memory build: encode the sources into one new version."""
    from index_store import build_version
    from models.prepare import encode_samples

    settings = read(vars(args), args.config)
    store = Store(settings.store)
    version = args.version or store.next_version(args.name)
    samples = list(args.sources)
    total = _count(_samples(samples, args.caption))
    encoder = _encoder(settings)
    rejects: list[Reject] = []
    kinds: Any = {"image": args.image_key, "text": "vector"}
    with _progress(total, f"{args.name}@{version}") as done:
        blocks = encode_samples(
            _samples(samples, args.caption), encoder, kinds=kinds, batch=settings.max_batch, workers=settings.decode_workers,
            max_pixels=settings.max_pixels, on_reject=rejects.append, on_progress=done,
        )  # fmt: skip
        manifest = build_version(
            store, args.name, version, blocks, encoder=encoder.fingerprint, kinds=kinds, index=args.index, shard_pairs=args.shard_pairs,
            source=lambda: {"sources": [source.name for source in samples], "rejected": len(rejects)},
        )  # fmt: skip
    print(f"{manifest.ref}: {manifest.pairs} pairs, index {manifest.index['recipe']}, {len(rejects)} rejected")
    if rejects:
        path = store.root / args.name / f"rejects-{version}.jsonl"
        path.write_text("".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects), "utf-8")
        print(f"what was rejected, and why: {path}")
    if args.activate:
        store.activate(args.name, version)
        print(f"{manifest.ref} is what the next start serves; a running service swaps with `reco memory activate {manifest.ref} --url URL`")


def list_memories(args: Args) -> None:
    """reco memory list: a table of every version."""
    store = Store(read(vars(args), args.config).store)
    rows = [("memory", "version", "", "pairs", "index", "recall@10", "bytes", "created", "encoder")]
    for name in store.names():
        serving = _current(store, name)
        for version in store.versions(name):
            found = store.manifest(name, version)
            size = sum(file["bytes"] for file in found.files.values())
            recall = f"{min(found.recall['image'], found.recall['text']):.3f}"
            mark = "current" if version == serving else ""
            rows.append((name, version, mark, f"{found.pairs:,}", found.index["recipe"], recall, f"{size:,}", found.created, found.encoder))
    if len(rows) == 1:
        print(f"no memory in {store.root}: build one with `reco memory build NAME SOURCE`", file=sys.stderr)
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show(args: Args) -> None:
    """reco memory show: one version's manifest as JSON, its files summed up."""
    store = Store(read(vars(args), args.config).store)
    name, version = _parts(store, args.ref)
    found = asdict(store.manifest(name, version))
    files = found.pop("files")
    found["files"] = {"count": len(files), "bytes": sum(file["bytes"] for file in files.values())}
    found["current"] = version == _current(store, name)
    print(json.dumps(found, indent=2, ensure_ascii=False))


def verify(args: Args) -> None:
    """reco memory verify: every checksum, then the probe queries."""
    from index_store import Snapshot

    store = Store(read(vars(args), args.config).store)
    name, version = _parts(store, args.ref)
    snapshot = Snapshot.open(store.path(name, version), encoder=store.manifest(name, version).encoder)
    recall, files = snapshot.prove(), len(snapshot.manifest.files)
    print(f"{snapshot.ref}: {files} files as they were written; recall@10 image {recall['image']:.3f}, text {recall['text']:.3f}")


def activate(args: Args) -> None:
    """reco memory activate: choose what the next start serves; with --url, swap it in the running service."""
    store = Store(read(vars(args), args.config).store)
    name, _, version = args.ref.partition("@")
    if not version:
        raise UsageError(f"{args.ref}: name the version too, as NAME@VERSION; `reco memory list` shows them")
    if args.url:
        _swap(args.url.rstrip("/"), name, version)
        return
    store.activate(name, version)
    print(f"{args.ref} is what the next start serves; add --url to swap it in a running service")


def train(args: Args) -> None:
    """reco train: learn a fusion."""
    from models.train import train as learn
    from models.training_config import TrainConfig

    print(learn(TrainConfig.read(args.recipe), resume=args.resume))


def _samples(sources: Iterable[Path], caption: str | None) -> Iterator[Sample | Reject]:
    from models.sources import read_samples

    return chain.from_iterable(read_samples(source, caption=caption) for source in sources)


def _count(items: Iterable[object]) -> int:
    """How many, so that progress can tell the time left; reading the files once is quick beside encoding them."""
    return sum(1 for _ in items)


def _encoder(settings: Settings) -> Encoder:
    from models.clip import Encoder, EncoderSpec

    return Encoder.load(EncoderSpec(settings.model, settings.pretrained, settings.precision, settings.device))


def _parts(store: Store, ref: str) -> tuple[str, str]:
    name, _, version = ref.partition("@")
    return name, version or store.current(name)


def _current(store: Store, name: str) -> str | None:
    """The version being served, None where none was ever activated."""
    try:
        return store.current(name)
    except StoreError:
        return None


def _swap(url: str, name: str, version: str) -> None:
    """Ask a running service to swap, and wait for how it ends."""
    import httpx

    key = os.environ.get("RECO_ADMIN_KEY")
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=30) as client:
        try:
            job = _answered(client.post(f"/memories/{name}/activate", json={"version": version}))
            while job["state"] == "running":
                time.sleep(0.1)
                job = _answered(client.get(f"/jobs/{job['id']}"))
        except httpx.HTTPError as error:
            raise ServiceError(f"{url} does not answer ({error}): is it the service's address?") from error
    if job["state"] != "done":
        raise ServiceError(f"{name}@{version} was not swapped in, what served goes on: {job['error']}")
    print(f"{name}@{version} is being served" + (f", {job['retired']} was before" if job["retired"] else ""))


def _answered(reply: Any) -> dict[str, Any]:
    body: dict[str, Any] = reply.json()
    if reply.status_code >= 400:
        raise ServiceError(f"{reply.url.host} refused ({reply.status_code}): {body['error']['message']}")
    return body


@contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    """A bar with rate and time left on a terminal, a log line now and then elsewhere; gives the function to call with each count."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(total=total, desc=what, unit="item", mininterval=0.2 if terminal else 10, file=sys.stderr, ascii=not terminal) as bar:
        yield bar.update
