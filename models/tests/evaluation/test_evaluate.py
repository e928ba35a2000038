from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index_store.build.source import Reject
from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.types import Pairs
from models.data.encode import encode_samples
from models.data.samples import Sample
from models.data.sources import read_samples
from models.encoder.encoder import Encoder
from models.errors import ConfigError, DataError
from models.evaluation.evaluate import Captioned, Labels, classify, entities, retrieve
from models.evaluation.queries import LabelledPhotos, Queries, Setting, encode_photos
from models.evaluation.report import Report, compare_with_plain, markdown, terminal
from models.fusion.checkpoint import training_free_fusions
from models.reco import Reco, RetrievalMode
from models.tests.small import build_memory, image_bytes, picture, unit_rows, write_tar

LABELS = ["red", "green", "blue", "grey", "pink", "white"]
EACH = 4
SIDES = [
    Setting("image", 2, image_limit=None),
    Setting("text", 2, image_limit=None),
    Setting("both", 2, image_limit=None),
]


def photo(label: int, i: int) -> bytes:
    """Photos of one label are nearly the same picture."""
    image = np.asarray(picture(label, 64, 64)).astype(int) + np.random.default_rng(i).integers(-3, 4, (64, 64, 3))
    return image_bytes(Image.fromarray(image.clip(0, 255).astype(np.uint8)), "PNG")


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members: list[tuple[str, bytes | dict[str, str]]] = []
    for label, name in enumerate(LABELS):
        for i in range(EACH):
            members += [(f"{name}-{i}.png", photo(label, i)), (f"{name}-{i}.json", {"class": name})]
    return write_tar(tmp_path_factory.mktemp("tar") / "photos.tar", members)


