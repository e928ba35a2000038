from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index_store.pairs import Pairs
from index_store.snapshot import Snapshot
from index_store.steps import Reject
from models.checkpoint import untrained_fusions
from models.clip import Encoder
from models.errors import DataError
from models.evaluate import ClassifyReport, Line, classify
from models.images import read_image
from models.prepare import encode_samples
from models.reco import Reco
from models.samples import Sample
from models.sources import read_samples
from models.tests.small import encoded_as, memory_of, picture, tar_of, unit

LABELS = ["red", "green", "blue", "grey", "pink", "white"]
EACH = 4


def photo(label: int, i: int) -> bytes:
    """Photos of one label are nearly the same picture."""
    image = np.asarray(picture(label, 64, 64)).astype(int) + np.random.default_rng(i).integers(-3, 4, (64, 64, 3))
    return encoded_as(Image.fromarray(image.clip(0, 255).astype(np.uint8)), "PNG")


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members: list[tuple[str, bytes | dict[str, str]]] = []
    for label, name in enumerate(LABELS):
        for i in range(EACH):
            members += [(f"{name}-{i}.png", photo(label, i)), (f"{name}-{i}.json", {"class": name})]
    return tar_of(tmp_path_factory.mktemp("tar") / "photos.tar", members)


@pytest.fixture(scope="module")
def snapshot(tar: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The same photos as memory: without self-exclusion, each would find itself."""
    samples = read_samples(tar, caption="a photo of a {class}.")
    (pairs,) = encode_samples(samples, encoder, kinds={"image": "vector", "text": "vector"})
    return memory_of(tmp_path_factory.mktemp("store"), pairs, encoder.fingerprint)


def test_classify_against_a_memory_that_knows(encoder: Encoder, tar: Path, snapshot: Snapshot) -> None:
    file = untrained_fusions(encoder.dim, alpha=100.0)  # what is found drowns what random weights saw
    report = classify(
        Reco(encoder, file.fusions, file.fusion_id, file.k), read_samples(tar, caption="{class}"), snapshot, labels=LABELS, k=3, batch=5
    )
    lines = {line.method: line for line in report.lines}
    assert list(lines) == ["none", "image", "text", "both", "(1-NN)", "(class means)"]
    assert (report.images, report.labels, report.rejects) == (24, 6, [])
    assert lines["(1-NN)"].top1 == 24
    assert lines["(class means)"].top1 == 24
    assert lines["image"].top1 == 24  # the captions found are the labels themselves
    assert lines["none"].top1 < 24  # random weights know nothing
    assert all(line.top1 <= line.top5 <= 24 for line in report.lines)


def test_the_four_figures_are_those_computed_by_hand(reco: Reco, tar: Path, snapshot: Snapshot) -> None:
    report = classify(reco, read_samples(tar, caption="{class}"), snapshot, labels=LABELS, k=2, templates=["{}", "the {}"])
    samples = [item for item in read_samples(tar, caption="{class}") if isinstance(item, Sample)]
    target = np.array([LABELS.index(item.caption) for item in samples])
    pixels = np.stack([reco.encoder.preprocess(read_image(item.image)) for item in samples])
    images = reco.embed(pixels, "image", snapshot, 2, exclude=[{item.id} for item in samples])
    for enhanced_image, enhanced_text, method in ((0, 0, "none"), (1, 0, "image"), (0, 1, "text"), (1, 1, "both")):
        labels = reco.embed_labels(LABELS, ["{}", "the {}"], snapshot if enhanced_text else None, 2)
        best = ((images.vectors if enhanced_image else images.plain) @ labels.T).argmax(1)
        assert {line.method: line.top1 for line in report.lines}[method] == (best == target).sum()


def test_no_image_finds_itself(reco: Reco, encoder: Encoder, tmp_path: Path) -> None:
    """A memory of one photo with a misleading label: excluded, the photo is left plain."""
    data = photo(0, 0)
    (pairs,) = encode_samples([Sample("self", data, "blue", {"class": "blue"})], encoder, kinds={"image": "vector", "text": "vector"})
    snapshot = memory_of(tmp_path, pairs, encoder.fingerprint)
    report = classify(reco, [Sample("self", data, "red", {})], snapshot, labels=LABELS)
    lines = {line.method: line for line in report.lines}
    assert lines["image"] == Line("image", lines["none"].top1, lines["none"].top5)
    assert lines["(1-NN)"] == Line("(1-NN)", 0, 0)


def test_baselines_are_left_out_where_the_memory_names_no_label(reco: Reco, encoder: Encoder, tar: Path, tmp_path: Path) -> None:
    rows = unit(np.random.default_rng(0).standard_normal((5, encoder.dim)))
    snapshot = memory_of(tmp_path, Pairs(np.arange(5), rows, rows, [{"caption": "c"}] * 5), encoder.fingerprint)
    report = classify(reco, read_samples(tar, caption="{class}"), snapshot, labels=LABELS)
    assert [line.method for line in report.lines] == ["none", "image", "text", "both"]


def test_what_cannot_be_classified_is_counted(reco: Reco, tar: Path, snapshot: Snapshot) -> None:
    cut, odd = Sample("cut", b"no", "red", {}), Sample("odd", photo(0, 0), "violet", {})
    samples: list[Sample | Reject] = [Reject("x", "why"), odd, cut, Sample("ok", photo(0, 9), "red", {})]
    report = classify(reco, samples, snapshot, labels=LABELS)
    assert (report.images, [reject.item for reject in report.rejects]) == (1, ["x", "odd", "cut"])
    with pytest.raises(DataError, match="3 were rejected"):
        classify(reco, samples[:3], snapshot, labels=LABELS)


def test_the_table_shows_shares_with_their_counts() -> None:
    report = ClassifyReport("m@1", "abc", 10, 6, 24, [Reject("x", "why")], [Line("none", 3, 12)])
    title, head, line = report.table().splitlines()
    assert title == "m@1 · fusion abc · k 10 · 24 images · 6 labels · 1 rejected"
    assert head.split() == ["enhanced", "top-1", "top-5"]
    assert line.split() == ["none", "12.5", "%", "(3", "of", "24)", "50.0", "%", "(12", "of", "24)"]
