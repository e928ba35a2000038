"""Sources of samples: webdataset tars, and folders with a table of captions."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from index_store.build.source import Reject
from models.data.folders import read_folder
from models.data.samples import Sample, check_template
from models.data.tables import TABLES, find_table
from models.data.webdataset import read_tar
from models.errors import DataError

SIDECARS = (".parquet", "_stats.json")  # what img2dataset writes beside KEY.tar
SKIP_ALL = 1 << 62  # more items than any source has, for counting them


def read_samples(source: Path, *, caption: str | None = None, skip: int = 0) -> Iterator[Sample | Reject]:
    """Read the samples of one webdataset .tar, or of one folder with a table of captions.

    The table is captions.csv, .jsonl or .parquet with the columns file (or filepath), caption,
    optionally id, and any others.
    caption: a template over the metadata, such as "a photo of {class}". Without one a tar's caption
    is its txt, else the json's "caption", else each entry of the json's "captions": one sample per
    entry with the ids key#0, key#1…, all sharing one bytes object.
    skip: the first items come without their image, which is not read: for counting, and for
    continuing an interrupted build.
    Ids may repeat; `encode.reject_duplicate_ids` rejects the later ones. Raises DataError.
    """
    check_template(caption)
    if source.is_dir():
        table = find_table(source)
        if table is None:
            raise DataError(f"{source.resolve().name} holds no table of captions: put one of {', '.join(TABLES)} there")
        return read_folder(table, caption, skip)
    if source.is_file() and source.suffix == ".tar":
        return read_tar(source, caption, skip)
    raise DataError(
        f"{source.name} is neither a .tar file nor a folder with one of {', '.join(TABLES)}: give one of these"
    )


def read_all(sources: Iterable[Path], *, caption: str | None = None, skip: int = 0) -> Iterator[Sample | Reject]:
    """Read the samples of several sources, one after the other. Arguments as in `read_samples`."""
    for source in sources:
        for item in read_samples(source, caption=caption, skip=max(0, skip)):
            skip -= 1
            yield item


def expand_sources(sources: Iterable[Path]) -> list[Path]:
    """Replace each folder of tars by its tars, and drop the files of img2dataset beside a tar."""
    expanded: list[Path] = []
    for source in sources:
        tars = sorted(source.glob("*.tar")) if source.is_dir() and find_table(source) is None else []
        if tars:
            expanded += tars
        elif not _is_sidecar(source):
            expanded.append(source)
    return expanded


def identity_files(source: Path) -> list[Path]:
    """The files by which a changed source is recognised: the tar, or the folder's table."""
    return [(source.is_dir() and find_table(source)) or source]


def _is_sidecar(path: Path) -> bool:
    return any(
        path.name.endswith(end) and path.with_name(path.name.removesuffix(end) + ".tar").is_file() for end in SIDECARS
    )
