"""`reco eval ablate`: every claim of the method as a row, measured on one set of labelled photos over one memory.

What is learned here is learned from the pairs of another memory, which ask that memory itself and never find themselves, so the memory
that answers was never seen in training. Every finished row is kept on disk: a second run goes on where the first one stopped.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from index_store.build import build_version
from index_store.pairs import SIDES, KeyKind, Pairs, Side
from index_store.snapshot import Snapshot
from index_store.store import Store
from models.checkpoint import FusionFile, training_free
from models.clip import Encoder
from models.episodes import Episode, joined, look_up
from models.errors import DataError
from models.evaluate import PLAIN, Labels, answer
from models.fusion import PRESETS, RULES, build_fusions
from models.loop import Learning, learn
from models.metrics import paired_interval, top_k_hits
from models.queries import ENHANCE, Photos, Setting
from models.reco import Reco, Route
from models.report_tables import table
from models.training_config import TERMS

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the memory
KS = (1, 2, 5, 10, 20, 50)
LEFT_OUT = "full fine-tuning of the encoder: left out, the encoder is frozen here and its training does not fit this command"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the learned rows learn.  alpha: of every rule.  seeds: at least three for an interval that means something."""

    steps: int = 200
    batch: int = 256
    learning_rate: float = 1e-4
    k: int = 10
    alpha: float = 2.0
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.  shares: top-1 by seed.  gain over plain with its 95 % interval, of the seeds' mean per photo."""

    claim: str
    setting: str
    shares: Sequence[float]
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What one row asks for one seed: the fusion, the memory and the setting."""

    file: FusionFile
    snapshot: Snapshot
    setting: Setting


class Bench:
    """The data of all rows.  folder: where memories are built and rows are kept."""

    def __init__(
        self, encoder: Encoder, photos: Photos, labels: Labels, memory: Snapshot, taught_by: Snapshot, recipe: Recipe, folder: Path
    ) -> None:
        self.encoder, self.photos, self.labels, self.recipe = encoder, photos, labels, recipe
        self.memory, self.taught_by = memory, taught_by
        self._store = Store(folder / "memories")
        self._pairs = joined(list(memory.blocks()))
        self._taught = dict[tuple[object, ...], FusionFile]()
        self._parts = dict[tuple[float, int], Snapshot]()
        self._target = labels.target(photos)

    @property
    def identity(self) -> str:
        """What the rows were measured on and how: rows of anything else are no part of this table."""
        asked = [sorted(zip(self.photos.ids, self.photos.labels, strict=True)), self.labels.labels, self.labels.templates]
        memories = [[snapshot.ref, snapshot.manifest.created] for snapshot in (self.memory, self.taught_by)]
        content = json.dumps([asked, memories, self.encoder.fingerprint, asdict(self.recipe)])
        return hashlib.sha256(content.encode()).hexdigest()

    def right(self, trial: Trial) -> np.ndarray:
        """(N,) bool: which photos one trial gets right."""
        reco = Reco(self.encoder, trial.file.fusions, trial.file.fusion_id, min(trial.file.k, len(trial.snapshot)))
        scores = answer(reco, self.photos, self.labels, trial.snapshot, trial.setting).scores
        return top_k_hits(scores, self._target, 1)

    def rule(self, name: str) -> FusionFile:
        """A training-free fusion."""
        return training_free(name, self.encoder.dim, alpha=self.recipe.alpha, k=self.recipe.k)

    def taught(self, preset: str, seed: int, terms: Sequence[str] = TERMS, share: float = 1.0) -> FusionFile:
        """A fusion learned from `share` of the other memory's pairs, once for each combination."""
        key = (preset, seed, tuple(terms), share)
        if key not in self._taught:
            recipe = self.recipe
            torch.manual_seed(seed)
            fusions = build_fusions(preset, self.encoder.dim, alpha=recipe.alpha)
            learning = Learning(recipe.steps, recipe.batch, recipe.learning_rate, 0.01, seed, self.encoder.logit_scale, terms)
            episode = self._episode(share, seed)
            learn(fusions, [episode], [np.arange(len(episode))], learning)
            self._taught[key] = FusionFile(fusions, recipe.k, f"{preset}-{seed}", {})
        return self._taught[key]

    def _episode(self, share: float, seed: int) -> Episode:
        """Every pair of the other memory asks it, or a part of it."""
        pairs = joined(list(self.taught_by.blocks()))
        snapshot = self.taught_by if share == 1 else self.built(_part(pairs, share, seed), self.kinds(self.taught_by))
        rule = self.rule("mean")
        reco = Reco(self.encoder, rule.fusions, rule.fusion_id, rule.k)
        limits: Mapping[Side, float | None] = {"image": 0.98, "text": None}
        return look_up("ablation", pairs, snapshot, reco, min(self.recipe.k, len(snapshot)), limits)

    def part(self, share: float, seed: int) -> Snapshot:
        """A random share of the memory."""
        if share == 1:
            return self.memory
        if (share, seed) not in self._parts:
            self._parts[share, seed] = self.built(_part(self._pairs, share, seed), self.kinds(self.memory))
        return self._parts[share, seed]

    def shuffled(self, seed: int) -> Snapshot:
        """The control: every image with the text of another pair."""
        rows = np.random.default_rng(seed).permutation(len(self._pairs))
        return self.built(replace(self._pairs, text=self._pairs.text[rows], text_key=None), {**self.kinds(self.memory), "text": "vector"})

    def by_vectors(self) -> Snapshot:
        """The memory with the CLIP vectors as keys."""
        return self.built(replace(self._pairs, image_key=None, text_key=None), {"image": "vector", "text": "vector"})

    def kinds(self, snapshot: Snapshot) -> dict[Side, KeyKind]:
        """What a search of this memory compares."""
        return {side: snapshot.key_kind(side) for side in SIDES}

    def built(self, pairs: Pairs, kinds: Mapping[Side, KeyKind]) -> Snapshot:
        """A memory of these pairs."""
        manifest = build_version(self._store, "ablation", None, [pairs], encoder=self.encoder.fingerprint, kinds=dict(kinds))
        return self._store.open("ablation", manifest.version, encoder=self.encoder.fingerprint)


