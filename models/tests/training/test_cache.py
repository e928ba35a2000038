import dataclasses
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from index_store.build.source import BuildSource
from index_store.store import Store
from index_store.types import SIDES, Pairs
from models.data.samples import Reading
from models.data.streams import Encoding
from models.encoder.encoder import Encoder
from models.reco import Reco
from models.training import cache as prepared
from models.training import train
from models.training.cache import look_up_prepared, prepare_pairs
from models.training.config import EpisodeConfig, TrainConfig
from models.training.episodes import MemoryQuery, look_up

ROOT = Path(__file__).parents[3]
SMALL_STEPS = """
import os, signal, sys
from functools import partial
from pathlib import Path
from models.training import cache as prepared
from models.training import train
from models.training.config import TrainConfig

def deadly(work, calls):
    def counted(*given):
        nonlocal calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*given)
    return counted

def steps(streams, done):
    yield from map(deadly(lambda step: step, 2 if done.pairs == 0 else 99), chain_streams(streams, done))

train.Encoding, prepared.BLOCK = partial(train.Encoding, batch=8), 8
prepared.BuildSource = partial(prepared.BuildSource, every_pairs=1)
chain_streams, prepared.chain_streams = prepared.chain_streams, steps
prepared._write_block = deadly(prepared._write_block, 1)
for _ in range(2):
    if (child := os.fork()) == 0:
        train.train(TrainConfig.read(Path(sys.argv[1])))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pairs are three batches to encode and three blocks to search."""
    monkeypatch.setattr(train, "Encoding", partial(Encoding, batch=8))
    monkeypatch.setattr(prepared, "BuildSource", partial(BuildSource, every_pairs=1))
    monkeypatch.setattr(prepared, "BLOCK", 8)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by the name of its folder and its own; a digest names the former."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.usefixtures("_small_steps")
def test_killed_while_encoding_and_while_searching_it_goes_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork must not inherit half a thread pool
    killed = subprocess.run(
        [sys.executable, "-c", SMALL_STEPS, recipe], cwd=ROOT, env=single, capture_output=True, text=True
    )
    assert killed.stdout.split() == [str(-signal.SIGKILL)] * 2
    assert "pairs encoded of photos.tar: 8 now, 16 by an earlier run" in killed.stderr
    config = TrainConfig.read(recipe)
    resumed = train.train(config)
    told = capsys.readouterr().err
    assert "pairs encoded of photos.tar: 0 now, 24 by an earlier run" in told
    assert "neighbours found in things@v1: 16 now, 8 by an earlier run" in told
    whole = train.train(dataclasses.replace(config, output=str(tmp_path / "whole" / "fusion.safetensors")))
    assert resumed.fusion_id == whole.fusion_id
    assert contents(tmp_path / "made" / "prepared") == contents(tmp_path / "whole" / "prepared")


def test_another_learning_rate_prepares_nothing_anew(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.read(recipe)
    train.train(config)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "made" / "prepared").rglob("*")}
    capsys.readouterr()
    train.train(dataclasses.replace(config, learning_rate=1e-3, output=str(tmp_path / "made" / "other.safetensors")))
    told = capsys.readouterr().err
    assert told.count("0 now, 24 by an earlier run") == 2
    assert "1 items left out" in told
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "made" / "prepared").rglob("*")} == files


def test_another_limit_searches_anew_and_encodes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig.read(recipe)
    train.train(config)
    capsys.readouterr()
    (episode,) = config.episodes
    train.train(dataclasses.replace(config, episodes=(dataclasses.replace(episode, max_image_similarity=0.5),)))
    told = capsys.readouterr().err
    assert "pairs encoded of photos.tar: 0 now" in told
    assert "neighbours found in things@v1: 24 now" in told


def test_other_photos_under_the_same_name_are_encoded(
    recipe: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(TrainConfig.read(recipe))
    photos.write_bytes(photos.read_bytes() + bytes(512))
    capsys.readouterr()
    train.train(TrainConfig.read(recipe))
    assert "pairs encoded of photos.tar: 24 now" in capsys.readouterr().err


@pytest.mark.usefixtures("_small_steps")
def test_on_disk_and_in_memory_the_same_is_found(
    recipe: Path, photos: Path, encoder: Encoder, reco: Reco, tmp_path: Path
) -> None:
    snapshot = Store(Path(TrainConfig.read(recipe).store)).open("things", encoder=encoder.fingerprint)
    pairs = prepare_pairs(
        tmp_path, [photos], Encoding(encoder, {"image": "vector", "text": "vector"}, Reading("a photo of {class}"))
    )
    episode = look_up_prepared(tmp_path, pairs, MemoryQuery(snapshot, reco, 4, {"image": 0.9}))
    records = [{"caption": str(number)} for number in pairs.captions]
    in_memory = Pairs(pairs.ids, np.array(pairs.vectors["image"]), np.array(pairs.vectors["text"]), records)
    expected = look_up("things", in_memory, snapshot, reco, 4, {"image": 0.9})
    for side in SIDES:
        for name in ("query", "known", "rows", "scores"):
            np.testing.assert_array_equal(getattr(episode.lookups[side], name), getattr(expected.lookups[side], name))
    np.testing.assert_array_equal(episode.photo, expected.photo)
    np.testing.assert_array_equal(episode.same(np.arange(24)), expected.same(np.arange(24)))


def test_a_finished_version_can_be_learned_from(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.read(recipe)
    train.train(dataclasses.replace(config, episodes=(EpisodeConfig((f"{tmp_path}/store/things/v1",), "things"),)))
    assert "pairs encoded of v1: 24 now" in capsys.readouterr().err
