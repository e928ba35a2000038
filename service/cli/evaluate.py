"""What each `reco eval` command does: data encoded once, every setting asked, a table, JSON and a report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from index_store import Snapshot, Store
from service.cli import commands
from service.cli.examples import Pictured, examples
from service.errors import ServiceError
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from index_store.build.source import Reject
    from models.data.samples import Sample
    from models.evaluation.evaluate import Captioned, Labels, Report
    from models.evaluation.queries import Photos, Setting
    from models.evaluation.workbench import Rival
    from models.reco import Reco

Args = argparse.Namespace
CURVE_PAIRS = 200_000  # more are not taken apart for a plot: their vectors would have to be read whole


def classify(args: Args) -> None:
    """reco eval classify: how many are right, plain and enhanced."""
    from models.evaluation.evaluate import Labels
    from models.evaluation.evaluate import classify as evaluate

    reco, snapshot = opened(args)
    names = _labels(args)
    photos = _photos(args, reco, names)
    _tell_unseen(names, photos)
    labels = Labels(names, args.templates, reco.encoder)
    settings = settings_of(args)
    report = evaluate(reco, photos, labels, snapshot, settings, args.label)
    if args.report:
        report = _with_memory_curve(report, settings, reco, photos, labels, snapshot)

    def pictured() -> Pictured:
        return examples(report, settings, reco, photos, labels, snapshot, lambda: _samples(args, f"{{{args.label}}}"))

    _tell(report, args, settings, pictured)
    if args.per_class:
        from models.evaluation.report_text import details

        print(details(report))


def _with_memory_curve(
    report: Report, settings: Sequence[Setting], reco: Reco, photos: Photos, labels: Labels, snapshot: Snapshot
) -> Report:
    """The report with the best setting asked of growing parts of the memory; a memory too large for that is left whole."""
    from models.evaluation.evaluate import memory_curve
    from models.evaluation.report_html import best_line
    from models.evaluation.submemories import Parts

    setting = next((each for each in settings if str(each) == best_line(report).method), None)
    if setting is None or len(snapshot) > CURVE_PAIRS:
        return report
    with TemporaryDirectory() as folder:
        return replace(report, memory_curve=memory_curve(reco, photos, labels, Parts(snapshot, Path(folder)), setting))


def retrieve(args: Args) -> None:
    """reco eval retrieve: recall in both directions over all captions."""
    from models.evaluation.evaluate import retrieve as evaluate

    reco, snapshot = opened(args)
    settings = settings_of(args)
    _tell(evaluate(reco, _captioned(args, reco), snapshot, settings), args, settings)


def entities(args: Args) -> None:
    """reco eval entities: labels seen in training and labels never seen, apart."""
    from models.evaluation.evaluate import Labels
    from models.evaluation.evaluate import entities as evaluate

    reco, snapshot = opened(args)
    names = _labels(args)
    photos = _photos(args, reco, names)
    seen = args.seen.read_text("utf-8").split("\n") if args.seen else _share(names, args.seen_share, args.seed)
    settings = settings_of(args)
    labels = Labels(names, args.templates, reco.encoder)
    _tell(evaluate(reco, photos, labels, snapshot, settings, sorted({*seen} & {*names})), args, settings)


def opened(args: Args) -> tuple[Reco, Snapshot]:
    """The model and the memory that the command line names; the starter's own memory is made where it is missing."""
    from models.starter import MEMORY, install_starter
    from service.pipeline.load import load_reco

    settings = commands.settings_of(args)
    reco, store = load_reco(settings), Store(settings.store)
    if settings.model == "starter":
        install_starter(store)
    return reco, _memory(settings, store, MEMORY, reco)


def _memory(settings: Settings, store: Store, starter: str, reco: Reco) -> Snapshot:
    name = settings.memory or (starter if settings.model == "starter" else None)
    if name is None:
        raise UsageError(
            f"no memory named: give --memory, one of {', '.join(store.names()) or 'none, build one first'}"
        )
    name, _, version = name.partition("@")
    return store.open(name, version or None, encoder=reco.encoder.fingerprint)


def settings_of(args: Args) -> list[Setting]:
    """Every combination of what the command line lists, plain once."""
    from models.evaluation.queries import Setting
    from models.reco import RetrievalMode

    return [
        Setting(enhance, k, RetrievalMode(search, fuse), args.max_similarity, args.max_text_similarity, args.dehub)
        for enhance in args.enhance
        if enhance != "none" or args.dehub
        for search in args.search
        for fuse in args.fuse
        for k in args.k or [None]
    ]


def _labels(args: Args) -> list[str]:
    """The labels of --labels, one a line; else every one that the data names."""
    if args.labels is not None:
        names = [line.strip() for line in args.labels.read_text("utf-8").splitlines() if line.strip()]
        if not names:
            raise ServiceError(f"{args.labels.name} holds no label: write one a line")
        return list(dict.fromkeys(names))
    from models.data.samples import Sample

    found = {sample.caption for sample in _samples(args, f"{{{args.label}}}") if isinstance(sample, Sample)}
    if not found:
        raise ServiceError(
            f"no image with the field {args.label!r} in {', '.join(source.name for source in args.sources)}: name it with --label"
        )
    return sorted(found)