@pytest.fixture(scope="module")
def snapshot(tar: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The same photos as memory: without self-exclusion, each would find itself."""
    samples = read_samples(tar, caption="a photo of a {class}.")
    (pairs,) = encode_samples(samples, encoder, kinds={"image": "vector", "text": "vector"})
    return build_memory(tmp_path_factory.mktemp("store"), pairs, encoder.fingerprint)


@pytest.fixture(scope="module")
def photos(tar: Path, encoder: Encoder) -> LabelledPhotos:
    return encode_photos(read_samples(tar, caption="{class}"), encoder, labels=LABELS, batch=5)


def ruled(encoder: Encoder, alpha: float = 2.0) -> Reco:
    file = training_free_fusions("mean", encoder.dim, alpha=alpha)
    return Reco(encoder, file.fusions, file.fusion_id, file.k)


def counts(report: Report, name: str) -> dict[str, int]:
    """How many were right, by method."""
    return {
        line.method: round(figure.share * figure.queries)
        for line in report.lines
        for figure in line.figures
        if figure.name == name
    }


def test_classify_against_a_memory_that_knows(encoder: Encoder, photos: LabelledPhotos, snapshot: Snapshot) -> None:
    reco = ruled(encoder, alpha=100.0)  # what is found drowns what random weights saw
    labels = Labels(LABELS, ["a photo of a {}."], encoder)
    report = classify(
        reco, photos, labels, snapshot, [Setting("image", 3, image_limit=None), Setting("both", 3, image_limit=None)]
    )
    right = counts(report, "top-1")
    assert list(right) == ["none", "image, k 3", "both, k 3", "(1-NN)", "(class means)"]
    assert (
        right["(1-NN)"] == right["(class means)"] == right["image, k 3"] == 24
    )  # the captions found are the labels themselves
    assert right["none"] < 24  # random weights know nothing
    gain = {line.method: line.figures[0] for line in report.lines}["image, k 3"]
    assert gain.low > 0
    assert gain.low <= gain.gain <= gain.high
    assert report.details is not None
    assert {after for _, _, _, after in report.details.classes} == {1.0}
    assert report.details.confused == []


def test_the_four_figures_are_those_computed_by_hand(
    reco: Reco, tar: Path, photos: LabelledPhotos, snapshot: Snapshot
) -> None:
    templates = ["{}", "the {}"]
    report = classify(reco, photos, Labels(LABELS, templates, reco.encoder), snapshot, SIDES)
    samples = [item for item in read_samples(tar, caption="{class}") if isinstance(item, Sample)]
    target = np.array([LABELS.index(item.caption) for item in samples])
    pixels = np.stack([reco.encoder.read_image(item.image) for item in samples])
    images = reco.embed(pixels, "image", snapshot, 2, SearchParams(exclude=[{item.id} for item in samples]))
    for image, text, method in ((0, 0, "none"), (1, 0, "image, k 2"), (0, 1, "text, k 2"), (1, 1, "both, k 2")):
        labels = reco.embed_labels(LABELS, templates, snapshot if text else None, 2)
        best = ((images.vectors if image else images.plain) @ labels.T).argmax(1)
        assert counts(report, "top-1")[method] == (best == target).sum()


def test_no_image_finds_itself_nor_its_double(reco: Reco, encoder: Encoder, tmp_path: Path) -> None:
    """A memory of one photo with a misleading label, under its own id and as a copy under another:
    both leave the photo plain.
    """
    data = photo(0, 0)
    labels = Labels(LABELS, ["{}"], encoder)
    for name in ("self", "copy"):
        (pairs,) = encode_samples(
            [Sample(name, data, "blue", {"class": "blue"})], encoder, kinds={"image": "vector", "text": "vector"}
        )
        snapshot = build_memory(tmp_path / name, pairs, encoder.fingerprint)
        asked = encode_photos([Sample("self", data, "red", {})], encoder)
        report = classify(reco, asked, labels, snapshot, [Setting("image", 1)])
        assert counts(report, "top-1")["image, k 1"] == counts(report, "top-1")["none"]
        assert "0.98" in " ".join(report.notes)


def test_a_k_beyond_the_memory_is_refused(reco: Reco, photos: LabelledPhotos, snapshot: Snapshot) -> None:
    with pytest.raises(ConfigError, match="holds 24 pairs"):
        classify(reco, photos, Labels(LABELS, ["{}"], reco.encoder), snapshot, [Setting("image", 25)])


def test_one_label_tells_nothing_apart(encoder: Encoder) -> None:
    with pytest.raises(DataError, match="at least two"):
        Labels(["red"], ["{}"], encoder)


def test_baselines_are_left_out_where_the_memory_names_no_label(
    reco: Reco, encoder: Encoder, photos: LabelledPhotos, tmp_path: Path
) -> None:
    rows = unit_rows(np.random.default_rng(0).standard_normal((5, encoder.dim)))
    snapshot = build_memory(tmp_path, Pairs(np.arange(5), rows, rows, [{"caption": "c"}] * 5), encoder.fingerprint)
    report = classify(reco, photos, Labels(LABELS, ["{}"], encoder), snapshot, SIDES)
    assert [line.method for line in report.lines] == ["none", "image, k 2", "text, k 2", "both, k 2"]


def test_what_cannot_be_classified_is_counted(encoder: Encoder) -> None:
    cut, odd = Sample("cut", b"no", "red", {}), Sample("odd", photo(0, 0), "violet", {})
    samples: list[Sample | Reject] = [Reject("x", "why"), odd, cut, Sample("ok", photo(0, 9), "red", {})]
    asked = encode_photos(samples, encoder, labels=LABELS)
    assert ([*asked.ids], [reject.item for reject in asked.rejects]) == (["ok"], ["x", "odd", "cut"])
    with pytest.raises(DataError, match="3 were rejected"):
        encode_photos(samples[:3], encoder, labels=LABELS)


def test_entities_are_counted_apart(encoder: Encoder, photos: LabelledPhotos, snapshot: Snapshot) -> None:
    reco = ruled(encoder, alpha=100.0)
    labels = Labels(LABELS, ["a photo of a {}."], encoder)
    report = entities(reco, photos, labels, snapshot, [Setting("image", 3, image_limit=None)], ["red", "blue"])
    line = report.lines[1]
    assert [(each.name, each.queries, each.share) for each in line.figures] == [
        ("seen", 8, 1),
        ("unseen", 16, 1),
        ("harmonic mean", 24, 1),
    ]
    with pytest.raises(DataError, match="parts the labels"):
        entities(reco, photos, labels, snapshot, [], LABELS)


@pytest.fixture
def world(tmp_path: Path, encoder: Encoder) -> tuple[Captioned, Snapshot]:
    """Photos whose captions say nothing but for what the memory ties them to: 12 subjects, a photo
    and two captions each.
    """
    rng = np.random.default_rng(0)
    seen, said = (unit_rows(rng.standard_normal((12, encoder.dim))) for _ in range(2))

    def near(rows: np.ndarray, spread: float = 0.05) -> np.ndarray:
        return unit_rows(rows + spread * rng.standard_normal(rows.shape))

    pairs = Pairs(
        np.array([f"m{i}" for i in range(36)]),
        near(np.tile(seen, (3, 1))),
        near(np.tile(said, (3, 1))),
        [{"caption": "c"}] * 36,
    )
    photo_of = np.repeat(np.arange(12), 2)
    images, texts = near(seen), near(said[photo_of])

    def queries(vectors: np.ndarray) -> Queries:
        from models.encoder.encoder import Encoded

        return Queries(Encoded(vectors, None), [()] * len(vectors))

    return Captioned(queries(images), queries(texts), photo_of), build_memory(tmp_path, pairs, encoder.fingerprint)


def test_retrieval_in_both_directions(encoder: Encoder, world: tuple[Captioned, Snapshot]) -> None:
    asked, snapshot = world
    report = retrieve(
        ruled(encoder, 1.0),
        asked,
        snapshot,
        [Setting("image", 3, image_limit=None), Setting("both", 3, image_limit=None)],
    )
    for name in ("T2I R@1", "I2T R@1"):
        right = counts(report, name)
        assert right["none"] < right["image, k 3"] == right["both, k 3"] == (24 if name[0] == "T" else 12)
    assert [figure.queries for figure in report.lines[0].figures] == [24, 24, 24, 12, 12, 12]


@pytest.mark.parametrize(
    ("search", "fuse", "helps"), [("uni", "cross", True), ("uni", "uni", False), ("cross", "cross", False)]
)
def test_only_the_papers_route_crosses_over(
    encoder: Encoder, world: tuple[Captioned, Snapshot], search: str, fuse: str, helps: bool
) -> None:
    """Where images and texts share nothing, only a search on the query's own side that brings the
    other side can help.
    """
    asked, snapshot = world
    mode = RetrievalMode(search, fuse)  # type: ignore[arg-type]
    report = retrieve(ruled(encoder, 1.0), asked, snapshot, [Setting("image", 3, mode, image_limit=None)])
    assert (report.lines[1].figures[0].share > 0.9) is helps


def test_both_fusions_bring_twice_the_neighbours(encoder: Encoder, world: tuple[Captioned, Snapshot]) -> None:
    asked, snapshot = world
    found = (
        ruled(encoder).enhance(asked.images.encoded, "image", snapshot, 3, mode=RetrievalMode("uni", "both")).neighbors
    )
    assert found is not None
    alone = [snapshot.retrieve(asked.images.encoded.vectors, "image", 3, values=values) for values in ("other", "same")]
    np.testing.assert_array_equal(found.values, np.concatenate([each.values for each in alone], 1))
    assert found.mask.shape == (12, 6)


def test_the_table_shows_shares_with_gain_and_interval() -> None:
    plain, better = np.zeros(100, bool), np.arange(100) < 40
    report = Report(
        "classify",
        "m@1",
        "abc",
        10,
        ["100 images"],
        compare_with_plain({"none": {"top-1": plain}, "both": {"top-1": better}}),
    )
    title, note, _, first, second = terminal(report).splitlines()
    assert (title, note) == ("classify · m@1 · fusion abc · k 10", "100 images")
    assert first.split() == ["none", "0.0", "%", "of", "100"]
    assert second.split()[:3] == ["both", "40.0", "(+40.0,"]
    assert markdown(report).splitlines()[2].startswith("|none|0.0 % of 100|")
    assert report.as_json()["lines"]["both"]["top-1"]["share"] == 0.4  # type: ignore[index]
