"""Training beside plain PyTorch and bare faiss, in one run on the same arrays and the same index
(`make bench-train`).

    python -m models.benchmarks.train [--pairs 100000] [--dim 512] [--turns 7] [--steps 5]
    [--searches 3]

What is compared takes turns, and a ratio is taken inside a turn, so that a machine whose speed
drifts does not bend it (a look-up is compared with the bare searches before and after it); figures
are medians over the turns. Neighbours are looked up in a process of its own, whose peak is told.
Writes JSON; exits with 1 where a target is missed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from index_store.benchmarks.synthetic import SyntheticPairs
from index_store.benchmarks.turns import measure_seconds, median
from index_store.build.build import build_version
from index_store.search.shard import build_flat_index
from index_store.storage.manifest import Manifest, index_file
from index_store.store import Store
from index_store.types import SIDES
from loadtests.support.report import compare_to_targets, environment, format_verdicts, write
from models.benchmarks.plain import PlainLoop
from models.benchmarks.prepare import NAME, VERSION, K, time_lookup
from models.encoder.encoder import Encoder, EncoderSpec
from models.fusion.fusion import build_fusions
from models.training.episodes import BLOCK, Episode
from models.training.trainer import Trainer, TrainerConfig

ENCODER = {  # nothing is encoded here: the smallest that has a fingerprint and the width
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}
PEAK_MB = 2000


def measure_prepare(folder: Path, manifest: Manifest, collection: SyntheticPairs, repeats: int) -> dict[str, Any]:
    """Seconds to look up the neighbours of every pair on both sides, on disk at the end, and of
    faiss to search for them alone.
    """
    ours, bare, peaks = [], [_bare_search(folder / "store", manifest, collection)], []
    for repeat in range(repeats):
        shutil.rmtree(folder / "prepared" / "neighbours", ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "models.benchmarks.prepare",
            *(str(folder / part) for part in ("store", "prepared", "model.json")),
        ]
        child = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        ours.append(child["seconds"])
        peaks.append(child["peak_mb"])
        bare.append(_bare_search(folder / "store", manifest, collection))
        print(
            f"look-up {repeat + 1} of {repeats}: {ours[-1]:.1f} s, faiss alone {bare[-1]:.1f} s, peak {peaks[-1]:.0f} MB",
            flush=True,
        )
    ratios = [(before + after) / 2 / whole for before, after, whole in zip(bare, bare[1:], ours, strict=False)]
    medians = {"seconds": median(ours), "bare_seconds": median(bare), "speed_vs_bare": median(ratios)}
    return {**medians, "peak_mb": max(peaks), "all_speeds_vs_bare": [round(ratio, 3) for ratio in ratios]}


def measure_steps(episode: Episode, turns: int, steps: int) -> dict[str, Any]:
    """Steps per second of our loop and of the plain one; the first turn, which finds everything
    cold, does not count.
    """
    learning = TrainerConfig((turns + 1) * steps, 256, 1e-4, 0.01, seed=0, scale=100.0)
    torch.manual_seed(0)
    fusions = build_fusions("default", episode.lookups["image"].query.shape[1])
    loop, plain = Trainer(fusions, [episode], [np.arange(len(episode))], learning), PlainLoop(episode, learning)
    ours, bare = [], []
    for turn in range(turns + 1):
        ours.append(steps / measure_seconds(lambda: loop.run(until=(turn + 1) * steps)))  # noqa: B023  called before the next turn
        bare.append(steps / measure_seconds(lambda: plain.run(steps)))
    ratios = [one / another for one, another in zip(ours[1:], bare[1:], strict=True)]
    medians = {"loop_per_s": median(ours[1:]), "plain_per_s": median(bare[1:]), "speed_vs_plain": median(ratios)}
    return {**medians, "all_speeds_vs_plain": [round(ratio, 3) for ratio in ratios]}


def measure_arithmetic(episode: Episode, turns: int, steps: int) -> dict[str, Any]:
    """Steps per second of the loop in bfloat16, and compiled, over those of the usual loop in the
    same turn; the first turn is cold.
    """
    usual = TrainerConfig((turns + 1) * steps, 256, 1e-4, 0.01, seed=0, scale=100.0)
    loops = dict[str, Trainer]()
    for name, learning in (
        ("fp32", usual),
        ("bf16", replace(usual, precision="bf16")),
        ("compiled", replace(usual, compile=True)),
        ("bf16, compiled", replace(usual, precision="bf16", compile=True)),
    ):
        torch.manual_seed(0)
        fusions = build_fusions("default", episode.lookups["image"].query.shape[1])
        loops[name] = Trainer(fusions, [episode], [np.arange(len(episode))], learning)
    rates = [
        {name: steps / measure_seconds(lambda: loop.run(until=(turn + 1) * steps)) for name, loop in loops.items()}  # noqa: B023  called at once
        for turn in range(turns + 1)
    ]
    return {name: median([each[name] / each["fp32"] for each in rates[1:]]) for name in loops}


def main() -> int:
    """Build, measure, print."""
    args = _arguments()
    report = {**environment("models.benchmarks"), "settings": {name: str(value) for name, value in vars(args).items()}}
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    model, collection = args.folder / "model.json", SyntheticPairs(args.pairs, args.dim)
    model.write_text(json.dumps({"embed_dim": args.dim, **ENCODER}), "utf-8")
    fingerprint = Encoder.load(EncoderSpec(str(model), "random", device="cpu")).fingerprint
    manifest = build_version(
        Store(args.folder / "store"),
        NAME,
        VERSION,
        collection.blocks(),
        encoder=fingerprint,
        kinds={"image": "vector", "text": "vector"},
    )
    report["index"] = {name: manifest.index[name] for name in ("recipe", "probes")}
    report["prepare"] = measure_prepare(args.folder, manifest, collection, args.searches)
    episode, _ = time_lookup(args.folder / "store", args.folder / "prepared", model)
    report["steps"] = measure_steps(episode, args.turns, args.steps)
    report["speed_vs_fp32"] = measure_arithmetic(episode, args.turns, args.steps)
    report["targets"] = compare_to_targets(
        [
            ("steps per s / plain PyTorch", report["steps"]["speed_vs_plain"], ">=", 0.95),
            ("neighbours per s / bare faiss", report["prepare"]["speed_vs_bare"], ">=", 0.8),
            ("peak of looking up, MB", report["prepare"]["peak_mb"], "<=", PEAK_MB),
        ]
    )
    print("steps per s / fp32: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in report["speed_vs_fp32"].items()))
    print(format_verdicts(report["targets"]))
    write(args.out, report)
    shutil.rmtree(args.folder)
    return 0 if all(row["reached"] for row in report["targets"]) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training beside plain PyTorch and bare faiss.")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of each loop in each turn")
    parser.add_argument("--searches", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("var/bench-train"), help="emptied before and after")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/train.json"))
    return parser.parse_args()


def _bare_search(store: Path, manifest: Manifest, collection: SyntheticPairs) -> float:
    """Seconds that faiss takes for the same queries, in the same blocks, on the version's own
    indexes.
    """
    spent = 0.0
    for side in SIDES:
        queries = [
            collection.rows[side][at : at + BLOCK].astype(np.float32) for at in range(0, collection.pairs, BLOCK)
        ]
        path = store / NAME / VERSION / manifest.shards[0]["folder"] / index_file(side)
        index, lists = build_flat_index(collection.rows[side]), None
        if path.exists():
            index, lists = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), faiss.SearchParametersIVF()
            lists.nprobe = manifest.index["probes"]
        spent += measure_seconds(lambda: [index.search(block, K, params=lists) for block in queries])  # noqa: B023  called before the next side
    return spent


if __name__ == "__main__":
    sys.exit(main())