def _tell_unseen(names: Sequence[str], photos: Photos) -> None:
    """A label without any photo is told: its share is unknown, and it still takes guesses from the others."""
    empty = sorted(set(names) - set(photos.labels))
    if empty:
        print(f"{len(empty)} labels without any image, the first: {empty[0]!r}", file=sys.stderr)


def _photos(args: Args, reco: Reco, names: Sequence[str]) -> Photos:
    from models.evaluation.queries import encode_photos

    with _bar() as done:
        return encode_photos(_samples(args, f"{{{args.label}}}"), reco.encoder, labels=set(names), on_progress=done)


def _captioned(args: Args, reco: Reco) -> Captioned:
    from models.evaluation.evaluate import Captioned
    from models.evaluation.queries import Queries, encode_photos, encode_prompts

    with _bar() as done:
        asked = encode_photos(_samples(args, args.caption), reco.encoder, on_progress=done)
    names = [name.rsplit("#", 1)[0] for name in asked.ids]
    _, first, photo = np.unique(names, return_index=True, return_inverse=True)
    siblings = dict[str, set[str]]()
    for name, caption in zip(names, asked.ids, strict=True):
        siblings.setdefault(name, {name}).add(caption)
    own = [siblings[name] for name in names]
    images = Queries(asked.queries.encoded.take(first.tolist()), [own[i] for i in first])
    return Captioned(images, Queries(encode_prompts(asked.labels, reco.encoder), own), photo)


def _samples(args: Args, caption: str | None) -> Iterator[Sample | Reject]:
    from models.data.sources import read_all

    return islice(read_all(args.sources, caption=caption), args.limit)


def _share(names: Sequence[str], share: float, seed: int) -> list[str]:
    """A seeded share of the labels."""
    drawn = np.random.default_rng(seed).permutation(len(names))[: round(share * len(names))]
    return [names[i] for i in drawn]


def _tell(
    report: Report, args: Args, settings: Sequence[Setting], pictured: Callable[[], Pictured] = lambda: ([], [])
) -> None:
    """Print the table; write JSON and the report where asked."""
    from models.evaluation.report_html import page
    from models.evaluation.report_text import details, markdown, terminal

    print(terminal(report))
    found = json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n"
    if args.json:
        args.json.write_text(found, "utf-8")
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / "report.html").write_text(page(report, settings, *pictured()), "utf-8")
        (args.report / "report.md").write_text(f"{markdown(report)}\n\n{details(report)}\n", "utf-8")
        (args.report / "report.json").write_text(found, "utf-8")
        print(f"the report: {args.report / 'report.html'}")


@contextmanager
def _bar() -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere; gives the function to call with each count."""
    from tqdm import tqdm

    with tqdm(desc="encode", unit="image", disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def ablate(args: Args) -> None:
    """reco eval ablate: every claim of the method as one row; goes on where an earlier run stopped."""
    from models.evaluation.ablation import ablate as measure
    from models.evaluation.ablation import markdown
    from models.evaluation.evaluate import Labels
    from models.evaluation.workbench import Bench, Recipe
    from models.fusion.checkpoint import FusionFile

    reco, snapshot = opened(args)
    settings = commands.settings_of(args)
    name, _, version = args.learn_from.partition("@")
    taught_by = Store(settings.store).open(name, version or None, encoder=reco.encoder.fingerprint)
    names = _labels(args)
    photos, labels = _photos(args, reco, names), Labels(names, args.templates, reco.encoder)
    recipe = Recipe(steps=args.steps, alpha=args.alpha, seeds=tuple(range(args.seeds)))
    args.out.mkdir(parents=True, exist_ok=True)
    served = FusionFile(reco.fusions, reco.k, reco.fusion_id, {})
    bench = Bench(
        reco.encoder, photos, labels, snapshot, taught_by, recipe, args.out, served=served, rival=_rival(args, names)
    )
    rows = measure(bench, args.out / "rows.jsonl")
    asked = f"{len(photos.queries)} photos, {len(names)} labels; encoder {reco.encoder.fingerprint}"
    head = f"{asked}; memory {snapshot.ref}, learned from {taught_by.ref}; seeds {args.seeds}, {args.steps} steps, alpha {args.alpha:g}"
    (args.out / "table.md").write_text(f"{datetime.now(UTC):%Y-%m-%d}: {head}\n\n{markdown(rows)}\n", "utf-8")
    print((args.out / "table.md").read_text("utf-8"))


def _rival(args: Args, names: Sequence[str]) -> Rival | None:
    """The pairs that full fine-tuning and the fusion alone both learn from, where sources are given."""
    from models.data.samples import Sample
    from models.data.sources import read_all
    from models.evaluation.finetune import Tuning
    from models.evaluation.queries import encode_photos
    from models.evaluation.workbench import Rival

    if not args.tune_on:
        return None
    found = [item for item in read_all(args.tune_on, caption=args.tune_caption) if isinstance(item, Sample)]
    drawn = np.random.default_rng(0).permutation(len(found))[: args.tune_pairs]
    return Rival(
        [found[row] for row in sorted(drawn.tolist())],
        lambda encoder: encode_photos(_samples(args, f"{{{args.label}}}"), encoder, labels=set(names)),
        Tuning(args.tune_steps),
    )
