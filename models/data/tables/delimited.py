"""Strict reader of delimited text: the encoding and the delimiter are detected, and a line that
does not fit is a reject of its own.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from models.data.tables.columns import looks_like_image, recognised

DELIMITERS = (",", ";", "\t", "|")
HEAD_BYTES = 1 << 20  # of the file, from which encoding and delimiter are detected
WIDE = ("utf-16", "utf-32")
MAX_RECORD_LINES = 20  # lines over which one quoted field may reach
BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Encodings that are considered where a file is not UTF-8; few bytes do not tell them apart.
GUESSES = ["cp1252", "cp1250", "cp1251", "cp1253", "shift_jis", "gb18030", "big5", "euc_kr"]
GUESS_BYTES = 24

Record = tuple[int, list[str] | str]  # (its first line, its cells or why it has none)


@dataclass(frozen=True, slots=True)
class TextForm:
    """How a table is written.

    encoding: its codec.  guessed: whether nothing in the file states it.
    names: of the columns.  header: lines before the first row, 0 where the table has no header.
    """

    encoding: str
    guessed: bool
    delimiter: str
    names: tuple[str, ...]
    header: int


def detect_form(path: Path) -> TextForm:
    """Detect how a table is written, from its first megabyte."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    encoding, guessed = detect_encoding(head)
    text = head.decode(encoding, "replace")
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    delimiter = None
    if lines and lines[first].strip().lower().startswith("sep=") and len(lines[first].strip()) == 5:
        delimiter = lines[first].strip()[4]  # as Excel writes it
        first = next((number for number, line in enumerate(lines) if number > first and line.strip()), first)
    line = lines[first] if lines else ""
    delimiter = delimiter or max(DELIMITERS, key=lambda each: _fitness(line, each))
    cells = [cell.strip() for cell in _cells(line, delimiter)]
    if any(looks_like_image(cell) for cell in cells):
        image = next(i for i, cell in enumerate(cells) if looks_like_image(cell))
        names = [f"column {i + 1}" for i in range(len(cells))]
        names[image] = "image"
        if len(cells) > 1:
            caption = max((i for i in range(len(cells)) if i != image), key=lambda i: len(cells[i]))
            names[caption] = "caption"
        return TextForm(encoding, guessed, delimiter, tuple(names), first if first else 0)
    return TextForm(
        encoding, guessed, delimiter, tuple(name or f"column {i + 1}" for i, name in enumerate(cells)), first + 1
    )


def detect_encoding(head: bytes) -> tuple[str, bool]:
    """The codec of a text, and whether it is a guess."""
    for mark, name in BOMS.items():
        if head.startswith(mark):
            return name, False
    pairs = head[: len(head) // 2 * 2][:4096]
    for offset, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(pairs) > 3 and pairs[offset::2].count(0) > 0.6 * len(pairs[offset::2]):
            return name, True
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    if len(head) == HEAD_BYTES:
        lines = lines[:-1]  # the last one may be cut within a character
    broken = [line for line in lines if not _is_utf8(line)]
    if 2 * len(broken) <= len(lines) and (len(lines) > 1 or not broken):
        return "utf-8", False
    return _guess_encoding(b"\n".join(broken)), True


def read_records(path: Path, form: TextForm) -> Iterator[Record]:
    """Every record behind the header; a blank line is none.

    A record that does not parse, or whose quote is not closed, is one reject for its first line;
    reading goes on with the next line.
    """
    # surrogateescape cannot stand for a byte below 128, which may be damaged in these two
    errors = "replace" if form.encoding.startswith(WIDE) else "surrogateescape"
    with path.open(encoding=form.encoding, errors=errors, newline="") as file:
        lines = _numbered(file)
        pending: list[tuple[int, str]] = []
        while True:
            number, line = pending.pop(0) if pending else next(lines, (0, ""))
            if not number:
                return
            if number <= form.header or not line.strip():
                continue
            cells = parse_line(line, form.delimiter)
            taken: list[tuple[int, str]] = []
            while cells is None and len(taken) < MAX_RECORD_LINES:
                following = pending.pop(0) if pending else next(lines, None)
                if following is None:
                    break
                taken.append(following)
                cells = parse_line(line + "".join(text for _, text in taken), form.delimiter)
            yield number, _judged(cells, taken, form)
            if cells is None or isinstance(cells, str) or _swallows_rows(taken, form):
                pending = taken + pending


def parse_line(text: str, delimiter: str) -> list[str] | str | None:
    """The cells of a record, why it has none, or None where a quote is still open."""
    try:
        rows = list(csv.reader([text], delimiter=delimiter, strict=True, skipinitialspace=delimiter == "|"))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        if "field limit" in str(error):
            return f"a cell has more than {csv.field_size_limit():,} characters"
        return f"its quotes do not fit ({error})"
    return rows[0] if len(rows) == 1 else f"{len(rows)} records where one is expected"


def _judged(cells: list[str] | str | None, taken: list[tuple[int, str]], form: TextForm) -> list[str] | str:
    """The cells, or why the record is a reject."""
    if cells is None:
        return f"a quote is opened and not closed within {MAX_RECORD_LINES} lines"
    if isinstance(cells, str):
        return cells if not taken else "a quote is opened and not closed in its line"
    if _swallows_rows(taken, form):
        return "a quote is opened and not closed in its line"
    if len(cells) != len(form.names):
        return f"{len(cells)} fields where the header has {len(form.names)}: quote a text that holds {form.delimiter!r}"
    return _encoding_fault(cells, form.encoding) or cells


def _encoding_fault(cells: list[str], encoding: str) -> str | None:
    """Which damaged character the cells hold, None for none."""
    name, text = encoding.removesuffix("-sig").upper(), "".join(cells)
    if encoding.startswith(WIDE):
        return f"it is not {name} (a damaged character)" if "\ufffd" in text else None
    broken = next((letter for letter in text if "\udc80" <= letter <= "\udcff"), None)
    return broken and f"it is not {name} (byte 0x{ord(broken) - 0xDC00:02X})"


def _swallows_rows(taken: list[tuple[int, str]], form: TextForm) -> bool:
    """Whether further lines of a record are rows of their own: then a quote was left open."""
    for _, text in taken:
        cells = text.rstrip("\r\n").split(form.delimiter)
        if len(cells) >= len(form.names) > 1 and any(looks_like_image(cell.strip(' "')) for cell in cells):
            return True
    return False


def _numbered(file: Iterable[str]) -> Iterator[tuple[int, str]]:
    yield from enumerate(file, 1)


def _fitness(line: str, delimiter: str) -> tuple[int, int]:
    """How well a delimiter splits the first line: (known columns or images, columns)."""
    cells = [cell.strip() for cell in _cells(line, delimiter)]
    return sum(recognised(cell) or looks_like_image(cell) for cell in cells), len(cells)


def _cells(line: str, delimiter: str) -> list[str]:
    cells = parse_line(line, delimiter)
    return cells if isinstance(cells, list) else line.split(delimiter)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _guess_encoding(data: bytes) -> str:
    """The likeliest codec of text that is not UTF-8; cp1252 where little text is given."""
    from charset_normalizer import from_bytes

    if sum(byte > 127 for byte in data) < GUESS_BYTES:
        return GUESSES[0]
    best = from_bytes(data[: 64 << 10], cp_isolation=GUESSES).best()
    return best.encoding if best is not None else GUESSES[0]
