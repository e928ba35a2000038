"""Where samples come from: webdataset tars and folders with a table of captions, read as one stream of samples and rejects."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from index_store.build.source import Reject
from models.data.folders import read_folder
from models.data.samples import Sample, check_template
from models.data.tables import TABLES, table_of
from models.data.webdataset import read_tar
from models.errors import DataError

SIDECARS = (".parquet", "_stats.json")  # what img2dataset writes beside KEY.tar
SKIP_ALL = 1 << 62  # more items than any source has: to count them all


def read_samples(source: Path, *, caption: str | None = None, skip: int = 0) -> Iterator[Sample | Reject]:
    """The samples of one webdataset .tar, or of one folder with a table of captions.

    The table is captions.csv, .jsonl or .parquet: file (or filepath), caption, optional id, any others.

    caption: a template over the metadata, such as "a photo of {class}"; by default a tar gives its txt, else the json's "caption",
    else one sample per entry of its "captions", with ids key#0, key#1…, all sharing one bytes object.
    skip: so many items come without their image, which is not read then: for counting, and for going on where a build stopped.
    Ids may repeat: `prepare` rejects the later ones.
    """
    check_template(caption)
    if source.is_dir():
        table = table_of(source)
        if table is None:
            raise DataError(f"{source.resolve().name} holds no table of captions: put one of {', '.join(TABLES)} there")
        return read_folder(table, caption, skip)
    if source.is_file() and source.suffix == ".tar":
        return read_tar(source, caption, skip)
    raise DataError(
        f"{source.name} is neither a .tar file nor a folder with one of {', '.join(TABLES)}: give one of these"
    )


def read_all(sources: Iterable[Path], *, caption: str | None = None, skip: int = 0) -> Iterator[Sample | Reject]:
    """The samples of several sources, one after the other."""
    for source in sources:
        for item in read_samples(source, caption=caption, skip=max(0, skip)):
            skip -= 1
            yield item


def expand_sources(sources: Iterable[Path]) -> list[Path]:
    """The sources that hold samples: a folder of tars is its tars in order, and what img2dataset wrote beside a tar is left out."""
    found: list[Path] = []
    for source in sources:
        tars = sorted(source.glob("*.tar")) if source.is_dir() and table_of(source) is None else []
        if tars:
            found += tars
        elif not _beside_a_tar(source):
            found.append(source)
    return found


def files_of(source: Path) -> list[Path]:
    """The files whose change makes a source another one: the tar, or the folder's table."""
    return [(source.is_dir() and table_of(source)) or source]


def _beside_a_tar(path: Path) -> bool:
    return any(
        path.name.endswith(end) and path.with_name(path.name.removesuffix(end) + ".tar").is_file() for end in SIDECARS
    )
