"""Look up the neighbours of a version's own pairs as `reco train` does, say how long it took: the
child process of `train`.
"""

import json
import sys
import time
from pathlib import Path

from index_store.store import Store
from index_store.types import SIDES, Side
from models.data.streams import Encoding
from models.encoder.encoder import Encoder, EncoderSpec
from models.fusion.checkpoint import training_free_fusions
from models.reco import Reco
from models.training.cache import look_up_prepared, prepare_pairs
from models.training.episodes import Episode, MemoryQuery

K = 10
LIMITS: dict[Side, float | None] = {
    "image": 0.98,
    "text": None,
}  # as a [[episodes]] table has them unless it says otherwise
NAME, VERSION = "bench", "v1"


def time_lookup(store: Path, prepared: Path, model: Path) -> tuple[Episode, float]:
    """The episode, and the seconds of its neighbour search.

    model: open_clip's JSON of an encoder with random weights.
    """
    encoder = Encoder.load(EncoderSpec(str(model), "random", device="cpu"))
    file = training_free_fusions("mean", encoder.dim, k=K)
    reco = Reco(encoder, file.fusions, file.fusion_id, file.k)
    snapshot = Store(store).open(NAME, VERSION, encoder=encoder.fingerprint)
    pairs = prepare_pairs(prepared, [store / NAME / VERSION], Encoding(encoder, dict.fromkeys(SIDES, "vector")))
    begun = time.perf_counter()
    episode = look_up_prepared(prepared, pairs, MemoryQuery(snapshot, reco, K, LIMITS))
    return episode, time.perf_counter() - begun


def main(store: str, prepared: str, model: str) -> None:
    """Print seconds, and the most megabytes that this process ever had in memory, mapped files
    included, as JSON.
    """
    _, seconds = time_lookup(Path(store), Path(prepared), Path(model))
    print(json.dumps({"seconds": round(seconds, 2), "peak_mb": round(_peak_mb(), 1)}))


def _peak_mb() -> float:
    """Linux's VmHWM, of this program alone: ru_maxrss counts what the process that started it held
    too.
    """
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
