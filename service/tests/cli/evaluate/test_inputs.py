"""Labels and shares that an evaluation reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.cli.evaluate.inputs import Data, draw_share, read_labels
from service.cli.evaluate.options import LabelOptions
from service.errors import ServiceError

NOTHING = Data([], None, None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_of_a_file_are_taken_once_each(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "labels.txt").write_text("hat\n\n  shoe \nhat\n", encoding)
    assert read_labels(NOTHING, LabelOptions(labels=tmp_path / "labels.txt")) == ["hat", "shoe"]


@pytest.mark.parametrize(
    ("content", "word"), [(b"\n\n", "holds no label"), (b"caf\xe9", "cannot be read as text"), (None, "No such file")]
)
def test_a_file_without_labels_is_refused(content: bytes | None, word: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ServiceError, match=word):
        read_labels(NOTHING, LabelOptions(labels=path))


def test_data_without_the_field_of_the_class_are_refused() -> None:
    with pytest.raises(ServiceError, match="name it with --label"):
        read_labels(NOTHING, LabelOptions(label="kind"))


def test_a_share_is_drawn_with_a_seed() -> None:
    names = [f"label {i}" for i in range(100)]
    drawn = draw_share(names, 0.3, seed=1)
    assert len(set(drawn)) == 30
    assert drawn == draw_share(names, 0.3, seed=1) != draw_share(names, 0.3, seed=2)
