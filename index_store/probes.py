"""Probe queries kept with a version, and the recall that they prove."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from index_store.errors import DamagedVersion
from index_store.manifest import Manifest
from index_store.pairs import Side
from index_store.search import Fan

FOLDER = "probes"
COUNT = 256
DEPTH = 10  # recall@10 is what the floor speaks about
NOISE = 0.3  # length of the random step away from a stored row: a query is seldom a row of the memory
TIE = 1e-5  # a row scoring within this of the last exact answer is as good: captions repeat, and float32 sums differ by order


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Queries with known answers.  queries: (P, Dk) float16 unit rows.  scores: (P, k) float32, the exact best, descending."""

    queries: np.ndarray
    scores: np.ndarray

    @classmethod
    def sample(cls, fan: Fan, seed: int = 0) -> "Probes":
        """Rows of the memory, each moved a little, answered by a scan of every row."""
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(fan.pairs, size=min(COUNT, fan.pairs), replace=False))
        keys = fan.take(rows, lambda shard: shard.keys[fan.side]).astype(np.float32)  # (P, Dk)
        step = _unit(rng.standard_normal(keys.shape).astype(np.float32))
        queries = _unit(keys + NOISE * step).astype(np.float16)
        return cls(queries, fan.scan(queries.astype(np.float32), min(DEPTH, fan.pairs)).scores)

    def recall(self, fan: Fan, probes: int) -> float:
        """Share of the exact answers that the index finds, judged by the true scores of the rows it names."""
        queries, k = self.queries.astype(np.float32), self.scores.shape[1]
        hits = fan.search(queries, k, probes)
        keys = fan.take(np.maximum(hits.rows, 0).ravel(), lambda shard: shard.keys[fan.side]).astype(np.float32)
        true = np.einsum("pkd,pd->pk", keys.reshape(*hits.rows.shape, -1), queries)  # (P, k)
        return float(np.mean(hits.mask & (true >= self.scores[:, -1:] - TIE)))

    def write(self, root: Path, side: Side) -> list[str]:
        """Store them under `root`; the relative paths written."""
        (root / FOLDER).mkdir(exist_ok=True)
        names = [f"{FOLDER}/{side}.npy", f"{FOLDER}/{side}_scores.npy"]
        for name, rows in zip(names, (self.queries, self.scores), strict=True):
            np.save(root / name, rows, allow_pickle=False)
        return names

    @classmethod
    def read(cls, root: Path, side: Side, manifest: Manifest) -> "Probes":
        """The probes of one side, shaped as the manifest implies."""
        count, depth = min(COUNT, manifest.pairs), manifest.recall["k"]
        queries = _load(root, f"{FOLDER}/{side}.npy", (count, manifest.key_dim(side)), manifest)
        return cls(queries, _load(root, f"{FOLDER}/{side}_scores.npy", (count, depth), manifest))


def _load(root: Path, name: str, shape: tuple[int, int], manifest: Manifest) -> np.ndarray:
    try:
        rows: np.ndarray = np.load(root / name, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DamagedVersion(f"{manifest.ref}: {name} cannot be read ({type(error).__name__}): restore or rebuild the version") from error
    if rows.shape != shape:
        raise DamagedVersion(f"{manifest.ref}: {name} holds {rows.shape}, the manifest says {shape}: rebuild the version")
    return rows


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
