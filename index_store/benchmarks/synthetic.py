"""Synthetic pairs, clustered like the embeddings of a catalogue and reproducible.

    python -m index_store.benchmarks.synthetic STORE NAME VERSIONS... --encoder FINGERPRINT
        [--pairs 1000000] [--dim 512] [--index RECIPE]

writes versions of different pairs, for load tests of a service whose encoder has this fingerprint
(see its `/info`).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from index_store.build.build import build_version
from index_store.build.index import AUTO
from index_store.store import Store
from index_store.types import SIDES, Pairs, Side

PAIRS_PER_CLUSTER = 100  # on average
LATENT_DIM = 64  # directions of variation; with 512, clusters would be separate and any index exact
SPREAD = 0.7  # standard deviation of pairs about their centre; that of centres is 1, so clusters overlap
NOISE = 0.3  # in every direction
BLOCK = 50_000


class SyntheticPairs:
    """N pairs of width D; image and text of a pair are drawn independently in the same cluster.

    rows: per side (N, D) float16 unit rows.
    """

    def __init__(self, pairs: int, dim: int, seed: int = 7) -> None:
        self.pairs, self.dim = pairs, dim
        rng = np.random.default_rng(seed)
        clusters = max(1, pairs // PAIRS_PER_CLUSTER)
        share = rng.lognormal(sigma=1.0, size=clusters)  # few clusters are large, most are small
        self._share = share / share.sum()
        self._member = rng.choice(clusters, size=pairs, p=self._share)  # (N,)
        self._centres = {side: rng.standard_normal((clusters, LATENT_DIM), np.float32) for side in SIDES}
        self._spread = {
            side: rng.standard_normal((LATENT_DIM, dim), np.float32) / np.sqrt(np.float32(LATENT_DIM)) for side in SIDES
        }
        self.rows: dict[Side, np.ndarray] = {
            side: self._draw(side, self._member, seed) for seed, side in enumerate(SIDES)
        }

    def queries(self, side: Side, count: int) -> np.ndarray:
        """(count, D) float32 unit rows from the same clusters, none of them among the pairs."""
        members = np.random.default_rng(8).choice(len(self._share), size=count, p=self._share)
        return self._draw(side, members, 9).astype(np.float32)

    def additional_pairs(self, count: int) -> Pairs:
        """More pairs from the same clusters, to be added by edits."""
        members = np.random.default_rng(10).choice(len(self._share), size=count, p=self._share)
        image, text = (self._draw(side, members, seed) for seed, side in enumerate(SIDES, 11))
        return Pairs(
            np.array([f"added-{i:09d}" for i in range(count)]),
            image,
            text,
            [{"caption": f"the caption of addition {i}"} for i in range(count)],
        )

    def blocks(self) -> Iterator[Pairs]:
        """The pairs in blocks, as a build takes them."""
        for start in range(0, self.pairs, BLOCK):
            rows = slice(start, min(start + BLOCK, self.pairs))
            numbers = range(rows.start, rows.stop)
            ids = np.array([f"item-{i:09d}" for i in numbers])
            records = [{"caption": f"the caption of item {i}", "price": i % 997} for i in numbers]
            yield Pairs(ids, self.rows["image"][rows], self.rows["text"][rows], records)

    def _draw(self, side: Side, member: np.ndarray, seed: int) -> np.ndarray:
        """(len(member), D) float16 unit rows around the centres of their clusters."""
        rng, drawn = np.random.default_rng(seed), np.empty((len(member), self.dim), np.float16)
        for start in range(0, len(member), BLOCK):
            mine = member[start : start + BLOCK]
            latent = self._centres[side][mine] + SPREAD * rng.standard_normal((len(mine), LATENT_DIM), np.float32)
            rows = latent @ self._spread[side] + NOISE * rng.standard_normal((len(mine), self.dim), np.float32)
            drawn[start : start + BLOCK] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return drawn


def main() -> None:
    """Write the versions and activate the first."""
    parser = argparse.ArgumentParser(description="Versions of synthetic pairs.")
    parser.add_argument("store", type=Path)
    parser.add_argument("name")
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--encoder", required=True, help="the fingerprint that the versions name")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--index", default=AUTO)
    args = parser.parse_args()
    store = Store(args.store)
    for seed, version in enumerate(args.versions, 7):
        blocks = SyntheticPairs(args.pairs, args.dim, seed).blocks()
        built = build_version(
            store,
            args.name,
            version,
            blocks,
            encoder=args.encoder,
            kinds={"image": "vector", "text": "vector"},
            index=args.index,
        )
        print(f"{built.ref}: {built.pairs} pairs, {built.index['recipe']}, recall {built.recall}", flush=True)
    store.activate(args.name, args.versions[0])


if __name__ == "__main__":
    main()
