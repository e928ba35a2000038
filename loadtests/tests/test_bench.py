"""The arithmetic of the bench against hand-made numbers, its client against a server that counts,
the bare model against open_clip.
"""

import asyncio
from itertools import count

import numpy as np
import open_clip
import pytest
import torch

from loadtests.compare.alone import ProfiledRequest, median_profile, profile_lone_caller
from loadtests.compare.bare_model import BareModel
from loadtests.support.calls import TimedReply, Unexpected, image_call
from loadtests.support.closed_loop import closed_loop, slope
from loadtests.support.gauges import batches_between
from loadtests.support.photos import crops
from loadtests.support.report import median_and_spread
from loadtests.tests.conftest import Scripted


def test_slope_sees_through_bursts() -> None:
    bursts = [batch * 2.0 for batch in range(8) for _ in range(32)]  # 32 replies every 2 s
    assert slope(bursts) == pytest.approx(16, rel=0.02)
    # what counting would have said
    assert len(bursts) / (bursts[-1] - bursts[0]) == pytest.approx(18.3, rel=0.01)


def test_account_takes_what_happened_between_two_scrapes() -> None:
    before = {"cpu": 10.0, "batch sum": 100, "batch count": 10, "encode sum": 5.0, "encode count": 10}
    after = {
        "cpu": 14.0,
        "batch sum": 180,
        "batch count": 15,
        "encode sum": 9.0,
        "encode count": 15,
        "fuse sum": 0.05,
        "fuse count": 5,
    }
    assert batches_between(before, after) == {
        "mean_batch": 16.0,
        "stages_ms": {"encode": 800.0, "fuse": 10.0},
        "server_cpu_ms_per_image": 50.0,
    }


def test_middle() -> None:
    assert median_and_spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


class Counting:
    """Answers images and exposes how many in the service's own series: batches of 4, 25 ms of CPU
    each image.
    """

    def __init__(self, status: int = 200) -> None:
        self._status = status
        self._images = count(1)
        self.images = 0

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        if path != "/metrics":
            self.images = next(self._images)
            return self._status, {}, {}
        lines = [
            "# TYPE process_cpu_seconds_total counter",
            f"process_cpu_seconds_total {self.images * 0.025}",
            "# TYPE reco_batch_size histogram",
            f'reco_batch_size_sum{{modality="image"}} {self.images}',
            f'reco_batch_size_count{{modality="image"}} {self.images / 4}',
            f'reco_batch_size_sum{{modality="text"}} {self.images * 7}',
            "# TYPE reco_stage_duration_seconds histogram",
            f'reco_stage_duration_seconds_sum{{stage="encode",modality="image"}} {self.images * 0.5}',
            f'reco_stage_duration_seconds_count{{stage="encode",modality="image"}} {self.images / 4}',
        ]
        return 200, "\n".join([*lines, ""]), {"Content-Type": "text/plain; version=0.0.4"}


def test_the_closed_loop_counts_replies_and_reads_the_service_account(scripted: Scripted) -> None:
    scripted.handle = handle = Counting()
    found = asyncio.run(closed_loop(scripted.url, [image_call([b"x"])], concurrency=2, seconds=0.4, warmup=0.05))
    assert handle.images > 10
    assert found["images_per_s"] > 0
    assert found["mean_batch"] == 4
    assert found["stages_ms"] == {"encode": 2000.0}
    assert found["server_cpu_ms_per_image"] == 25
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]


class Timed:
    """A reply with its stages; every reading of the metrics is 40 ms further on, 3 ms of which went
    into writing replies.
    """

    def __init__(self) -> None:
        self._seen = count()

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        if path != "/metrics":
            return 200, {}, {"Server-Timing": "decode;dur=5, encode;dur=30"}
        seen = next(self._seen)
        lines = [
            "# TYPE reco_request_duration_seconds histogram",
            f'reco_request_duration_seconds_sum{{endpoint="/embed/image",modality="image"}} {0.04 * seen}',
            f'reco_request_duration_seconds_sum{{endpoint="/embed/text",modality="text"}} {9 * seen}',
            "# TYPE reco_stage_duration_seconds histogram",
            f'reco_stage_duration_seconds_sum{{stage="serialize",modality="image"}} {0.003 * seen}',
            f'reco_stage_duration_seconds_sum{{stage="encode",modality="image"}} {9 * seen}',
        ]
        return 200, "\n".join([*lines, ""]), {"Content-Type": "text/plain; version=0.0.4"}


def test_a_lone_callers_milliseconds_are_all_accounted_for(scripted: Scripted) -> None:
    scripted.handle = Timed()
    visits = asyncio.run(profile_lone_caller(scripted.url, [image_call([b"x"])] * 3))
    assert [visit.inside for visit in visits] == pytest.approx([0.04] * 3)
    found = median_profile(visits)
    assert found["the rest of the service"] == pytest.approx(2, abs=1e-6)
    assert {name: found[name] for name in ("decode", "encode", "serialize")} == pytest.approx(
        {"decode": 5, "encode": 30, "serialize": 3}
    )
    assert median_profile([ProfiledRequest(TimedReply(200, b""), 0.05, 0.04, 0.0)]) == pytest.approx(
        {"serialize": 0, "the rest of the service": 40, "client and sockets": 10, "felt": 50}
    )
    scripted.handle = Counting(status=503)
    with pytest.raises(Unexpected, match="503"):
        asyncio.run(profile_lone_caller(scripted.url, [image_call([b"x"])]))


def test_a_refused_request_ends_the_bench(scripted: Scripted) -> None:
    scripted.handle = Counting(status=429)
    with pytest.raises(Unexpected, match="429"):
        asyncio.run(closed_loop(scripted.url, [image_call([b"x"])], concurrency=1, seconds=0.1, warmup=0))


def test_too_few_replies_to_measure_end_the_bench(scripted: Scripted) -> None:
    scripted.handle = Counting()
    with pytest.raises(Unexpected, match="give more --seconds"):
        asyncio.run(closed_loop(scripted.url, [image_call([b"x"])], concurrency=4, seconds=0, warmup=0.05))


def test_the_bare_model_is_open_clip_with_the_weights_of_the_service() -> None:
    torch.manual_seed(0)
    bare = open_clip.create_model("ViT-S-32-alt", pretrained=None).eval()
    texts = ["a cat", "a red car before a house"]
    with torch.inference_mode():
        expected = bare.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(texts), normalize=True).numpy()
    with BareModel("ViT-S-32-alt", 2) as bare_model:
        seconds, vectors = bare_model.texts(texts)
        photo = bare_model.photo(next(iter(crops(1)))[1])
        speed = bare_model.images(2, 0.2)
        speed["decoding"] = bare_model.decoding([next(iter(crops(1)))[1]], 2, 0.1)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert min(seconds, photo, bare_model.ready_s, *speed.values()) > 0
