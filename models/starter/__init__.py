"""The bundled starter model: `clip.json` and `clip.safetensors`, `fusion.safetensors`, and a ready
memory of grocery photos.

The memory travels as arrays (no image): `memory.safetensors` holds the vectors, `memory.json` the
ids and class names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from index_store.build.build import build_version
from index_store.errors import UnknownVersion
from index_store.store import Store
from index_store.types import Pairs

__all__ = ["CONFIG", "FOLDER", "FUSION", "MEMORY", "VERSIONS", "StarterMemory", "install_starter", "starter_labels"]

FOLDER = Path(__file__).parent
CONFIG, FUSION = FOLDER / "clip.json", FOLDER / "fusion.safetensors"
MEMORY = "grocery"
# in the order they are built; the last one is served at first
VERSIONS = ("fruit-and-vegetables", "all")
PACKAGED = frozenset(
    ("Juice", "Milk", "Oatghurt", "Oat Milk", "Sour Cream", "Sour Milk", "Soyghurt", "Soy Milk", "Yoghurt")
)


@dataclass(frozen=True, slots=True, eq=False)
class StarterMemory:
    """N photos of C classes, all of them embedded by one encoder.

    encoder: its fingerprint.  ids: N strings.  label: (N,) int, each photo's row in `classes` and
    `text`.
    image: (N, D), image_key: (N, Dt), text: (C, D), float16 unit rows.  classes: C records
    {"caption", "class", "coarse_class"}.
    """

    encoder: str
    ids: Sequence[str]
    label: np.ndarray
    image: np.ndarray
    image_key: np.ndarray
    text: np.ndarray
    classes: Sequence[Mapping[str, Any]]

    def save(self, folder: Path) -> None:
        """Write both files, each in one move."""
        arrays = {
            "label": self.label.astype(np.int16),
            "image": self.image,
            "image_key": self.image_key,
            "text": self.text,
        }
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "memory.partial")
        (folder / "memory.partial").chmod(0o644)
        (folder / "memory.partial").replace(folder / "memory.safetensors")
        names = {"encoder": self.encoder, "classes": list(self.classes), "ids": list(self.ids)}
        (folder / "memory.json").write_text(json.dumps(names, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "StarterMemory":
        """Read what `save` wrote."""
        names = json.loads((folder / "memory.json").read_text())
        return cls(names["encoder"], names["ids"], **load_file(folder / "memory.safetensors"), classes=names["classes"])

    def pairs(self, version: str) -> Pairs:
        """The pairs of one version: every class in "all", those that are not PACKAGED in
        "fruit-and-vegetables".
        """
        # (C,) bool
        fresh = np.array([record["coarse_class"] not in PACKAGED for record in self.classes])
        rows = np.flatnonzero(fresh[self.label] | (version == "all"))
        return Pairs(
            ids=np.array(self.ids)[rows],
            image=self.image[rows],
            text=self.text[self.label[rows]],
            records=[self.classes[label] for label in self.label[rows]],
            image_key=self.image_key[rows],
        )


def starter_labels(folder: Path = FOLDER) -> list[str]:
    """The names of the 81 classes, sorted: the label set that goes with the memory."""
    return sorted({record["class"] for record in StarterMemory.load(folder).classes})


def install_starter(store: Store, folder: Path = FOLDER) -> None:
    """Build the memory "grocery" in `store`, unless it stands there already, and serve all 81
    classes.

    Safe to repeat: a version appears whole or not at all, and a memory that has a current version
    keeps it.
    """
    missing = [version for version in VERSIONS if MEMORY not in store.names() or version not in store.versions(MEMORY)]
    if missing:
        memory = StarterMemory.load(folder)
        for version in missing:
            build_version(
                store,
                MEMORY,
                version,
                [memory.pairs(version)],
                encoder=memory.encoder,
                kinds={"image": "trunk", "text": "vector"},
                source={"photos": "Grocery Store data set, training split", "licence": "MIT"},
            )
    try:
        store.current(MEMORY)
    except UnknownVersion:
        store.activate(MEMORY, VERSIONS[-1])
