"""Search on the device: clones of faiss, and what a plain product of all rows would take there.

Alphabet: B batch, N pairs, D width.
"""

import sys
from functools import partial
from typing import Any

import faiss
import torch

from index_store.benchmarks.synthetic import SyntheticPairs
from index_store.search.gpu import HOST_MEMORY
from index_store.store import Store
from loadtests.gpu.part import Part, run_part
from loadtests.support.report import quantiles
from models.benchmarks.gpu.subjects import K, build_memory, call_seconds, load_encoder

BATCHES = (1, 32, 256)


@torch.inference_mode()
def measure_products(part: Part, pairs: int, dim: int) -> dict[int, Any]:
    """Milliseconds of scores (B, N) and their K best, with all rows on the device, by batch."""
    dtype = torch.float16 if part.device == "cuda" else torch.float32
    keys = torch.nn.functional.normalize(torch.randn(pairs, dim, device=part.device), dim=1).to(dtype)  # (N, D)
    found = {}
    for batch in BATCHES:
        queries = keys[:batch].clone()  # (B, D)
        spent = call_seconds(lambda: (queries @ keys.T).topk(K, dim=1), part.device, part.choose(0.5, 0.02))  # noqa: B023  called at once
        found[batch] = quantiles(spent)
    told = ", ".join(f"batch {batch} {each['p50']:.3g} ms" for batch, each in found.items())
    part.say(f"product and top {K} of {pairs} rows, {str(dtype).removeprefix('torch.')}, p50: {told}")
    return found


def measure_clones(part: Part, pairs: int) -> dict[str, Any] | None:
    """`Snapshot.retrieve` with indexes cloned to the GPU, and without; None where faiss has no GPU.

    On the CPU the clones are in host memory.
    """
    if part.device == "cuda" and not faiss.get_num_gpus():
        part.say("this faiss sees no GPU: clones are not measured")
        return None
    encoder, store = load_encoder(part), part.work / "store-search"
    build_memory(store, "searched", ["v1"], pairs, encoder)
    queries = SyntheticPairs(2000, encoder.dim).queries("image", max(BATCHES))
    found: dict[str, Any] = {}
    for place, devices in (("mapped", ()), ("cloned", (0 if part.device == "cuda" else HOST_MEMORY,))):
        snapshot = Store(store).open("searched", encoder=encoder.fingerprint, devices=devices)
        for batch in BATCHES:
            call = partial(snapshot.retrieve, queries[:batch], "image", K)
            found[f"{place}, batch {batch}"] = quantiles(call_seconds(call, part.device, part.choose(0.5, 0.02)))
        part.say(
            f"retrieve of {pairs} pairs, {place}, p50: {found[f'{place}, batch {batch}']['p50']:.3g} ms at {batch}"
        )
    return found


def measure(part: Part) -> None:
    """Both."""
    dim = part.choose(512, 64)
    for pairs in part.choose((100_000, 1_000_000), (2_000,)):
        part.attempt(f"product, {pairs} pairs", partial(measure_products, part, pairs, dim))
    part.attempt("clones", partial(measure_clones, part, part.choose(100_000, 2_000)))


if __name__ == "__main__":
    sys.exit(run_part(measure))
