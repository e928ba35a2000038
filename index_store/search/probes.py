"""Probe queries kept with a version, and the recall that they prove."""

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
MAX_QUERIES = 256
RECALL_K = 10  # recall@10 is what the floor speaks about
QUERY_NOISE = 0.3  # length of the random step away from a stored row: a query is seldom a row of the memory
SCORE_TOLERANCE = 1e-5  # a row scoring within this of the last exact answer is as good: captions repeat, and float32 sums differ by order


@dataclass(frozen=True, slots=True, eq=False)
class ProbeQueries:
    """Queries with known answers.  queries: (P, Dk) float16 unit rows.  scores: (P, k) float32, the exact best, descending."""

    queries: np.ndarray
    scores: np.ndarray

    @classmethod
    def sample(cls, fan: ShardedIndex, seed: int = 0) -> "ProbeQueries":
        """Rows of the memory, each moved a little, answered by a scan of every row."""
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(fan.pairs, size=min(MAX_QUERIES, fan.pairs), replace=False))
        keys = fan.take(rows, lambda shard: shard.keys[fan.side]).astype(np.float32)  # (P, Dk)
        step = _unit(rng.standard_normal(keys.shape).astype(np.float32))
        queries = _unit(keys + QUERY_NOISE * step).astype(np.float16)
        return cls(queries, _exact(fan, queries.astype(np.float32), min(RECALL_K, fan.pairs)))

    @property
    def depth(self) -> int:
        """k, how many of the best each query must find."""
        return int(self.scores.shape[1])

    def found(self, fan: ShardedIndex, probes: int) -> np.ndarray:
        """(P,) share of each query's exact answers that the index finds, judged by the true scores of the rows it names."""
        queries = self.queries.astype(np.float32)
        hits = fan.search(queries, self.depth, probes)
        keys = fan.take(np.maximum(hits.rows, 0).ravel(), lambda shard: shard.keys[fan.side]).astype(np.float32)
        true = np.einsum("pkd,pd->pk", keys.reshape(*hits.rows.shape, -1), queries)  # (P, k)
        share: np.ndarray = np.mean(hits.mask & (true >= self.scores[:, -1:] - SCORE_TOLERANCE), axis=1)
        return share

    def recall(self, fan: ShardedIndex, probes: int) -> float:
        """The mean of what each query finds."""
        return float(self.found(fan, probes).mean())

    def write(self, root: Path, side: Side) -> list[str]:
        """Store them under `root`; the relative paths written."""
        (root / FOLDER).mkdir(exist_ok=True)
        names = [f"{FOLDER}/{side}.npy", f"{FOLDER}/{side}_scores.npy"]
        for name, rows in zip(names, (self.queries, self.scores), strict=True):
            np.save(root / name, rows, allow_pickle=False)
        return names

    @classmethod
    def read(cls, root: Path, side: Side, manifest: Manifest) -> "ProbeQueries":
        """The probes of one side, shaped as the manifest implies."""
        count, depth = min(MAX_QUERIES, manifest.pairs), manifest.recall["k"]
        queries = _load(root, f"{FOLDER}/{side}.npy", (count, manifest.key_dim(side)), manifest)
        return cls(queries, _load(root, f"{FOLDER}/{side}_scores.npy", (count, depth), manifest))


def _exact(fan: ShardedIndex, queries: np.ndarray, k: int) -> np.ndarray:
    """(P, k) float32, the best scores of each query among all rows, compared block by block.  queries: (P, Dk) float32."""
    best = np.empty((len(queries), 0), np.float32)
    for shard in fan.shards:
        for start in range(0, shard.pairs, BLOCK_ROWS):
            rows = to_float32(shard.keys[fan.side][start : start + BLOCK_ROWS])
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


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
