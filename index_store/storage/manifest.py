"""Manifest of a version: metadata and file checksums, written last and read strictly."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from index_store.errors import DamagedVersion, IncompatibleSnapshot, UnknownVersion
from index_store.storage.atomic import BLOCK_BYTES, CRC_DIGITS
from index_store.types import SIDES, KeyKind, Side

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SHA256_FIELD = "sha256"  # the manifest's own digest, over its canonical text without this field


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Metadata of a version, and size and checksums of each of its files.

    encoder: fingerprint "label@digest".  dim: D.  keys: {side: {"kind", "dim": Dk}}.  pairs: N.
    shards: [{"folder", "pairs"}] in row order.  index: {"asked", "recipe", "probes", "curve"},
    probes = 0 where the recipe has no inverted lists.  recall: {"k", "floor", "image", "text"} as
    measured at build.  files: {relative path: {"sha256", "bytes", "crc32"}}.
    created: UTC, ISO 8601.  source: free JSON of the builder, such as counts and rejects.
    """

    name: str
    version: str
    encoder: str
    dim: int
    keys: Mapping[Side, Mapping[str, Any]]
    pairs: int
    shards: list[dict[str, Any]]
    index: dict[str, Any]
    recall: dict[str, Any]
    files: dict[str, dict[str, Any]]
    created: str
    parent: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    @property
    def ref(self) -> str:
        """name@version, as replies, logs and commands refer to a version."""
        return f"{self.name}@{self.version}"

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that serving takes: "mapped" files, "resident" float32 rows of flat searches."""
        flat = [
            (shard, side)
            for shard in self.shards
            for side in SIDES
            if f"{shard['folder']}/{index_file(side)}" not in self.files
        ]
        resident = sum(4 * shard["pairs"] * self.key_dim(side) for shard, side in flat)
        return {"mapped": sum(file["bytes"] for file in self.files.values()), "resident": resident}

    def key_kind(self, side: Side) -> KeyKind:
        """What a query on `side` must be.

        "vector" = a CLIP vector, "trunk" = the tower's features before projection.
        """
        kind: KeyKind = self.keys[side]["kind"]
        return kind

    def key_dim(self, side: Side) -> int:
        """Dk, the width of the search keys of one side."""
        return int(self.keys[side]["dim"])

    def to_json(self) -> str:
        """The canonical JSON text with its own sha256; `from_json` refuses any other text."""
        fields = self._json_fields()
        return _canonical_json({**fields, SHA256_FIELD: _digest(fields)})

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse the text of a manifest strictly.

        Raises IncompatibleSnapshot for another format number, and DamagedVersion for any byte that
        `to_json` would not have written.
        """
        try:
            fields = json.loads(text)
            found = fields["format"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedVersion(
                f"{MANIFEST_FILE} is not a manifest ({error}): restore or rebuild the version".replace("\n", " ")
            ) from error
        if type(found) is int and found != FORMAT_VERSION and found > 0:
            remedy = (
                "upgrade it, or rebuild the version"
                if found > FORMAT_VERSION
                else "build the version again from its source"
            )
            raise IncompatibleSnapshot(
                f"{MANIFEST_FILE} has format {found}, this program reads format {FORMAT_VERSION}: {remedy}"
            )
        try:
            digest = fields.pop(SHA256_FIELD)
            if digest != _digest(fields) or text != _canonical_json({**fields, SHA256_FIELD: digest}):
                raise DamagedVersion(
                    f"{MANIFEST_FILE} does not match its own sha256: it was altered after the build, "
                    "restore or rebuild the version"
                )
            manifest = cls(**fields)
            manifest.check()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DamagedVersion(
                f"{MANIFEST_FILE} has missing or unknown fields ({error}): rebuild the version"
            ) from error
        return manifest

    @property
    def sha256(self) -> str:
        """The manifest's own digest in hexadecimal; a journal records it as its base."""
        return _digest(self._json_fields())

    def check(self) -> None:
        """Raise ValueError where the fields contradict each other."""
        if self.format != FORMAT_VERSION:
            raise ValueError(f"format {self.format!r}")
        if sum(shard["pairs"] for shard in self.shards) != self.pairs or self.pairs < 1:
            raise ValueError(f"{self.pairs} pairs, but the shards count {[shard['pairs'] for shard in self.shards]}")
        for side in SIDES:
            if self.key_kind(side) not in get_args(KeyKind) or self.key_dim(side) < 1:
                raise ValueError(f"{side} keys {dict(self.keys[side])}")
        for path, file in self.files.items():
            if len(file["crc32"]) != CRC_DIGITS * -(-file["bytes"] // BLOCK_BYTES):
                raise ValueError(f"{file['bytes']} bytes of {path}, but {len(file['crc32'])} digits of crc32")
        for path in [*self.files, *(shard["folder"] for shard in self.shards)]:
            if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
                raise ValueError(f"path {path!r}")

    def _json_fields(self) -> dict[str, Any]:
        """The fields as JSON reads them back, without the digest."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        canonical: dict[str, Any] = json.loads(_canonical_json(fields))
        return canonical


def index_file(side: Side) -> str:
    """Name of a side's index file in a shard's folder; a shard without it is searched flat."""
    return f"{side}.faiss"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a version directory, which must be called name/version.

    Raises UnknownVersion without a manifest, DamagedVersion or IncompatibleSnapshot for a bad one.
    """
    ref = f"{folder.parent.name}@{folder.name}"
    try:
        text = (folder / MANIFEST_FILE).read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnknownVersion(
            f"{ref} has no {MANIFEST_FILE}: it was never finished, or is not there; list the versions, or build it"
        ) from error
    except UnicodeDecodeError as error:
        raise DamagedVersion(
            f"{ref}: {MANIFEST_FILE} is not UTF-8 at byte {error.start}: restore or rebuild the version"
        ) from error
    except OSError as error:
        raise DamagedVersion(
            f"{ref}: {MANIFEST_FILE} cannot be read ({error.strerror}): restore it or its permissions"
        ) from error
    try:
        manifest = Manifest.from_json(text)
    except (DamagedVersion, IncompatibleSnapshot) as error:
        raise type(error)(f"{ref}: {error}") from error
    if manifest.ref != ref:
        raise DamagedVersion(
            f"{ref}: {MANIFEST_FILE} says it is {manifest.ref}: a version keeps the folder names it was built under"
        )
    return manifest


def same_encoder(one: str, another: str) -> bool:
    """True where two fingerprints "label@digest" have the same digest; the labels may differ."""
    return one.rpartition("@")[2] == another.rpartition("@")[2]


def _canonical_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical_json(fields).encode("ascii")).hexdigest()
