"""Inputs of an evaluation: the model, the memory, the labels, and the data encoded once."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from index_store import Snapshot, Store
from models.progress import progress
from service.errors import ServiceError
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from index_store.build.source import Reject
    from models.data.samples import Sample
    from models.evaluation.evaluate import Captioned
    from models.evaluation.queries import LabelledPhotos
    from models.evaluation.workbench import FineTuneBaseline
    from models.reco import Reco
    from service.cli.evaluate.options import AblateOptions, LabelOptions


@dataclass(frozen=True, slots=True)
class Data:
    """Where the items are.

    caption: the template of an item's caption, None = the captions that the sources hold.
    limit: the most items read, None = all.
    """

    sources: Sequence[Path]
    caption: str | None
    limit: int | None

    def __iter__(self) -> Iterator[Sample | Reject]:
        """The items, read anew each time."""
        from models.data.samples import Reading
        from models.data.sources import read_all

        return islice(read_all(self.sources, Reading(self.caption)), self.limit)


def open_memory(settings: Settings) -> tuple[Reco, Snapshot]:
    """The model and the memory that the settings name; the starter has one of its own.

    Raises UsageError where no memory is named, StoreError, ModelError.
    """
    from models.starter import MEMORY
    from service.pipeline.load import load_reco

    reco, store = load_reco(settings), Store(settings.store)
    name = settings.memory or (MEMORY if settings.model == "starter" else None)
    if name is None:
        known = ", ".join(store.names()) or "none, build one first"
        raise UsageError(f"no memory named: give --memory, one of {known}")
    return reco, open_named(settings, name, reco)


def open_named(settings: Settings, ref: str, reco: Reco) -> Snapshot:
    """The snapshot of NAME[@VERSION], which must be of the model's encoder.

    The starter's memory, where the store lacks it, is made in a folder that the end of the process
    removes: an evaluation writes nothing to the store.  Raises StoreError.
    """
    from models.starter import MEMORY, install_starter

    name, _, version = ref.partition("@")
    store = Store(settings.store)
    if name == MEMORY and settings.model == "starter" and name not in store.names():
        folder = TemporaryDirectory(prefix="reco-")
        atexit.register(folder.cleanup)
        store = Store(Path(folder.name))
        install_starter(store)
    return store.open(name, version or None, encoder=reco.encoder.fingerprint)


def read_labels(data: Data, options: LabelOptions) -> list[str]:
    """The labels of --labels, one a line, else all that the data name.

    Raises ServiceError for none.
    """
    if options.labels is not None:
        names = [line.strip() for line in read_lines(options.labels) if line.strip()]
        if not names:
            raise ServiceError(f"{options.labels.name} holds no label: write one a line")
        return list(dict.fromkeys(names))
    from models.data.samples import Sample

    found = {sample.caption for sample in data if isinstance(sample, Sample)}
    if not found:
        places = ", ".join(source.name for source in data.sources)
        raise ServiceError(f"no image with the field {options.label!r} in {places}: name it with --label")
    return sorted(found)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without the mark that some editors put first. Raises
    ServiceError.
    """
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceError(f"{path} cannot be read as text ({error}): name a UTF-8 file") from error


def draw_share(names: Sequence[str], share: float, seed: int) -> list[str]:
    """A seeded share of the labels."""
    drawn = np.random.default_rng(seed).permutation(len(names))[: round(share * len(names))]
    return [names[i] for i in drawn]


def encode_labelled(data: Data, reco: Reco, names: Sequence[str]) -> LabelledPhotos:
    """The photos with a label among `names`, encoded.

    A label without any photo is named on stderr: it has no share of its own, and still takes
    guesses from others.
    """
    from models.evaluation.queries import encode_photos

    with progress(None, "encode", "image") as meter:
        photos = encode_photos(data, reco.encoder, labels=set(names), on_progress=meter.advance)
    empty = sorted(set(names) - set(photos.labels))
    if empty:
        print(f"{len(empty)} labels without any image, the first: {empty[0]!r}", file=sys.stderr)
    return photos


def encode_captioned(data: Data, reco: Reco) -> Captioned:
    """Photos and captions, encoded; all captions of a photo count as its own."""
    from models.evaluation.evaluate import Captioned
    from models.evaluation.queries import Queries, encode_photos, encode_prompts

    with progress(None, "encode", "image") as meter:
        photos = encode_photos(data, reco.encoder, on_progress=meter.advance)
    names = [name.rsplit("#", 1)[0] for name in photos.ids]
    _, first, photo = np.unique(names, return_index=True, return_inverse=True)
    siblings = dict[str, set[str]]()
    for name, caption in zip(names, photos.ids, strict=True):
        siblings.setdefault(name, {name}).add(caption)
    own = [siblings[name] for name in names]
    images = Queries(photos.queries.encoded.take(first.tolist()), [own[i] for i in first])
    return Captioned(images, Queries(encode_prompts(photos.labels, reco.encoder), own), photo)


def read_rival(options: AblateOptions, data: Data, names: Sequence[str]) -> FineTuneBaseline | None:
    """The pairs that full fine-tuning and the fusion both learn from, None without --tune-on."""
    from models.data.samples import Reading, Sample
    from models.data.sources import read_all
    from models.evaluation.finetune import Tuning
    from models.evaluation.queries import encode_photos
    from models.evaluation.workbench import FineTuneBaseline

    if not options.tune_on:
        return None
    found = [item for item in read_all(options.tune_on, Reading(options.tune_caption)) if isinstance(item, Sample)]
    drawn = np.random.default_rng(0).permutation(len(found))[: options.tune_pairs]
    return FineTuneBaseline(
        [found[row] for row in sorted(drawn.tolist())],
        lambda encoder: encode_photos(data, encoder, labels=set(names)),
        Tuning(options.tune_steps),
    )
