"""Probe queries of a version: queries with known exact answers, which measure index recall."""

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from index_store.errors import DamagedVersion
from index_store.float16 import to_float32
from index_store.search.shard import BLOCK_ROWS
from index_store.search.sharded import ShardedIndex
from index_store.storage.manifest import Manifest
from index_store.types import Side

FOLDER = "probes"
MAX_QUERIES = 256  # probe queries per side
RECALL_K = 10  # recall is measured as recall@10
QUERY_NOISE = 0.3  # length of the random step from a stored row: real queries seldom equal a row
SCORE_TOLERANCE = 1e-5  # rows this near the last exact score count as found: captions repeat, sums round


@dataclass(frozen=True, slots=True, eq=False)
class ProbeQueries:
    """Probe queries of one side with their exact answers.

    queries: (P, Dk) float16 unit rows.  scores: (P, k) float32, the exact best scores, descending.
    """

    queries: np.ndarray
    scores: np.ndarray

    @classmethod
    def sample(cls, index: ShardedIndex, seed: int = 0) -> "ProbeQueries":
        """Sample rows of the memory, move each by a random step, and answer them by a full scan."""
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(index.pairs, size=min(MAX_QUERIES, index.pairs), replace=False))
        keys = index.take(rows, lambda shard: shard.keys[index.side]).astype(np.float32)  # (P, Dk)
        step = _normalize(rng.standard_normal(keys.shape).astype(np.float32))
        queries = _normalize(keys + QUERY_NOISE * step).astype(np.float16)
        return cls(queries, _scan_scores(index, queries.astype(np.float32), min(RECALL_K, index.pairs)))

    @property
    def k(self) -> int:
        """How many of the best rows each query must find."""
        return int(self.scores.shape[1])

    def recall_per_query(self, index: ShardedIndex, probes: int) -> np.ndarray:
        """(P,) recall@k of each query under an index search that visits `probes` lists.

        A hit counts by its true score, computed from the stored row, not by the index's own score.
        """
        queries = self.queries.astype(np.float32)
        hits = index.search(queries, self.k, probes)
        keys = index.take(np.maximum(hits.rows, 0).ravel(), lambda shard: shard.keys[index.side]).astype(np.float32)
        true = np.einsum("pkd,pd->pk", keys.reshape(*hits.rows.shape, -1), queries)  # (P, k)
        recall: np.ndarray = np.mean(hits.mask & (true >= self.scores[:, -1:] - SCORE_TOLERANCE), axis=1)
        return recall

    def recall(self, index: ShardedIndex, probes: int) -> float:
        """Mean recall@k of all probe queries."""
        return float(self.recall_per_query(index, probes).mean())

    def write(self, root: Path, side: Side) -> list[str]:
        """Write the probe queries of one side under `root`; returns the relative paths."""
        (root / FOLDER).mkdir(exist_ok=True)
        names = [f"{FOLDER}/{side}.npy", f"{FOLDER}/{side}_scores.npy"]
        for name, rows in zip(names, (self.queries, self.scores), strict=True):
            np.save(root / name, rows, allow_pickle=False)
        return names

    @classmethod
    def read(cls, root: Path, side: Side, manifest: Manifest) -> "ProbeQueries":
        """Read the probe queries of one side. Raises DamagedVersion for wrong shapes."""
        count, k = min(MAX_QUERIES, manifest.pairs), manifest.recall["k"]
        queries = _load(root, f"{FOLDER}/{side}.npy", (count, manifest.key_dim(side)), manifest)
        return cls(queries, _load(root, f"{FOLDER}/{side}_scores.npy", (count, k), manifest))


def _scan_scores(index: ShardedIndex, queries: np.ndarray, k: int) -> np.ndarray:
    """(P, k) float32 exact best scores of each query over all rows.  queries: (P, Dk) float32."""
    best = np.empty((len(queries), 0), np.float32)
    for shard in index.shards:
        for start in range(0, shard.pairs, BLOCK_ROWS):
            rows = to_float32(shard.keys[index.side][start : start + BLOCK_ROWS])
            scores, _ = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
            best = -np.sort(-np.hstack([best, scores]), axis=1)[:, :k]
    return best


def _load(root: Path, name: str, shape: tuple[int, int], manifest: Manifest) -> np.ndarray:
    try:
        rows: np.ndarray = np.load(root / name, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DamagedVersion(
            f"{manifest.ref}: {name} cannot be read ({type(error).__name__}): restore or rebuild the version"
        ) from error
    if rows.shape != shape:
        raise DamagedVersion(
            f"{manifest.ref}: {name} holds {rows.shape}, the manifest says {shape}: rebuild the version"
        )
    return rows


def _normalize(rows: np.ndarray) -> np.ndarray:
    normalized: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalized
