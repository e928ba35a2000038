"""Stored sets and the cache of embedded lists, with an embedding that can be held up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from index_store import Snapshot
from index_store.tests.support.small import open_memory, some_pairs
from service.engine import Engine
from service.errors import InvalidValue, NotFound, ServiceError, TooLarge, VersionNotServed
from service.labels import cache as label_vectors
from service.labels.cache import LabelVectors
from service.labels.index import LabelIndex
from service.labels.label_set import LabelSet
from service.labels.scoring import ScoreFunction, rank
from service.labels.store import DamagedLabelSet, LabelSets
from service.observability.metrics import Metrics
from service.tests.inside import scenario

LARGE = tuple(f"label {i}" for i in range(2000))
FEW = LabelSet(("a", "b"))
SOFTMAX = ScoreFunction(20.0)


class Held:
    """An embedding of width 1, each row the label's length, which goes on only as far as it
    is let.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.go = threading.Semaphore(0)

    def __call__(self, labels: Sequence[str], templates: Sequence[str], snapshot: Snapshot | None) -> np.ndarray:
        if len(labels) > 2:
            assert self.go.acquire(timeout=20)
        self.calls.append(len(labels))
        return np.array([[len(label)] for label in labels], np.float32)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="0", torch="0", faiss="0")


@pytest.fixture
def sets(tmp_path: Path, held: Held, metrics: Metrics) -> LabelSets:
    return LabelSets(
        tmp_path,
        held,
        function=ScoreFunction(100.0),
        max_texts=10,
        max_chars=1000,
        max_stored=2000,
        max_sets=3,
        metrics=metrics,
    )


async def until(sets: LabelSets, labels: LabelSet, done: int) -> None:
    async with asyncio.timeout(20):
        while sets.vectors.progress(labels) != [{"memory": None, "done": done, "of": len(labels.labels)}]:  # noqa: ASYNC110  the thread tells nobody
            await asyncio.sleep(0.005)


def test_sent_and_stored_lists_have_limits_of_their_own(sets: LabelSets) -> None:
    assert sets.check(LARGE, ["a {}"], stored=True).labels == LARGE
    for labels, stored in ((LARGE, False), ((*LARGE, "one more"), True)):
        with pytest.raises(TooLarge):
            sets.check(labels, ["a {}"], stored=stored)


def test_a_set_is_read_once_until_it_changes(sets: LabelSets) -> None:
    sets.put("s", FEW)
    assert sets.get("s") == FEW
    assert sets.get("s") is sets.get("s")
    sets.put("s", LabelSet(("c",)))
    assert sets.get("s").labels == ("c",)
    asyncio.run(sets.delete("s"))
    with pytest.raises(NotFound):
        sets.get("s")
    with pytest.raises(InvalidValue):
        sets.get("../s")


def test_earlier_versions_may_be_pinned_and_the_oldest_goes(sets: LabelSets) -> None:
    made = [LabelSet((f"label {i}",)) for i in range(6)]
    for each in made:
        sets.put("s", each)
    assert sets.versions("s") == [each.version for each in made[:1:-1]][:4]
    for kept in made[2:]:
        assert sets.get(f"s@{kept.version}") == kept
    for gone in (made[0].version, "never"):
        with pytest.raises(VersionNotServed, match=made[-1].version):
            sets.get(f"s@{gone}")
    for wrong in ("s@../x", "s@a@b", "../s@x"):
        with pytest.raises(InvalidValue):
            sets.get(wrong)
    assert sets.names() == ["s"]
    sets.put("s", made[3])  # back to what it was
    assert sets.get("s") == made[3]
    assert sets.versions("s")[0] == made[3].version
    assert len(set(sets.versions("s"))) == len(sets.versions("s"))
    sets.put("other", FEW)
    asyncio.run(sets.delete("s"))
    with pytest.raises(NotFound):
        sets.get(f"s@{made[3].version}")
    assert sets.versions("other") == [FEW.version]


