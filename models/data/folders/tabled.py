"""A table of captions with the images that it names, or that it holds."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from index_store.build.source import Reject
from models.data.folders.files import URL, Finder, comparable, digest_of, read_bytes, real_path, stamp
from models.data.samples import (
    Reading,
    Sample,
    Skip,
    UnusableItem,
    choose_captions,
    fill_template,
    render_texts,
    split_captions,
)
from models.data.tables.columns import Columns, choose_columns
from models.data.tables.documents import TableRow
from models.data.tables.table import open_table
from models.errors import DataError

NUMBERED = re.compile(r"#\d+$")


class TablePart:
    """One table; each caption of each row is an item.

    root: the folder that holds the images, from which none may lead out.
    """

    def __init__(self, path: Path, root: Path, reading: Reading) -> None:
        """Open the table. Raises DataError."""
        self.name, self.label = f"{path.name} of {real_path(path).parent.name}", real_path(path).parent.name
        self._table = open_table(path, reading)
        self._reading = reading
        self._finder = Finder(root, follow_links=reading.follow_links)
        self.root = self._finder.root
        self.beside: Sequence[TablePart] | None = ()  # further tables of its photos; None: another tells of them
        self._origin = digest_of("table", stamp(path), reading.caption, dict(reading.columns))
        self.origins = frozenset([self._origin])
        self._named = set[str]()
        self._ids = set[str]()  # that the table gives
        self._numbered = set[str]()  # names of images without an id that end in a number, as in Flickr's
        self._urls = 0
        self._repeated = self._survey()

    @property
    def notes(self) -> list[str]:
        """What was guessed, other spellings of names, URLs, and photos that no row names."""
        notes = list(self._table.notes)
        notes += [f"{count} files were found under another spelling ({how})" for how, count in self._spelled()]
        if self._urls:
            notes.append(
                f"{self._urls} rows name a URL: fetch them with img2dataset, whose output is a source here: img2dataset "
                f"--url_list {self._table.path.name} --input_format {self._table.path.suffix.lstrip('.') or 'csv'} "
                f"--url_col '{self._table.columns.image}' --caption_col '{self._table.columns.caption}' "
                "--output_format webdataset --output_folder shards"
            )
        unnamed = self._count_unnamed()
        return [*notes, f"{unnamed} photos are named by no row, and left out"] if unnamed else notes

    def read(self, skip: Skip) -> Iterator[Sample | Reject]:
        """Every item; rows of one image come one after the other, so that it is encoded once."""
        self._finder.spellings.clear()
        counts: dict[str, int] = {}
        image: tuple[Path | None, bytes] = (None, b"")
        for position, row in self._rows():
            if isinstance(row, str):
                yield Reject(position, row)
                continue
            try:
                image, items = self._items(position, row, skip, counts, image)
            except UnusableItem as error:
                yield Reject(self._shown_name(position, row), str(error))
                continue
            yield from items

    def _items(
        self, position: str, row: dict[str, Any], skip: Skip, counts: dict[str, int], last: tuple[Path | None, bytes]
    ) -> tuple[tuple[Path | None, bytes], Iterator[Sample | Reject]]:
        """The image of a row with its path, and the row's items."""
        columns = self._columns(row)
        value, own = row.get(columns.image), _id_text(row.get(columns.id))
        held = _held_image(value)
        name = held[0] if held else value
        if value is None and row.get("status"):
            raise UnusableItem(f"it was not downloaded ({row['status']}: {row.get('error_message') or 'no reason'})")
        if not isinstance(name, str) or (not name and not held):
            raise UnusableItem("no file is named")
        path = None if held else self._finder.find(name)
        captions = self._captions(row, columns)
        several = len(captions) > 1
        item = own or self._free_id(name or position.partition(" ")[2], counts, len(captions))
        wanted = not all(skip(self._origin, f"{item}#{i}" if several else item) for i in range(len(captions)))
        data = b""
        if wanted:
            data = held[1] if held else last[1] if path == last[0] and last[1] else read_bytes(path or Path())
        metadata = self._metadata(row, columns, own)
        return (path, data), split_captions(item, data, captions, metadata, self._origin, numbered=several)

    def _free_id(self, base: str, counts: dict[str, int], captions: int) -> str:
        """An id for a row without one: the name of its image, numbered where that came before.

        counts: ids given so far, by name.  A row of several captions takes as many numbers.
        """
        number = counts.get(base, 0)
        while self._is_given(item := f"{base}#{number}" if number else base, base, captions):
            number += 1
        counts[base] = number + (1 if number else captions)
        return item

    def _is_given(self, item: str, base: str, captions: int) -> bool:
        """Whether the table gives this id, or that of one of its captions, to another row."""
        own = {f"{item}#{i}" for i in range(captions)} if captions > 1 else {item}
        return not self._ids.isdisjoint(own) or not self._numbered.isdisjoint(own - {base})

    def _captions(self, row: Mapping[str, Any], columns: Columns) -> list[str]:
        if self._reading.caption is not None:
            return fill_template(self._reading.caption, row)
        return choose_captions(row, list(dict.fromkeys([columns.caption, "caption", "captions"])))

    def _metadata(self, row: Mapping[str, Any], columns: Columns, own: str) -> dict[str, Any]:
        used = {columns.id, columns.caption, "captions", *([] if own else [columns.image])}
        if self._reading.caption is not None:
            used.discard(columns.caption)
            used.add("caption")
        if _held_image(row.get(columns.image)):
            used.add(columns.image)
        kept = {name: value for name, value in row.items() if name not in used}
        if self._table.types is None:
            return kept
        return self._table.types.convert(kept, [columns.image])

    def _columns(self, row: Mapping[str, Any]) -> Columns:
        """The columns of one row: a row of JSON may lack what others have."""
        columns = self._table.columns
        if columns.image in row and (columns.caption in row or self._reading.caption is not None):
            return columns
        try:
            return choose_columns(list(row), self._reading.columns, caption_needed=False, label="the row")
        except DataError:
            return columns

    def _rows(self) -> Iterator[TableRow]:
        """The rows; those of an image that comes again elsewhere follow its first one."""
        if not self._repeated:
            yield from self._table.rows()
            return
        groups: dict[str, list[TableRow]] = {}
        for position, row in self._table.rows():
            if (name := self._image_name(row)) in self._repeated:
                groups.setdefault(name, []).append((position, row))
        for position, row in self._table.rows():
            if (name := self._image_name(row)) not in self._repeated:
                yield position, row
            else:
                yield from groups.pop(name, ())

    def _survey(self) -> set[str]:
        """Names of images that come again with others in between.

        On the way it collects ids and types of cells, and counts URLs.
        """
        repeated, last = set[str](), ""
        for _, row in self._table.rows():
            self._collect(row)
            name = self._image_name(row)
            if not name:
                continue
            if name != last and name in self._named:
                repeated.add(name)
            self._urls += URL.match(name) is not None
            self._named.add(name)
            last = name
        return repeated

    def _collect(self, row: dict[str, Any] | str) -> None:
        """Remember types of cells, and what a generated id must not be: an id, a numbered name."""
        if isinstance(row, str):
            return
        if self._table.types is not None:
            self._table.types.see(row)
        columns = self._columns(row)
        with suppress(UnusableItem):
            if own := _id_text(row.get(columns.id)):
                self._ids.add(own)
            elif isinstance(name := row.get(columns.image), str) and NUMBERED.search(name):
                self._numbered.add(name)

    def _image_name(self, row: dict[str, Any] | str) -> str:
        value = "" if isinstance(row, str) else row.get(self._columns(row).image)
        return comparable(value) if isinstance(value, str) else ""

    def _shown_name(self, position: str, row: Mapping[str, Any]) -> str:
        value = row.get(self._columns(row).image)
        held = _held_image(value)
        return (held[0] if held else value if isinstance(value, str) else "") or position

    def _spelled(self) -> list[tuple[str, int]]:
        return sorted(self._finder.spellings.items())

    def _count_unnamed(self) -> int:
        """Photos beneath the root that no row names, also none of the tables beside."""
        tables = [self, *(self.beside or ())]
        names = set[str]().union(*(table._named for table in tables))
        if self.beside is None or not names or sum(table._urls for table in tables) >= len(names):
            return 0
        endings = {ending for name in names for ending in _endings(name)}
        own = (
            comparable(str(path.relative_to(self.root))) for paths in self._finder.images().values() for path in paths
        )
        return sum(each not in endings and names.isdisjoint(_endings(each)) for each in own)


def share_photos(tables: Sequence[TablePart]) -> None:
    """Let the first of the tables of each folder tell which of its photos none of them names."""
    first: dict[Path, TablePart] = {}
    for table in tables:
        if (one := first.setdefault(table.root, table)) is not table:
            one.beside, table.beside = (*(one.beside or ()), table), None


def _endings(path: str) -> Iterator[str]:
    """A path and what is left of it without its first folders."""
    yield path
    while path := path.partition("/")[2]:
        yield path


def _held_image(value: object) -> tuple[str, bytes] | None:
    """The name ("" for none) and the bytes of an image that the row itself holds."""
    if isinstance(value, bytes):
        return "", value
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        path = value.get("path")
        return (path if isinstance(path, str) else ""), value["bytes"]
    return None


def _id_text(value: object) -> str:
    """The user's id as text. 7.0 becomes "7": a column of integers with gaps is read as floats."""
    texts = render_texts(value, "id")
    if len(texts) > 1:
        raise UnusableItem("its id is a list")
    return texts[0] if texts else ""
