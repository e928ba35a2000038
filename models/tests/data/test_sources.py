import io
import os
import tarfile
from pathlib import Path

import pytest

from index_store.build.source import Reject
from models.data.samples import Reading, Sample
from models.data.sources import read_all, read_samples
from models.encoder.image_io import read_image
from models.errors import DataError
from models.tests.small import image_bytes, picture, write_tar

JPG = image_bytes(picture(0), "JPEG")
PNG = image_bytes(picture(1), "PNG")


def read_items(source: Path, caption: str | None = None) -> list[Sample | Reject]:
    return list(read_samples(source, caption=caption))


def read_valid(source: Path, caption: str | None = None) -> list[Sample]:
    found = read_items(source, caption)
    assert not [item for item in found if isinstance(item, Reject)]
    return [item for item in found if isinstance(item, Sample)]


def reject_reasons(source: Path, caption: str | None = None) -> dict[str, str]:
    return {item.item: item.reason for item in read_items(source, caption) if isinstance(item, Reject)}


def test_the_caption_is_the_txt_else_the_json_caption_else_each_of_several(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | dict[str, object]]] = [
        ("d/0.jpg", JPG),
        ("d/0.txt", b" from the txt \n"),
        ("d/0.json", {"caption": "from the json", "url": "u"}),
        ("1.png", PNG),
        ("1.json", {"caption": "from the json", "id": 7, "width": 3}),
        ("2.json", {"captions": ["one", "two"], "class": "c"}),
        ("2.JPEG", JPG),
    ]
    assert read_valid(write_tar(tmp_path / "s.tar", members)) == [
        Sample("d/0", JPG, "from the txt", {"url": "u"}),
        Sample("1", PNG, "from the json", {"source_id": 7, "width": 3}),
        Sample("2#0", JPG, "one", {"class": "c"}),
        Sample("2#1", JPG, "two", {"class": "c"}),
    ]


def test_samples_of_one_image_share_its_bytes(tmp_path: Path) -> None:
    one, two = read_valid(write_tar(tmp_path / "s.tar", [("2.jpg", JPG), ("2.json", {"captions": ["one", "two"]})]))
    assert one.image is two.image


def test_a_template_fills_the_caption(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | dict[str, object]]] = [
        ("0.jpg", JPG),
        ("0.json", {"class": "Granny-Smith", "n": 3, "caption": "another"}),
        ("1.jpg", JPG),
        ("1.json", {"n": 3}),
    ]
    source = write_tar(tmp_path / "s.tar", members)
    found = read_items(source, "a photo of {class}, {n}")
    assert found[0] == Sample("0", JPG, "a photo of Granny-Smith, 3", {"class": "Granny-Smith", "n": 3})
    assert found[1] == Reject("1", "the caption 'a photo of {class}, {n}' cannot be filled (its class is missing)")


@pytest.mark.parametrize("template", ["a {", "a {class.__init__}", "a {0}", "a {}", "{class[0]}"])
def test_a_template_with_anything_but_field_names_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match="caption template"):
        read_samples(write_tar(tmp_path / "s.tar", []), caption=template)


def test_unusable_items_are_rejected_with_their_reason(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | dict[str, object]]] = [
        ("noimage.txt", b"words"),
        ("nocaption.jpg", JPG),
        ("blank.jpg", JPG),
        ("blank.txt", b"  \n"),
        ("badjson.jpg", JPG),
        ("badjson.json", b"{oh"),
        ("list.jpg", JPG),
        ("list.json", b"[1]"),
        ("latin.jpg", JPG),
        ("latin.txt", "café".encode("latin-1")),
        (".hidden", b""),
        ("noextension", b""),
        ("empty.jpg", JPG),
        ("empty.json", {"captions": []}),
        ("good.jpg", JPG),
        ("good.txt", b"fine"),
    ]
    source = write_tar(tmp_path / "s.tar", members)
    reasons = reject_reasons(source)
    assert {key: reason.split(" (")[0] for key, reason in reasons.items()} == {
        "noimage": "no image among its members",
        "nocaption": "no caption",
        "blank": "no caption",
        "badjson": "its json does not parse",
        "list": "its json is not an object",
        "latin": "its txt is not UTF-8",
        ".hidden": "its name is not KEY.EXTENSION",
        "noextension": "its name is not KEY.EXTENSION",
        "empty": "no caption",
    }
    assert [item.id for item in read_items(source) if isinstance(item, Sample)] == ["good"]


