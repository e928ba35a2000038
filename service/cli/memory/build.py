"""`reco memory build` and `reco memory import`: from sources to a finished version.

A build that was interrupted goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from models.progress import progress
from service.cli.memory.plan import Plan, VersionOptions, carry_out
from service.cli.options import MODEL, complete_memory, with_settings
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from index_store.types import KeyKind, Side
    from models.data.samples import Reading
    from models.data.streams import Encoding, Stream
    from models.encoder.encoder import Encoder

UNVERIFIABLE = (
    "nothing can check that these vectors came from {encoder}: if another encoder made them every neighbour will be "
    "wrong; name the right one with --model and --pretrained"
)
SOURCES = (
    "folders of photos (one per class, or with .txt beside them), tables of captions (.csv, .tsv, .jsonl, .json, .xlsx, "
    ".parquet, .arrow) or folders with one, webdataset tars or folders of them, finished versions"
)

app = typer.Typer(rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_memory)]


@dataclass(frozen=True, slots=True)
class ReadingOptions:
    """Flags that say how sources are read."""

    caption: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="over the item's fields or columns, such as 'a photo of {class}'; photos in folders have {class}, "
            "{folder} and {name}",
        ),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE=COLUMN,…", help="of tables: image=…,caption=…,id=…; default: usual names are guessed"
        ),
    ] = None
    follow_links: Annotated[bool, typer.Option("--follow-links", help="let links leave the folder of the photos")] = (
        False
    )

    def reading(self) -> Reading:
        """The flags as the readers take them. Raises DataError for malformed columns."""
        from models.data.samples import Reading
        from models.data.tables.columns import parse_columns

        return Reading(self.caption, parse_columns(self.columns), self.follow_links)


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """Flags that name the columns of embeddings made elsewhere."""

    id_column: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="COLUMN",
            help="of the metadata, that names a pair (default key, image_path, url, else its number)",
        ),
    ] = None
    image_vector: Annotated[str | None, typer.Option(metavar="COLUMN", help="of parquet files: the image vectors")] = (
        None
    )
    text_vector: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="the text vectors; without them the captions are encoded")
    ] = None

    def vectors(self) -> dict[Side, str]:
        """The vector column of each side; none for a folder of clip-retrieval's or a version."""
        if self.text_vector and not self.image_vector:
            raise UsageError("--text-vector without --image-vector: name the column of the image vectors too")
        sides: tuple[tuple[Side, str | None], ...] = (("image", self.image_vector), ("text", self.text_vector))
        return {side: column for side, column in sides if column}


@app.command("build")
@with_settings(*MODEL)
def build(
    settings: Settings,
    name: Name,
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE", help=SOURCES)],
    options: VersionOptions,
    how: ReadingOptions,
    image_key: Annotated[
        Literal["auto", "vector", "trunk"],
        typer.Option(help="what the image search compares; auto measures it on a sample"),
    ] = "auto",
) -> None:
    """Encode the sources into one new version."""
    from index_store import Store
    from models.data.streams import open_streams
    from service.pipeline.load import load_encoder

    options.check(name)
    reading = how.reading()
    with progress(None, "count") as meter:
        # counted first: a source that cannot be read is refused before the model is loaded
        opened = open_streams(sources, reading, meter.advance)
    _print_notes(opened)
    encoder = load_encoder(settings)
    plan = Plan(name, options, Store(settings.store), encoder, [], {}, _facts(reading))
    carry_out(*_with_streams(plan, opened, image_key, settings, reading))


def _with_streams(
    plan: Plan, opened: list[Any], image_key: Literal["auto", "vector", "trunk"], settings: Settings, reading: Reading
) -> tuple[Plan, Encoding]:
    """The plan with its streams, once it is known what the image search compares."""
    from models.data.streams import Encoding, opened_streams
    from service.cli.memory.image_key import choose_image_key

    def planned(kind: KeyKind) -> tuple[Plan, Encoding]:
        kinds: dict[Side, KeyKind] = {"image": kind, "text": "vector"}
        encoding = Encoding(
            plan.encoder, kinds, reading, settings.max_batch, settings.decode_workers, settings.max_pixels
        )
        return dataclasses.replace(plan, streams=opened_streams(opened, encoding), kinds=kinds), encoding

    if image_key != "auto":
        return planned(image_key)
    kind, choice = choose_image_key(plan, opened, planned)
    print(choice["why"])
    chosen, encoding = planned(kind)
    return dataclasses.replace(chosen, key_choice=choice), encoding


def _facts(reading: Reading) -> list[Any]:
    return [reading.caption, dict(reading.columns), reading.follow_links]


def _print_notes(opened: Iterable[Any]) -> None:
    """What was guessed of each source, and what is left alone."""
    for found in opened:
        for part in [] if isinstance(found, Path) else found[0]:
            for note in part.notes:
                print(f"{part.name}: {note}")


@app.command("import")
@with_settings(*MODEL)
def import_embeddings(
    settings: Settings,
    name: Name,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE",
            help="holds img_emb/*.npy, metadata/*.parquet and perhaps text_emb/*.npy; or parquet with vector columns",
        ),
    ],
    options: VersionOptions,
    columns: EmbeddingOptions,
) -> None:
    """Make one new version of embeddings made elsewhere, or of another version."""
    from index_store import Store
    from models.data.streams import Encoding
    from service.pipeline.load import load_encoder

    options.check(name)
    folder = Path(os.path.realpath(folder))
    if not columns.vectors():
        _check_folder(folder)
    encoder = load_encoder(settings)
    stream, kinds = _open_folder(folder, encoder, columns, dry_run=options.dry_run)
    facts = [columns.id_column, columns.image_vector, columns.text_vector]
    carry_out(Plan(name, options, Store(settings.store), encoder, [stream], kinds, facts), Encoding(encoder, kinds))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be imported, before a model is loaded. Raises DataError."""
    from index_store.build.from_version import is_version
    from models.data.clip_retrieval import is_embedding_folder
    from models.errors import DataError

    if not is_version(folder) and not is_embedding_folder(folder):
        raise DataError(
            f"{folder.name} holds neither img_emb, text_emb and metadata nor a version of our own: give a folder "
            "that does"
        )


def _open_folder(
    folder: Path, encoder: Encoder, columns: EmbeddingOptions, *, dry_run: bool
) -> tuple[Stream, dict[Side, KeyKind]]:
    """The stream of a version, or of embeddings made elsewhere, and what each side searches."""
    from index_store.build.from_version import is_version
    from index_store.storage.manifest import read_manifest
    from models.data.clip_retrieval import read_embedding_folder
    from models.data.streams import embedding_stream, version_stream
    from models.data.vector_tables import read_vector_table

    vectors = columns.vectors()
    of: dict[str, Any] = {"dim": encoder.dim, "encoder": encoder.fingerprint}
    if is_version(folder) and not vectors:
        manifest = read_manifest(folder)
        kinds: dict[Side, KeyKind] = {side: manifest.key_kind(side) for side in ("image", "text")}
        return version_stream(folder, encoder.fingerprint, kinds), kinds
    if vectors:
        found, notes = read_vector_table(folder, vectors, id_column=columns.id_column, **of)
        print(*(f"{folder.name}: {note}" for note in notes), sep="\n")
    else:
        found = read_embedding_folder(folder, id_column=columns.id_column, **of)
    print(UNVERIFIABLE.format(encoder=encoder.fingerprint))
    return embedding_stream(found, encoder, dry_run=dry_run), {"image": "vector", "text": "vector"}