def test_many_labels_are_kept_as_an_index_that_ranks_as_their_rows_do(
    monkeypatch: pytest.MonkeyPatch, metrics: Metrics
) -> None:
    monkeypatch.setattr(label_vectors, "INDEXED_LABELS", 3000)
    rng = np.random.default_rng(1)
    rows = np.asarray(
        rng.standard_normal((40, 32)).repeat(100, axis=0) + 0.4 * rng.standard_normal((4000, 32)), np.float32
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def embed(labels: Sequence[str], templates: Sequence[str], snapshot: Snapshot | None) -> np.ndarray:
        return rows[[int(label) for label in labels]]

    async def made(count: int) -> tuple[np.ndarray | LabelIndex, list[int]]:
        """What a list is kept as, and the bytes of the rows that its entry holds."""
        vectors = LabelVectors(embed, function=SOFTMAX, large=100, max_characters=10**6, metrics=metrics)
        try:
            found = await vectors.get(LabelSet(tuple(map(str, range(count)))), None)
            return found, [entry._rows.nbytes for entry in vectors._entries.values()]
        finally:
            vectors.close()

    assert isinstance(asyncio.run(made(3000))[0], np.ndarray)
    index, kept = asyncio.run(made(4000))
    assert isinstance(index, LabelIndex)
    assert kept == [0]  # no second copy beside the index
    found, exact = index.rank(rows[::100], SOFTMAX, 1), rank(rows[::100], rows, SOFTMAX, 1)
    np.testing.assert_array_equal(found.labels, exact.labels)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=0.05)


def test_a_large_set_is_embedded_in_the_background_and_once(sets: LabelSets, held: Held) -> None:
    async def run() -> None:
        large = sets.check(LARGE, ["{}"], stored=True)
        await sets.replace("large", large, None)
        await until(sets, large, 0)
        callers = [asyncio.create_task(sets.vectors.get(large, None)) for _ in range(3)]
        held.go.release()
        await until(sets, large, 128)
        # nobody waits behind it
        np.testing.assert_array_equal(await sets.vectors.get(FEW, None), [[1], [1]])
        callers[0].cancel()
        held.go.release(20)
        rows = [await caller for caller in callers[1:]]
        assert rows[0] is rows[1]
        assert isinstance(rows[0], np.ndarray)
        np.testing.assert_array_equal(rows[0][:, 0], [len(label) for label in LARGE])
        assert sorted(held.calls) == [2, 80, *[128] * 15]

    asyncio.run(run())


def test_a_set_replaced_or_deleted_is_embedded_no_further(sets: LabelSets, held: Held) -> None:
    async def run() -> None:
        large = sets.check(LARGE, ["{}"], stored=True)
        await sets.replace("large", large, None)
        waiting = asyncio.create_task(sets.vectors.get(large, None))
        await asyncio.sleep(0)
        await sets.replace("large", FEW, None)
        held.go.release(1)
        with pytest.raises(NotFound, match="replaced"):
            await waiting
        assert sets.vectors.progress(large) == []
        assert held.calls in ([], [128])
        await sets.replace("large", large, None)  # the same content again is begun again
        held.go.release(20)
        await until(sets, large, 2000)
        await sets.delete("large")
        assert sets.vectors.progress(large) == []

    asyncio.run(run())


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_swap_outlives_a_set_that_goes_while_it_is_embedded(
    sets: LabelSets, held: Held, tmp_path: Path, change: str
) -> None:
    async def run() -> None:
        large, snapshot = sets.check(LARGE, ["{}"], stored=True), open_memory(tmp_path / "store", some_pairs(5))
        await asyncio.to_thread(sets.put, "large", large)
        warming = asyncio.create_task(sets.embed_all(snapshot))
        while not sets.vectors.progress(large):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        if change == "replaced":
            await sets.replace("large", FEW, None)
        else:
            await sets.delete("large")
        held.go.release(20)
        await warming
        assert [entry["memory"] for entry in sets.vectors.progress(FEW)] == (
            ["things@v1"] if change == "replaced" else []
        )

    asyncio.run(run())