def test_nan_is_read_as_null(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "s.tar", [("0.jpg", JPG), ("0.json", b'{"caption": "c", "score": NaN}')])
    assert read_valid(source)[0].metadata == {"score": None}


def test_member_names_with_paths_are_not_extracted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["../../evil", "/etc/evil", "a/../../evil"]
    members = [(f"{name}.{kind}", data) for name in names for kind, data in (("jpg", JPG), ("txt", b"c"))]
    assert [sample.id for sample in read_valid(write_tar(folder / "s.tar", members))] == names
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "s.tar"]


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPG)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "sym.jpg"), (tarfile.LNKTYPE, "hard.jpg"), (tarfile.FIFOTYPE, "fifo.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
        tar.addfile(directory_member("folder"))
    assert reject_reasons(tmp_path / "s.tar") == dict.fromkeys(["sym.jpg", "hard.jpg", "fifo.jpg"], "not a plain file")


def directory_member(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member


@pytest.mark.parametrize("lost", ["the last third", "the end mark", "a header in the middle"])
def test_a_damaged_tar_is_read_up_to_the_damage_and_reported(tmp_path: Path, lost: str) -> None:
    members = [(f"{i}.{kind}", data) for i in range(30) for kind, data in (("jpg", JPG), ("txt", b"c"))]
    source = write_tar(tmp_path / "s.tar", members)
    data = bytearray(source.read_bytes())
    with tarfile.open(source) as tar:
        last, middle = tar.getmembers()[-1], tar.getmembers()[40]
    if lost == "the last third":
        del data[len(data) * 2 // 3 :]
    elif lost == "the end mark":
        del data[last.offset_data + 512 :]
    else:
        data[middle.offset : middle.offset + 512] = b"x" * 512
    source.write_bytes(data)
    found = read_items(source)
    whole = [item.id for item in found if isinstance(item, Sample)]
    assert whole == [str(i) for i in range(len(whole))]
    assert len(whole) == (30 if lost == "the end mark" else 20 if lost == "a header in the middle" else len(whole))
    assert len(whole) >= 15
    assert "s.tar" in reject_reasons(source)
    assert "the archive breaks off" in reject_reasons(source)["s.tar"]


@pytest.mark.parametrize("data", [b"", b"hello" * 300, JPG])
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"^s\.tar is not a readable \.tar file"):
        read_items(tmp_path / "s.tar")


def test_other_sources_are_refused(tmp_path: Path) -> None:
    for name in ("gone.tar", "words.zip"):
        with pytest.raises(DataError, match="neither a"):
            read_items(tmp_path / name)


# --- folders


def write_folder(path: Path, lines: str, **files: bytes) -> Path:
    path.mkdir()
    (path / "captions.csv").write_text(lines, encoding="utf-8")
    for name, data in files.items():
        (path / f"{name}.jpg").write_bytes(data)
    return path


def test_a_folder_is_read_by_its_captions_csv(tmp_path: Path) -> None:
    lines = '\ufefffile,caption,price\na.jpg,"red, ripe",3\nb.jpg,grün,\n'
    assert read_valid(write_folder(tmp_path / "f", lines, a=JPG, b=PNG)) == [
        Sample("a.jpg", JPG, "red, ripe", {"price": 3}),
        Sample("b.jpg", PNG, "grün", {"price": None}),
    ]


def test_ids_and_templates_come_from_columns(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "f", "filepath,id,class\na.jpg,sku-1,pear\n", a=JPG)
    assert read_valid(source, "a photo of a {class}") == [
        Sample("sku-1", JPG, "a photo of a pear", {"filepath": "a.jpg", "class": "pear"})
    ]


def test_a_csv_without_its_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file \(or filepath\) and caption are needed"):
        read_items(write_folder(tmp_path / "f", "name,text\na.jpg,c\n"))
    with pytest.raises(DataError, match="no table of captions"):
        (tmp_path / "empty").mkdir()
        read_items(tmp_path / "empty")


def test_files_outside_the_folder_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(JPG)
    lines = f"file,caption\n../secret.jpg,c\n{tmp_path}/secret.jpg,c\nlink.jpg,c\nup/secret.jpg,c\ninside.jpg,c\n"
    source = write_folder(tmp_path / "f", lines, real=JPG)
    (source / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (source / "up").symlink_to(tmp_path)
    (source / "inside.jpg").symlink_to(source / "real.jpg")  # a link within the folder is allowed
    assert [item.id for item in read_items(source) if isinstance(item, Sample)] == ["inside.jpg"]
    assert {reason.partition(" (")[0] for reason in reject_reasons(source).values()} == {
        "it is not a file within the folder"
    }
    followed = [item.id for item in read_all([source], Reading(follow_links=True)) if isinstance(item, Sample)]
    assert len(followed) == 5


def test_bad_lines_are_rejected_and_the_others_read(tmp_path: Path) -> None:
    lines = "file,caption\ngone.jpg,c\n,c\na.jpg,\n.,c\nn\0ul.jpg,c\nshort.jpg\na.jpg,good,surplus\n"
    source = write_folder(tmp_path / "f", lines, a=JPG)
    found = read_items(source)
    assert [item for item in found if isinstance(item, Sample)] == []
    assert len(found) == 7
    assert reject_reasons(source)["line 8"].startswith("3 fields where the header has 2")
    assert reject_reasons(source)["line 7"].startswith("1 fields where the header has 2")


def test_samples_are_read_one_by_one(tmp_path: Path) -> None:
    """The first sample is returned before the others are read, so that memory stays bounded."""
    source = write_tar(
        tmp_path / "s.tar", [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", JPG), ("txt", b"c"))]
    )
    stream = read_samples(source)
    assert isinstance(next(iter(stream)), Sample)
    assert not isinstance(stream, list | io.IOBase)


# --- real data sets, where they are available

DATA = Path(os.environ.get("RECO_DATA", Path(__file__).parents[4] / "shared" / "data"))


TARS = [
    ("grocery/iconic.tar", "{class}", 81),
    ("flickr8k/test-000.tar", None, 5000),
    ("imagen/imagen.tar", "{class}", 1000),
]


@pytest.mark.parametrize(("tar", "caption", "count"), TARS)
def test_real_tars_are_read_completely(tar: str, caption: str | None, count: int) -> None:
    if not (DATA / tar).is_file():
        pytest.skip(f"{tar} is not under RECO_DATA or ../shared/data")
    read = read_items(DATA / tar, caption)
    found = [item for item in read if isinstance(item, Sample)]
    assert {item.kind for item in read if isinstance(item, Reject)} <= {"folded"}  # Flickr repeats captions
    assert len(read) == count
    assert len({sample.id for sample in found}) == len(found)
    assert read_image(found[0].image).mode == "RGB"
    assert all(sample.caption for sample in found)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_an_absurd_size_is_refused_before_memory_is_asked_for(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("attributes")
    header.type, header.size = kind, 2**40
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("a.jpg", image_bytes(picture(1), "JPEG")), ("a.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    content = buffer.getvalue()
    end = len(content.rstrip(b"\0"))
    members = content[: -(-end // 512) * 512]
    path = tmp_path / "absurd.tar"
    path.write_bytes(members + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    found = list(read_samples(path))
    assert [each.id for each in found if isinstance(each, Sample)] == ["a"]
    (reject,) = (each for each in found if isinstance(each, Reject))
    assert f"an extended header of {2**40} bytes, the limit is {2**20}" in reject.reason
