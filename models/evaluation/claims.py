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
from models.evaluation.workbench import Outcome, Trial, Workbench
from models.fusion.checkpoint import FusionFile
from models.fusion.fusion import PRESETS, RULES
from models.reco import RetrievalMode
from models.training.config import TERMS

KS = (1, 2, 5, 10, 20, 50)
BELOW_ALL = -1.0  # a similarity limit that every neighbour exceeds


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row to measure.

    measure: seed -> outcome.  seeded: whether the outcome depends on the seed.
    base: (N,) bool, the outcome that the gain is relative to, named by `over`; None = plain CLIP.
    """

    claim: str
    setting: str
    measure: Callable[[int], Outcome]
    seeded: bool = False
    base: Callable[[], np.ndarray] | None = None
    over: str = "plain"


def _unseeded_row(bench: Workbench, claim: str, setting: str, trial: Trial) -> PlannedRow:
    """A row whose outcome is the same for every seed."""
    return _seeded_row(bench, claim, setting, lambda _: trial, matters=False)


def _seeded_row(
    bench: Workbench, claim: str, setting: str, trial: Callable[[int], Trial], *, matters: bool = True
) -> PlannedRow:
    """A row whose trial depends on the seed."""
    return PlannedRow(claim, setting, lambda seed: Outcome(bench.correct(trial(seed))), matters)


def plan_rows(bench: Workbench) -> Iterator[PlannedRow]:
    """The rows on the frozen encoder, claim by claim."""
    core, both, memory = bench.training_free("core"), Setting("both"), bench.memory

    yield _unseeded_row(bench, "plain CLIP", "none", Trial(core, memory, PLAIN))
    vectors = bench.parts.with_vector_keys()
    for mode in (
        RetrievalMode("uni", "cross"),
        RetrievalMode("uni", "uni"),
        RetrievalMode("cross", "cross"),
        RetrievalMode("cross", "uni"),
    ):
        cell = f"{mode.search} search, {mode.fuse} fusion"
        yield _unseeded_row(bench, "search x fusion, vector keys", cell, Trial(core, vectors, replace(both, mode=mode)))
    yield _unseeded_row(bench, "search keys", "the memory's own", Trial(core, memory, both))
    for name in RULES:
        yield _unseeded_row(bench, "fusion", f"{name}, not learned", Trial(bench.training_free(name), memory, both))
    if bench.served is not None:
        yield from _plan_served(bench, bench.served)
    for name in PRESETS:
        yield _seeded_row(bench, "fusion", f"{name}, learned", partial(_learned_trial, bench, name, TERMS))
    yield from plan_learned_over_rules(bench)
    yield _unseeded_row(
        bench,
        "control",
        "empty memory",
        Trial(core, memory, replace(both, image_limit=BELOW_ALL, text_limit=BELOW_ALL)),
    )
    yield _seeded_row(
        bench, "control", "shuffled memory", lambda seed: Trial(core, bench.parts.with_shuffled_texts(seed), both)
    )
    yield from _plan_variations(bench)


def _plan_served(bench: Workbench, served: FusionFile) -> Iterator[PlannedRow]:
    """The fusion that serves, beside the rules with its k where that is another one."""
    both = Setting("both")
    for name in RULES[1:] if served.k != bench.recipe.k else ():
        trial = Trial(bench.training_free(name), bench.memory, replace(both, k=served.k))
        yield _unseeded_row(bench, "fusion", f"{name}, not learned, k {served.k}", trial)
    trial = Trial(served, bench.memory, both)
    yield _unseeded_row(bench, "fusion", f"{served.fusion_id}, which serves, k {served.k}", trial)


def _plan_variations(bench: Workbench) -> Iterator[PlannedRow]:
    """Rows that vary the enhanced sides, k, the size of the memory and the terms of the loss."""
    core, both, memory = bench.training_free("core"), Setting("both"), bench.memory
    for enhance in ENHANCE[1:]:
        yield _unseeded_row(bench, "side enhanced", enhance, Trial(core, memory, Setting(enhance)))
    for k in KS:
        if k <= len(memory):
            yield _unseeded_row(bench, "neighbours", f"k {k}", Trial(core, memory, replace(both, k=k)))
    for share in SHARES:
        yield _seeded_row(
            bench,
            "size of the memory",
            f"{share:.0%}, core",
            partial(_smaller_memory_trial, bench, share),
            matters=share < 1,
        )
        yield _seeded_row(
            bench,
            "size of the memory",
            f"{share:.0%}, default learned with 1 %",
            partial(_grown_memory_trial, bench, share),
        )
    for term in TERMS:
        yield _seeded_row(bench, "loss", f"{term} alone", partial(_learned_trial, bench, "default", (term,)))


def plan_learned_over_rules(bench: Workbench) -> Iterator[PlannedRow]:
    """Trained fusions against training-free rules, photo by photo, with the same k, by both kinds
    of key.
    """
    memories = {"the memory's own": bench.memory} if bench.memory.key_kind("image") == "trunk" else {}
    learned: dict[str, Callable[[int], FusionFile]] = {"default": partial(bench.trained_fusion, "default")}
    if (served := bench.served) is not None:
        learned[f"{served.fusion_id}, which serves"] = lambda _: served
    for keys, snapshot in {**memories, "vector": bench.parts.with_vector_keys()}.items():
        both = _fitting_setting(bench, snapshot)

        def right(file: FusionFile, snapshot: Snapshot = snapshot, setting: Setting = both) -> np.ndarray:
            return bench.correct(Trial(file, snapshot, setting))

        for name, rule in product(learned, RULES[1:]):
            yield PlannedRow(
                "learned over not learned",
                f"{name}, {keys} keys, over {rule}",
                lambda seed, right=right, of=learned[name]: Outcome(right(of(seed))),  # type: ignore[misc]
                seeded=name == "default",
                base=partial(right, bench.training_free(rule)),
                over=rule,
            )


def plan_fine_tuning(bench: Workbench) -> Iterator[PlannedRow]:
    """The fusion alone against full fine-tuning on the same pairs. Fine-tuning has one seed, since
    it takes minutes.
    """
    if (rival := bench.rival) is None:
        return
    claim, tuning, recipe = f"learned from the same {len(rival.pairs)} pairs", rival.tuning, bench.recipe
    asked = f"default fusion alone, {recipe.steps} x {recipe.batch}"
    yield PlannedRow(claim, asked, lambda seed: bench.measure_fusion_alone(rival, seed), True)
    yield PlannedRow(
        claim,
        f"full fine-tuning, {tuning.steps} x {tuning.batch}, no memory, one seed",
        lambda _: bench.measure_fine_tuning(rival),
    )


def _learned_trial(bench: Workbench, preset: str, terms: Sequence[str], seed: int) -> Trial:
    """Trained on the second memory, tested with the first, which training never saw."""
    return Trial(bench.trained_fusion(preset, seed, terms), bench.memory, Setting("both"))


def _smaller_memory_trial(bench: Workbench, share: float, seed: int) -> Trial:
    snapshot = bench.parts.random_share(share, seed)
    return Trial(bench.training_free("core"), snapshot, _fitting_setting(bench, snapshot))


def _grown_memory_trial(bench: Workbench, share: float, seed: int) -> Trial:
    """Trained with 1 % of the second memory, tested with a share of the first."""
    snapshot = bench.parts.random_share(share, seed)
    return Trial(bench.trained_fusion("default", seed, share=0.01), snapshot, _fitting_setting(bench, snapshot))


def _fitting_setting(bench: Workbench, snapshot: Snapshot) -> Setting:
    """Both sides enhanced, k at most the size of the memory."""
    return Setting("both", min(bench.recipe.k, len(snapshot)))
