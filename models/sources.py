"""Where pairs come from: webdataset tars and folders with a captions.csv, read as a stream of samples and rejects."""

import csv
import json
import string
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
CSV_NAME = "captions.csv"
MAX_BYTES = 256 << 20  # of one member or file; more is refused rather than read into memory


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with one caption.

    id: the user's own.  image: the file's bytes.  metadata: the user's JSON fields, without the captions and the id.
    """

    id: str
    image: bytes = field(repr=False)
    caption: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reject:
    """One item that was left out. item: its id or name.  reason: one line."""

    item: str
    reason: str


class _Unusable(Exception):
    """Raised and caught in this file: the item becomes a Reject with this reason."""


def read_samples(source: Path, *, caption: str | None = None) -> Iterator[Sample | Reject]:
    """The samples of one webdataset .tar, or of one folder with a captions.csv (columns file, caption, optional id, any others).

    caption: a template over the metadata, such as "a photo of {class}"; by default a tar gives its txt, else the json's "caption",
    else one sample per entry of its "captions", with ids key#0, key#1…, all sharing one bytes object.
    Ids may repeat: `prepare` rejects the later ones.
    """
    _check_template(caption)
    if source.is_dir():
        return _read_folder(source, caption)
    if source.is_file() and source.suffix == ".tar":
        return _read_tar(source, caption)
    raise DataError(f"{source.name} is neither a .tar file nor a folder with a {CSV_NAME}: give one of these")


def _read_tar(path: Path, template: str | None) -> Iterator[Sample | Reject]:
    """Members are read as bytes and never extracted, so a name with .. or a leading / is only a name."""
    for key, files in _groups(path):
        if isinstance(files, str):
            yield Reject(key, files)
            continue
        try:
            yield from _tar_samples(key, files, template)
        except _Unusable as error:
            yield Reject(key, str(error))


def _tar_samples(key: str, files: Mapping[str, bytes], template: str | None) -> list[Sample]:
    """The samples of one key."""
    image = next((files[kind] for kind in IMAGES if kind in files), None)
    if image is None:
        raise _Unusable(f"no image among its members ({', '.join(sorted(files)) or 'none'}): one of {', '.join(IMAGES)} is needed")
    record = _record(files["json"]) if "json" in files else {}
    if template is not None:
        return [Sample(key, image, _filled(template, record), _metadata(record))]
    own, captions, record = record.get("caption"), record.get("captions"), _metadata(record)
    if "txt" in files:
        return [Sample(key, image, _said(_utf8(files["txt"], "txt")), record)]
    if own is not None or not isinstance(captions, list) or not captions:
        return [Sample(key, image, _said(own), record)]
    return [Sample(f"{key}#{i}", image, _said(each), record) for i, each in enumerate(captions)]


def _groups(path: Path) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """Neighbouring members with one key, by extension; or, in their place, why an item cannot be read."""
    key, files = "", dict[str, bytes]()
    for name, content in _members(path):
        folder, _, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        if isinstance(content, str) or not stem or not kind:
            yield name, content if isinstance(content, str) else "its name is not KEY.EXTENSION"
            continue
        found, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
        if files and (found != key or kind in files):  # an extension twice begins a second sample of the same key
            yield key, files
            files = {}
        key, files[kind] = found, content
    if files:
        yield key, files


def _members(path: Path) -> Iterator[tuple[str, bytes | str]]:
    """Every member's name with its bytes, or with why it has none. A damaged archive ends with one line about what was lost."""
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed below; here only what opening raises is caught)
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path.name} is not a plain .tar file ({reason}): unpack a compressed one first") from error
    with tar:
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member it has seen: a gigabyte per million
                if not member.isdir():
                    yield member.name, _bytes(tar, member)
        except (tarfile.TarError, OSError) as error:
            yield path.name, f"the archive breaks off ({error}): what lay behind is lost"
            return
        if not _ends_at(path, tar.offset):
            yield path.name, f"the archive breaks off at byte {tar.offset}: what lay behind, if anything, is lost"


def _ends_at(path: Path, offset: int) -> bool:
    """True where the end mark of a tar, a block of zeros, stands; tarfile itself takes damage for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    if not member.isreg():
        return "not a plain file"
    if member.size > MAX_BYTES:
        return f"{member.size} bytes, the limit is {MAX_BYTES}"
    content = tar.extractfile(member)
    return "not a plain file" if content is None else content.read()


def _read_folder(folder: Path, template: str | None) -> Iterator[Sample | Reject]:
    """One sample per line of captions.csv. A file outside the folder, by name or by link, is never opened."""
    try:
        with (folder / CSV_NAME).open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, restkey="", restval="")
            column = next((name for name in ("file", "filepath") if name in (table.fieldnames or ())), None)
            if column is None or (template is None and "caption" not in (table.fieldnames or ())):
                raise DataError(
                    f"{CSV_NAME} of {folder.name} has the columns {table.fieldnames}: file (or filepath) and caption are needed"
                )
            for line in table:
                name = line.pop(column)
                try:
                    yield _csv_sample(folder, name, line, template)
                except _Unusable as error:
                    yield Reject(name or f"line {table.line_num}", str(error))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{CSV_NAME} of {folder.name} cannot be read ({reason}): a UTF-8 file with commas is needed") from error


def _csv_sample(folder: Path, name: str, line: dict[str, str], template: str | None) -> Sample:
    line.pop("", None)  # cells beyond the header
    image = _file(folder, name)
    key = line.get("id") or name
    caption = _said(line["caption"]) if template is None else _filled(template, line)
    return Sample(key, image, caption, {field: value for field, value in line.items() if field not in ("id", "caption")})


def _file(folder: Path, name: str) -> bytes:
    """The bytes of a file that really lies in the folder."""
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise _Unusable("it is not a file within the folder")
        if path.stat().st_size > MAX_BYTES:
            raise _Unusable(f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _Unusable(f"the file cannot be read ({getattr(error, 'strerror', None) or 'no such name'})") from error


def _record(data: bytes) -> dict[str, Any]:
    """The json of one sample; NaN, which pandas writes and JSON does not know, is read as null."""
    try:
        record = json.loads(_utf8(data, "json"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"its json does not parse ({str(error)[:80]})") from error
    if not isinstance(record, dict):
        raise _Unusable("its json is not an object")
    return record


def _metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The user's own fields: captions are kept apart, and "id" is the pair's own, so the json's becomes "source_id"."""
    return {"source_id" if name == "id" else name: value for name, value in record.items() if name not in ("caption", "captions")}


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Unusable(f"its {what} is not UTF-8") from error


def _said(caption: object) -> str:
    """The caption, trimmed; an empty or missing one describes nothing."""
    if not isinstance(caption, str) or not caption.strip():
        raise _Unusable("no caption")
    return caption.strip()


def _filled(template: str, fields: Mapping[str, Any]) -> str:
    try:
        return _said(template.format_map(fields))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise _Unusable(f"the caption {template!r} cannot be filled ({type(error).__name__}: {error})") from error


def _check_template(template: str | None) -> None:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None]
    except ValueError as error:
        raise DataError(f'the caption template {template!r} is malformed ({error}): write it like "a photo of {{class}}"') from error
    if not all(name.isidentifier() for name in names):
        raise DataError(f'the caption template {template!r} may only name fields, not {names}: write it like "a photo of {{class}}"')
