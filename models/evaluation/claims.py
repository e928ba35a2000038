"""What `reco eval ablate` measures: the claims of the method, row by row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from index_store.snapshot import Snapshot
from models.evaluation.evaluate import PLAIN
from models.evaluation.queries import ENHANCE, Setting
from models.evaluation.submemories import SHARES
from models.evaluation.workbench import Bench, Outcome, Trial
from models.fusion.checkpoint import FusionFile
from models.fusion.fusion import PRESETS, RULES
from models.reco import RetrievalMode
from models.training.config import TERMS

KS = (1, 2, 5, 10, 20, 50)
NOTHING = -1.0  # a limit that every neighbour exceeds


@dataclass(frozen=True, slots=True)
class Planned:
    """A row to be measured.  measure: what comes of a seed.  seeded: whether the seed matters.

    base: (N,) bool, what its gain is over, and `over` its name; None for plain CLIP.
    """

    claim: str
    setting: str
    measure: Callable[[int], Outcome]
    seeded: bool = False
    base: Callable[[], np.ndarray] | None = None
    over: str = "plain"


def _fixed(bench: Bench, claim: str, setting: str, trial: Trial) -> Planned:
    """A measurement that is the same for every seed."""
    return _seeded(bench, claim, setting, lambda _: trial, matters=False)


def _seeded(bench: Bench, claim: str, setting: str, trial: Callable[[int], Trial], *, matters: bool = True) -> Planned:
    """A measurement of the trial that a seed gives."""
    return Planned(claim, setting, lambda seed: Outcome(bench.right(trial(seed))), matters)


def plan(bench: Bench) -> Iterator[Planned]:
    """What is measured, claim by claim, on the frozen encoder."""
    core, both, memory = bench.rule("core"), Setting("both"), bench.memory

    yield _fixed(bench, "plain CLIP", "none", Trial(core, memory, PLAIN))
    vectors = bench.parts.by_vectors()
    for mode in (
        RetrievalMode("uni", "cross"),
        RetrievalMode("uni", "uni"),
        RetrievalMode("cross", "cross"),
        RetrievalMode("cross", "uni"),
    ):
        cell = f"{mode.search} search, {mode.fuse} fusion"
        yield _fixed(bench, "search x fusion, vector keys", cell, Trial(core, vectors, replace(both, mode=mode)))
    yield _fixed(bench, "search keys", "the memory's own", Trial(core, memory, both))
    for name in RULES:
        yield _fixed(bench, "fusion", f"{name}, not learned", Trial(bench.rule(name), memory, both))
    if (served := bench.served) is not None:
        for name in RULES[1:] if served.k != bench.recipe.k else ():
            yield _fixed(
                bench,
                "fusion",
                f"{name}, not learned, k {served.k}",
                Trial(bench.rule(name), memory, replace(both, k=served.k)),
            )
        yield _fixed(bench, "fusion", f"{served.fusion_id}, which serves, k {served.k}", Trial(served, memory, both))
    for name in PRESETS:
        yield _seeded(bench, "fusion", f"{name}, learned", partial(_learned, bench, name, TERMS))
    yield from learned_over_rules(bench)
    yield _fixed(
        bench, "control", "empty memory", Trial(core, memory, replace(both, image_limit=NOTHING, text_limit=NOTHING))
    )
    yield _seeded(bench, "control", "shuffled memory", lambda seed: Trial(core, bench.parts.shuffled(seed), both))
    yield from _plan_variations(bench)


def _plan_variations(bench: Bench) -> Iterator[Planned]:
    """Sides, neighbours, size of the memory and terms of the loss."""
    core, both, memory = bench.rule("core"), Setting("both"), bench.memory
    for enhance in ENHANCE[1:]:
        yield _fixed(bench, "side enhanced", enhance, Trial(core, memory, Setting(enhance)))
    for k in KS:
        if k <= len(memory):
            yield _fixed(bench, "neighbours", f"k {k}", Trial(core, memory, replace(both, k=k)))
    for share in SHARES:
        yield _seeded(
            bench, "size of the memory", f"{share:.0%}, core", partial(_smaller, bench, share), matters=share < 1
        )
        yield _seeded(
            bench, "size of the memory", f"{share:.0%}, default learned with 1 %", partial(_grown, bench, share)
        )
    for term in TERMS:
        yield _seeded(bench, "loss", f"{term} alone", partial(_learned, bench, "default", (term,)))


def learned_over_rules(bench: Bench) -> Iterator[Planned]:
    """What is learned against what is not, photo by photo, with the same k and keys: the memory's
    own, then the CLIP vectors.
    """
    memories = {"the memory's own": bench.memory} if bench.memory.key_kind("image") == "trunk" else {}
    learned: dict[str, Callable[[int], FusionFile]] = {"default": partial(bench.taught, "default")}
    if (served := bench.served) is not None:
        learned[f"{served.fusion_id}, which serves"] = lambda _: served
    for keys, snapshot in {**memories, "vector": bench.parts.by_vectors()}.items():
        both = _within(bench, snapshot)

        def right(file: FusionFile, snapshot: Snapshot = snapshot, setting: Setting = both) -> np.ndarray:
            return bench.right(Trial(file, snapshot, setting))

        for name, rule in product(learned, RULES[1:]):
            yield Planned(
                "learned over not learned",
                f"{name}, {keys} keys, over {rule}",
                lambda seed, right=right, of=learned[name]: Outcome(right(of(seed))),  # type: ignore[misc]
                seeded=name == "default",
                base=partial(right, bench.rule(rule)),
                over=rule,
            )


def contest(bench: Bench) -> Iterator[Planned]:
    """The fusion alone against the whole encoder, on the same pairs; fine-tuning with one seed, as
    it takes minutes.
    """
    if (rival := bench.rival) is None:
        return
    claim, tuning, recipe = f"learned from the same {len(rival.pairs)} pairs", rival.tuning, bench.recipe
    asked = f"default fusion alone, {recipe.steps} x {recipe.batch}"
    yield Planned(claim, asked, lambda seed: bench.fused(rival, seed), True)
    yield Planned(
        claim, f"full fine-tuning, {tuning.steps} x {tuning.batch}, no memory, one seed", lambda _: bench.tuned(rival)
    )


def _learned(bench: Bench, preset: str, terms: Sequence[str], seed: int) -> Trial:
    """Learned from the other memory, served with this one, which came after training."""
    return Trial(bench.taught(preset, seed, terms), bench.memory, Setting("both"))


def _smaller(bench: Bench, share: float, seed: int) -> Trial:
    snapshot = bench.parts.share(share, seed)
    return Trial(bench.rule("core"), snapshot, _within(bench, snapshot))


def _grown(bench: Bench, share: float, seed: int) -> Trial:
    """Learned with a hundredth of one memory, served with a share of the other."""
    snapshot = bench.parts.share(share, seed)
    return Trial(bench.taught("default", seed, share=0.01), snapshot, _within(bench, snapshot))


def _within(bench: Bench, snapshot: Snapshot) -> Setting:
    """Both sides, k no larger than the memory."""
    return Setting("both", min(bench.recipe.k, len(snapshot)))