def test_closing_ends_it(sets: LabelSets, held: Held) -> None:
    async def run() -> None:
        large = sets.check(LARGE, ["{}"], stored=True)
        waiting = asyncio.create_task(sets.vectors.get(large, None))
        await until(sets, large, 0)
        sets.vectors.close()
        held.go.release(9)
        with pytest.raises(ServiceError, match="shutting down"):
            await waiting

    asyncio.run(run())


def test_over_http_a_stored_list_is_embedded_once_indexed_where_it_is_long_and_ranked_as_exactly(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, looks = (
        [f"{a} {b}" for a in ("red", "ripe", "tinned", "fresh") for b in range(30)],
        ("banana", "milk", "bread", "soap", "pear"),
    )
    labels = [f"{word} {look}" for look in looks for word in words]
    embedded: list[str] = []
    own = engine.label_sets.vectors._embed

    def counted(some: Sequence[str], templates: Sequence[str], snapshot: Snapshot | None) -> np.ndarray:
        embedded.extend(some)
        return own(some, templates, snapshot)

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(engine.label_sets.vectors, "_embed", counted)
        asked = {"texts": ["a photo of a ripe 7 banana.", "milk"], "label_set": "many", "top_k": 4, "enhance": "none"}
        tops = {}
        for at_most in (10_000, 500):
            monkeypatch.setattr(label_vectors, "INDEXED_LABELS", at_most)
            (await client.put("/label-sets/many", json={"labels": labels})).raise_for_status()
            embedded.clear()
            replies = await asyncio.gather(*(client.post("/classify", json=asked) for _ in range(8)))
            assert sorted(embedded) == sorted(labels)  # once, for eight callers
            assert len({reply.text for reply in replies}) == 1
            tops[at_most] = replies[0].json()["data"]
            kept = await engine.label_sets.vectors.get(engine.label_sets.get("many"), None)
            assert isinstance(kept, LabelIndex) is (at_most < len(labels))
            (await client.delete("/label-sets/many")).raise_for_status()
        for exact, found in zip(tops[10_000], tops[500], strict=True):
            assert found[0]["label"] == exact[0]["label"]
            assert found[0]["score"] == pytest.approx(exact[0]["score"], rel=0.05)
        assert tops[500][0][0]["label"] == "ripe 7 banana"

    scenario(engine, work)


def test_six_writers_of_one_set_leave_one_of_their_lists(tmp_path: Path, sets: LabelSets) -> None:
    lists = [LabelSet(tuple(f"writer {w} label {i}" for i in range(2000 + 300 * w))) for w in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(15):
            list(pool.map(lambda labels: sets.put("shared", labels), lists))
            assert sets.get("shared") in lists
    assert list(tmp_path.rglob("*.fresh")) == []


def test_a_damaged_set_is_named_and_leaves_the_others_alone(tmp_path: Path, sets: LabelSets) -> None:
    good = LabelSet(("banana", "lemon"))
    for name in ("good", "torn"):
        sets.put(name, good)
    (file,) = tmp_path.rglob("torn.json")
    flipped = file.read_text().replace("banana", "banane")
    lists = ('{"labels": [3], "templates": ["{}"]}', '{"labels": "abc", "templates": ["{}"]}')
    for content in ('{"labels": ["ban', "[]", *lists, "[" * 100_000, flipped):
        file.write_text(content)
        with pytest.raises(DamagedLabelSet, match=r"label set 'torn' cannot be read .*PUT it again, or DELETE it"):
            sets.get("torn")
        assert sets.get("good") == good
        snapshot = open_memory(tmp_path / f"store{len(content)}-{content[10:12].encode().hex()}", some_pairs(5))
        asyncio.run(sets.embed_all(snapshot))  # as before a swap: the damaged set stops nothing
    asyncio.run(sets.replace("torn", good, None))
    assert sets.get("torn") == good
    file.write_text("torn again")
    asyncio.run(sets.delete("torn"))
    assert sets.names() == ["good"]
