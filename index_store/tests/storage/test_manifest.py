import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_store.errors import DamagedVersion, IncompatibleSnapshot, UnknownVersion
from index_store.storage.manifest import MANIFEST_FILE, Manifest, read_manifest, same_encoder

PLAIN = Manifest(
    name="things",
    version="v1",
    encoder="tiny@00ff",
    dim=4,
    keys={"image": {"kind": "trunk", "dim": 6}, "text": {"kind": "vector", "dim": 4}},
    pairs=3,
    shards=[{"folder": "shard-0000", "pairs": 2}, {"folder": "shard-0001", "pairs": 1}],
    index={"asked": "auto", "recipe": "Flat", "probes": 0, "curve": []},
    recall={"k": 3, "floor": 0.99, "image": 1.0, "text": 1.0},
    files={"shard-0000/ids.npy": {"sha256": "00", "bytes": 7, "crc32": "0badcafe"}},
    created="2026-11-22T00:00:00+00:00",
    parent="things@v0",
    source={"rejects": 2, "from": "ä.tar"},
)


def altered_manifest(**changes: object) -> str:
    """A manifest with changed fields and the right sha256, as a faulty build would write it."""
    fields = json.loads(PLAIN.to_json())
    fields.pop("sha256")
    fields |= changes
    shell = replace(PLAIN, **{name: value for name, value in fields.items() if name in Manifest.__dataclass_fields__})
    return shell.to_json()


def test_round_trip() -> None:
    assert Manifest.from_json(PLAIN.to_json()) == PLAIN
    assert PLAIN.ref == "things@v1"
    assert (PLAIN.key_kind("image"), PLAIN.key_dim("image"), PLAIN.key_dim("text")) == ("trunk", 6, 4)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)
    )
)
def test_any_json_survives_as_source(source: dict[str, object]) -> None:
    text = replace(PLAIN, source=source).to_json()
    assert Manifest.from_json(text).to_json() == text


@settings(deadline=None)
@given(st.integers(0, len(PLAIN.to_json()) - 1), st.integers(0, 7))
def test_no_flipped_bit_passes(position: int, bit: int) -> None:
    data = bytearray(PLAIN.to_json().encode())
    data[position] ^= 1 << bit
    with pytest.raises((DamagedVersion, IncompatibleSnapshot, UnicodeDecodeError)):
        Manifest.from_json(bytes(data).decode())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"format": 2}', '{"format": "1"}', '{"format": NaN}', "[" * 100_000]
)
def test_other_json_is_damaged(text: str) -> None:
    with pytest.raises(DamagedVersion) as refused:
        Manifest.from_json(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("found", "remedy"), [(1, "build the version again"), (3, "upgrade it"), (7, "upgrade it")])
def test_another_format_is_refused_with_a_remedy(found: int, remedy: str) -> None:
    with pytest.raises(IncompatibleSnapshot, match=f"format {found}, this program reads format 2: {remedy}"):
        Manifest.from_json(json.dumps({"format": found, "anything": "else"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs": 4},
        {"pairs": 0, "shards": []},
        {"format": 0},
        {"keys": {"image": {"kind": "vector", "dim": 4}}},
        {"keys": {"image": {"kind": "pixels", "dim": 4}, "text": {"kind": "vector", "dim": 4}}},
        {"keys": {"image": {"kind": "vector", "dim": 0}, "text": {"kind": "vector", "dim": 4}}},
        {"files": {"../../outside": {"sha256": "00", "bytes": 1, "crc32": "00000000"}}},
        {"files": {"/outside": {"sha256": "00", "bytes": 1, "crc32": "00000000"}}},
        {"files": {"ids.npy": {"sha256": "00", "bytes": 1}}},
        {"files": {"ids.npy": {"sha256": "00", "bytes": 1, "crc32": ""}}},
        {"files": {"ids.npy": {"sha256": "00", "bytes": 16_777_217, "crc32": "00000000"}}},
        {"shards": [{"folder": "..", "pairs": 3}]},
    ],
)
def test_contradicting_fields_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(DamagedVersion):
        Manifest.from_json(altered_manifest(**changes))


def test_a_directory_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownVersion, match=r"things@v1 has no manifest.json"):
        read_manifest(tmp_path / "things" / "v1")


def test_a_version_keeps_its_folder_names(tmp_path: Path) -> None:
    folder = tmp_path / "things" / "v2"
    folder.mkdir(parents=True)
    (folder / MANIFEST_FILE).write_text(PLAIN.to_json())
    with pytest.raises(DamagedVersion, match=r"things@v2: manifest.json says it is things@v1"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("one", "another", "same"),
    [
        ("ViT-B-32/laion2b@00ff", "ViT-B-32/my-file@00ff", True),
        ("ViT-B-32/laion2b@00ff", "ViT-B-32/laion2b@00fe", False),
        ("a@b@00ff", "c@00ff", True),
        ("plain", "plain", True),
        ("plain", "other", False),
    ],
)
def test_encoders_are_compared_by_digest(one: str, another: str, same: bool) -> None:
    assert same_encoder(one, another) is same