@dataclass(frozen=True, slots=True)
class Planned:
    """A row to be measured.  trial: what a seed asks.  seeded: whether the seed matters."""

    claim: str
    setting: str
    trial: Callable[[int], Trial]
    seeded: bool = False


def ablate(bench: Bench, kept: Path) -> list[Row]:
    """Every row, in the order of the plan; those that `kept` already holds are not measured again.

    kept: a line that names the data, then a line per row. DataError where it was measured on something else.
    """
    done = {(row.claim, row.setting): row for row in _read(kept, bench.identity)}
    plain = bench.right(Trial(bench.rule("none"), bench.memory, PLAIN))
    rows = list[Row]()
    for planned in plan(bench):
        row = done.get((planned.claim, planned.setting))
        if row is None:
            seeds = bench.recipe.seeds if planned.seeded else bench.recipe.seeds[:1]
            row = _row(planned, plain, [bench.right(planned.trial(seed)) for seed in seeds])
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        rows.append(row)
    return rows


def plan(bench: Bench) -> Iterator[Planned]:
    """What is measured, claim by claim."""
    core, both, memory = bench.rule("core"), Setting("both"), bench.memory

    def fixed(claim: str, setting: str, trial: Trial) -> Planned:
        return Planned(claim, setting, partial(_same, trial))

    yield fixed("plain CLIP", "none", Trial(core, memory, PLAIN))
    vectors = bench.by_vectors()
    for route in (Route("uni", "cross"), Route("uni", "uni"), Route("cross", "cross"), Route("cross", "uni")):
        cell = f"{route.search} search, {route.fuse} fusion"
        yield fixed("search x fusion, vector keys", cell, Trial(core, vectors, replace(both, route=route)))
    yield fixed("search keys", "the memory's own", Trial(core, memory, both))
    for name in RULES:
        yield fixed("fusion", f"{name}, not learned", Trial(bench.rule(name), memory, both))
    for name in PRESETS:
        yield Planned("fusion", f"{name}, learned", partial(_learned, bench, name, TERMS), True)
    yield Planned("control", "shuffled memory", lambda seed: Trial(core, bench.shuffled(seed), both), True)
    for enhance in ENHANCE[1:]:
        yield fixed("side enhanced", enhance, Trial(core, memory, Setting(enhance)))
    for k in KS:
        if k <= len(memory):
            yield fixed("neighbours", f"k {k}", Trial(core, memory, replace(both, k=k)))
    for share in SHARES:
        yield Planned("size of the memory", f"{share:.0%}, core", partial(_smaller, bench, share), share < 1)
        yield Planned("size of the memory", f"{share:.0%}, default learned with 1 %", partial(_grown, bench, share), True)
    for term in TERMS:
        yield Planned("loss", f"{term} alone", partial(_learned, bench, "default", (term,)), True)


def _same(trial: Trial, _seed: int) -> Trial:
    return trial


def _learned(bench: Bench, preset: str, terms: Sequence[str], seed: int) -> Trial:
    """Learned from the other memory, served with this one, which came after training."""
    return Trial(bench.taught(preset, seed, terms), bench.memory, Setting("both"))


def _smaller(bench: Bench, share: float, seed: int) -> Trial:
    snapshot = bench.part(share, seed)
    return Trial(bench.rule("core"), snapshot, _within(Setting("both"), snapshot))


def _grown(bench: Bench, share: float, seed: int) -> Trial:
    """Learned with a hundredth of one memory, served with a share of the other."""
    snapshot = bench.part(share, seed)
    return Trial(bench.taught("default", seed, share=0.01), snapshot, _within(Setting("both"), snapshot))


def _within(setting: Setting, snapshot: Snapshot) -> Setting:
    """k no larger than the memory."""
    return replace(setting, k=min(10, len(snapshot)))


def _row(planned: Planned, plain: np.ndarray, right: Sequence[np.ndarray]) -> Row:
    mean = np.mean(right, axis=0)  # (N,)
    low, high = paired_interval(plain, mean)
    return Row(planned.claim, planned.setting, [float(each.mean()) for each in right], float(mean.mean() - plain.mean()), low, high)


def _part(pairs: Pairs, share: float, seed: int) -> Pairs:
    """A random share of the pairs, two at least."""
    return pairs.take(np.sort(np.random.default_rng(seed).permutation(len(pairs))[: max(2, round(share * len(pairs)))]))


def _read(kept: Path, identity: str) -> list[Row]:
    if not kept.exists():
        kept.write_text(json.dumps({"identity": identity}) + "\n", "utf-8")
    first, *rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    if first != {"identity": identity}:
        raise DataError(f"{kept.name} holds rows measured on other data, memories or options: name another folder with --out")
    return [Row(**row) for row in rows]


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/RESULTS.md."""
    cells = [
        (
            row.claim,
            row.setting,
            f"{100 * np.mean(row.shares):.1f}",
            f"{100 * np.std(row.shares):.1f}" if len(row.shares) > 1 else "",
            f"{100 * row.gain:+.1f}",
            f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
        )
        for row in rows
    ]
    return table(("claim", "setting", "top-1 %", "spread over seeds", "gain over plain", "95 % interval"), cells) + f"\n\n{LEFT_OUT}"
