from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from index_store.build.source import Reject
from index_store.types import KeyKind, Side
from models.data.encode import BATCHES_AHEAD, encode_images, encode_samples, encode_texts, reject_duplicate_ids
from models.data.samples import Sample
from models.data.sources import read_samples
from models.encoder.encoder import Encoder
from models.errors import ConfigError
from models.tests.small import build_memory, image_bytes, picture, write_tar

KINDS: dict[Side, KeyKind] = {"image": "vector", "text": "vector"}


def make_sample(i: int, **fields: object) -> Sample:
    return Sample(f"id{i}", image_bytes(picture(i), "PNG"), f"caption {i % 3}", fields)


def test_pairs_are_the_encoded_samples_in_order(encoder: Encoder) -> None:
    samples = [make_sample(i, price=i) for i in range(7)]
    blocks = list(encode_samples(samples, encoder, kinds={"image": "trunk", "text": "vector"}, batch=3))
    assert [len(block) for block in blocks] == [3, 3, 1]
    assert [name for block in blocks for name in block.ids] == [f"id{i}" for i in range(7)]
    assert blocks[1].records[0] == {"price": 3, "caption": "caption 0"}
    pixels = np.stack([encoder.preprocess(picture(i)) for i in range(7)])
    image = encoder.encode(pixels, "image")
    text = encoder.encode(encoder.tokenize([each.caption for each in samples]), "text")
    for field, expected in (("image", image.vectors), ("image_key", image.key("trunk")), ("text", text.vectors)):
        np.testing.assert_allclose(np.concatenate([getattr(block, field) for block in blocks]), expected, atol=1e-6)
    assert blocks[0].text_key is None


def test_rejects_are_counted_and_the_other_samples_encoded(encoder: Encoder) -> None:
    good, bomb = make_sample(0), image_bytes(picture(1, 100, 100), "PNG")
    samples: list[Sample | Reject] = [
        Reject("earlier", "no caption"),
        good,
        Sample("words", b"hello", "c", {}),
        Sample("cut", good.image[:200], "c", {}),
        Sample("large", bomb, "c", {}),
        Sample("id0", good.image, "the same id", {}),
        Sample("i" * 300, good.image, "c", {}),
        Sample("\udcff", good.image, "c", {}),
        Sample("", good.image, "c", {}),
        make_sample(1),
    ]
    rejects: list[Reject] = []
    progress: list[int] = []
    blocks = encode_samples(
        samples, encoder, kinds=KINDS, batch=4, max_pixels=9_999, on_reject=rejects.append, on_progress=progress.append
    )
    assert [name for block in blocks for name in block.ids] == ["id0", "id1"]
    assert {reject.item for reject in rejects} == {"earlier", "words", "cut", "large", "id0", "i" * 300, "\udcff", ""}
    assert sum(progress) == len(samples)
    reasons = {reject.item: reject.reason for reject in rejects}
    assert "unique" in reasons["id0"]
    assert "100x100 pixels, the limit is 9999" in reasons["large"]


def test_duplicate_keys_of_a_tar_are_rejected(encoder: Encoder, tmp_path: Path) -> None:
    members = [
        (f"{key}.{kind}", data)
        for key in "abab"
        for kind, data in (("jpg", image_bytes(picture(0), "JPEG")), ("txt", b"c"))
    ]
    members += members[-2:]  # and twice in a row
    rejects: list[Reject] = []
    blocks = list(
        encode_samples(
            read_samples(write_tar(tmp_path / "s.tar", members)), encoder, kinds=KINDS, on_reject=rejects.append
        )
    )
    assert [name for block in blocks for name in block.ids] == ["a", "b"]
    assert [reject.item for reject in rejects] == ["a", "b", "b"]


def test_five_captions_of_one_image_are_five_pairs_with_one_image_vector(encoder: Encoder, tmp_path: Path) -> None:
    captions = {"captions": [f"saying {i}" for i in range(5)]}
    members: list[tuple[str, bytes | dict[str, list[str]]]] = []
    for i in range(3):
        members += [(f"p{i}.jpg", image_bytes(picture(i), "PNG")), (f"p{i}.json", captions)]
    blocks = list(encode_samples(read_samples(write_tar(tmp_path / "s.tar", members)), encoder, kinds=KINDS, batch=4))
    image = np.concatenate([block.image for block in blocks])
    assert image.shape[0] == 15
    for i in range(3):
        expected = encoder.encode(encoder.preprocess(picture(i))[None], "image").vectors
        np.testing.assert_allclose(image[5 * i : 5 * i + 5], np.repeat(expected, 5, 0), atol=1e-6)


def test_equal_captions_get_equal_vectors(encoder: Encoder) -> None:
    captions = ["a", "b", "a", "c", "b"]
    expected = encoder.encode(encoder.tokenize(captions), "text").vectors
    np.testing.assert_allclose(encode_texts(captions, encoder).vectors, expected, atol=1e-6)


def test_only_a_few_batches_are_read_ahead(encoder: Encoder) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Sample]:
        for i in range(1_000_000):
            taken.append(i)
            yield make_sample(i)

    stream = encode_images(endless(), encoder, batch=2)
    for _ in range(3):
        next(stream)
    assert len(taken) <= 2 * (3 + BATCHES_AHEAD)
    stream.close()  # type: ignore[attr-defined]  # as Ctrl-C does: no thread is left


def test_reject_duplicate_ids_keeps_earlier_rejects() -> None:
    items: list[Sample | Reject] = [Reject("x", "why"), make_sample(1), Reject("x", "again"), make_sample(1)]
    assert list(reject_duplicate_ids(items))[:3] == items[:3]
    assert isinstance(list(reject_duplicate_ids(items))[3], Reject)


def test_encoded_blocks_build_a_memory(encoder: Encoder, tmp_path: Path) -> None:
    (block,) = encode_samples([make_sample(i) for i in range(5)], encoder, kinds=KINDS)
    snapshot = build_memory(tmp_path, block, encoder.fingerprint)
    found = snapshot.retrieve(block.image, "image", 1)
    np.testing.assert_array_equal(found.ids[:, 0], block.ids)
    assert found.records(2) == [{"id": "id2", "caption": "caption 2"}]


def test_trunk_keys_of_texts_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="vector keys"):
        list(encode_samples([make_sample(0)], encoder, kinds={"image": "vector", "text": "trunk"}))
