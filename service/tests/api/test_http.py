"""Every route over real HTTP, with real JPEG bytes, against the starter and its memory."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, features

from service.tests.conftest import Server, jpeg

LABELS = ["Banana", "Lemon", "Cucumber", "Orange juice"]


@pytest.fixture(scope="module")
def http(server: Server) -> Any:
    with server.client() as client:
        yield client


def refused(reply: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error body, checked to be whole and to give nothing away."""
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in reply.text
    assert "/tmp" not in reply.text  # noqa: S108  a path of the machine
    assert code is None or error["code"] == code
    assert reply.headers["x-request-id"]
    return error


def vectors(reply: httpx.Response, field: str = "embedding") -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.array([item[field] for item in reply.json()["data"]], np.float32)


# --- embedding ------------------------------------------------------------------------------------


def test_three_shapes_of_an_image_give_one_vector(http: httpx.Client, photos: dict[str, bytes]) -> None:
    photo = photos["coffee"]
    encoded = base64.b64encode(photo).decode()
    replies = [
        http.post("/embed/image", files={"file": ("coffee.jpg", photo, "image/jpeg")}),
        http.post("/embed/image", content=photo, headers={"content-type": "image/jpeg"}),
        http.post("/embed/image", json={"images": [encoded]}),
        http.post("/embed/image", json={"images": [f"data:image/jpeg;base64,{encoded}"]}),
    ]
    found = np.concatenate([vectors(reply) for reply in replies])
    np.testing.assert_allclose(found @ found[0], 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    body = replies[0].json()
    assert body["object"] == "list"
    assert body["memory"] == replies[0].headers["x-memory-version"] == "grocery@all"
    assert body["data"][0]["enhanced"] is True
    assert {part.split(";")[0] for part in replies[0].headers["server-timing"].split(", ")} == {
        "decode",
        "queue",
        "encode",
        "retrieve",
        "fuse",
    }


def test_many_images_equal_the_same_alone(http: httpx.Client, photos: dict[str, bytes]) -> None:
    together = vectors(http.post("/embed/image", files=[("file", (name, data)) for name, data in photos.items()]))
    alone = np.concatenate(
        [
            vectors(http.post("/embed/image", content=data, headers={"content-type": "image/jpeg"}))
            for data in photos.values()
        ]
    )
    np.testing.assert_allclose((together * alone).sum(axis=1), 1, atol=1e-5)


def test_plain_and_enhanced(http: httpx.Client, photos: dict[str, bytes]) -> None:
    both = http.post("/embed/image?plain=true&neighbors=true&k=5", files={"file": photos["coffee"]})
    off = http.post("/embed/image?enhance=false", files={"file": photos["coffee"]})
    np.testing.assert_allclose(vectors(both, "plain"), vectors(off), atol=1e-5)
    assert off.json()["memory"] is None
    assert off.json()["data"][0]["enhanced"] is False
    assert float((vectors(both) * vectors(off)).sum()) < 0.999
    near = both.json()["data"][0]["neighbors"]
    assert len(near) == 5
    assert [n["score"] for n in near] == sorted((n["score"] for n in near), reverse=True)
    assert sum(n["weight"] for n in near) == pytest.approx(1, abs=1e-4)
    assert all(n["caption"] and n["id"] for n in near)


def test_exclude_and_max_similarity(http: httpx.Client, photos: dict[str, bytes]) -> None:
    def near(**options: Any) -> list[dict[str, Any]]:
        reply = http.post(
            "/embed/image", params={"neighbors": True, "k": 3, **options}, files={"file": photos["coffee"]}
        )
        assert reply.status_code == 200, reply.text
        found: list[dict[str, Any]] = reply.json()["data"][0]["neighbors"]
        return found

    first = near()
    without = near(exclude=json.dumps([first[0]["id"]]))
    assert [n["id"] for n in without][:2] == [n["id"] for n in first][1:]
    assert len(without) == 3
    ceiling = first[1]["score"] - 1e-6
    assert all(n["score"] <= ceiling for n in near(max_similarity=ceiling))


def test_no_neighbour_gives_exactly_the_plain_vector(http: httpx.Client, photos: dict[str, bytes]) -> None:
    reply = http.post("/embed/image?plain=true&max_similarity=-0.99", files={"file": photos["coffee"]})
    np.testing.assert_array_equal(vectors(reply), vectors(reply, "plain"))
    assert reply.json()["data"][0]["enhanced"] is False


def test_base64_and_npy_say_the_same_as_float(http: httpx.Client) -> None:
    body = {"texts": ["a ripe banana", "a carton of milk"]}
    as_float = vectors(http.post("/embed/text", json=body))
    coded = http.post("/embed/text", json={**body, "encoding_format": "base64"}).json()["data"]
    npy = http.post("/embed/text", json=body, headers={"accept": "application/x-npy"})
    np.testing.assert_allclose(
        [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in coded], as_float, atol=1e-6
    )
    np.testing.assert_allclose(np.load(io.BytesIO(npy.content), allow_pickle=False), as_float, atol=1e-6)
    assert npy.headers["x-memory-version"] == "grocery@all"


def test_text_usage_counts_tokens(http: httpx.Client) -> None:
    one = http.post("/embed/text", json={"inputs": "banana"}).json()["usage"]["prompt_tokens"]
    two = http.post("/embed/text", json={"inputs": ["banana", "banana"]}).json()["usage"]["prompt_tokens"]
    assert two == 2 * one > 0


def test_concurrent_callers_each_get_their_own(http: httpx.Client, photos: dict[str, bytes]) -> None:
    alone = {name: vectors(http.post("/embed/image", files={"file": data})) for name, data in photos.items()}

    def ask(i: int) -> float:
        name = sorted(photos)[i % 3]
        return float((vectors(http.post("/embed/image", files={"file": photos[name]})) * alone[name]).sum())

    with ThreadPoolExecutor(12) as pool:
        assert min(pool.map(ask, range(60))) > 0.9999


# --- classification -------------------------------------------------------------------------------


def test_classify_scores_are_a_softmax_in_order(http: httpx.Client, photos: dict[str, bytes]) -> None:
    for mode in ("none", "image", "text", "both"):
        reply = http.post(
            "/classify",
            data={"labels": json.dumps(LABELS), "enhance": mode, "top_k": "4"},
            files={"file": photos["coffee"]},
        )
        assert reply.status_code == 200, reply.text
        ranked = reply.json()["data"][0]
        assert {row["label"] for row in ranked} == set(LABELS)
        assert reply.json()["scores"] == "softmax"
        assert sum(row["score"] for row in ranked) == pytest.approx(1, abs=1e-4)
        assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
        assert reply.json()["memory"] == (None if mode == "none" else "grocery@all")


def test_classify_texts_against_labels(http: httpx.Client) -> None:
    reply = http.post(
        "/classify", json={"texts": ["a photo of a Banana."], "labels": LABELS, "enhance": "none", "top_k": 1}
    )
    assert reply.json()["data"][0][0]["label"] == "Banana"


def test_enhancing_helps_on_grocery(http: httpx.Client, grocery: list[tuple[bytes, str]]) -> None:
    sample = grocery[:: len(grocery) // 60]
    labels = sorted({name for _, name in grocery})

    def right(mode: str) -> int:
        count = 0
        for at in range(0, len(sample), 20):
            part = sample[at : at + 20]
            form = {"labels": json.dumps(labels), "enhance": mode, "top_k": "1"}
            reply = http.post("/classify", data=form, files=[("file", data) for data, _ in part])
            assert reply.status_code == 200, reply.text
            count += sum(found[0]["label"] == name for found, (_, name) in zip(reply.json()["data"], part, strict=True))
        return count

    # the starter brings its label set
    assert set(labels) <= set(http.get("/label-sets/grocery").json()["labels"])
    plain, both = right("none"), right("both")
    assert both > plain + len(sample) // 5, (plain, both, len(sample))


def test_label_sets_are_stored_listed_used_and_deleted(http: httpx.Client, photos: dict[str, bytes]) -> None:
    body = {"labels": LABELS, "templates": ["a photo of a {}.", "a {} in a shop."]}
    put = http.put("/label-sets/fruit", json=body).json()
    version = put.pop("version")
    assert put == {"name": "fruit", **body}
    found = http.get("/label-sets/fruit").json()
    assert [found[part] for part in ("name", "version", "labels", "templates")] == [
        "fruit",
        version,
        LABELS,
        body["templates"],
    ]
    row = {"name": "fruit", "version": version, "labels": 4, "templates": body["templates"]}
    assert row in http.get("/label-sets").json()["data"]
    stored = http.post("/classify?label_set=fruit&top_k=2", files={"file": photos["coffee"]}).json()
    sent = http.post(
        "/classify", json={**body, "images": [base64.b64encode(photos["coffee"]).decode()], "top_k": 2}
    ).json()
    assert [row["label"] for row in stored["data"][0]] == [row["label"] for row in sent["data"][0]]
    assert (stored["label_set"], "label_set" in sent) == (f"fruit@{version}", False)
    http.put(
        "/label-sets/fruit", json={"labels": ["Pear"]}
    ).raise_for_status()  # the version before may still be asked for
    pinned = http.post(f"/classify?label_set=fruit@{version}&top_k=2", files={"file": photos["coffee"]}).json()
    assert pinned["label_set"] == stored["label_set"]
    assert [row["label"] for row in pinned["data"][0]] == [row["label"] for row in stored["data"][0]]
    assert http.get("/label-sets/fruit").json()["versions"][1:] == [version]
    assert http.get(f"/label-sets/fruit@{version}").json()["labels"] == LABELS
    refused(http.post("/classify?label_set=fruit@0123", files={"file": photos["coffee"]}), 410, "retired_version")
    assert http.delete("/label-sets/fruit").status_code == 200
    refused(http.get("/label-sets/fruit"), 404, "not_found")
    refused(http.post("/classify?label_set=fruit", files={"file": photos["coffee"]}), 404)


# --- bad input: each the code of CONTRACT, and the service goes on --------------------------------


def huge_png() -> bytes:
    """A valid header that declares 20 000 x 20 000 pixels, and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"x")
        + chunk(b"IEND", b"")
    )


def test_bad_images(http: httpx.Client, photos: dict[str, bytes]) -> None:
    photo = photos["coffee"]
    raw = {"content-type": "image/jpeg"}
    assert (
        refused(http.post("/embed/image", content=b"no image", headers=raw), 415, "unsupported_image")["param"]
        == "images[0]"
    )
    refused(http.post("/embed/image", content=photo[: len(photo) // 2], headers=raw), 422, "undecodable_image")
    assert "20000" in refused(http.post("/embed/image", content=huge_png(), headers=raw), 413)["message"]
    refused(http.post("/embed/image", content=b"", headers=raw), 400)
    refused(http.post("/embed/image", content=photo, headers={"content-type": "text/plain"}), 415)
    refused(http.post("/embed/image", json={"images": []}), 400)
    refused(http.post("/embed/image", json={"images": ["not base64!"]}), 422)
    refused(http.post("/embed/image", json={"images": [7]}), 422)
    refused(http.post("/embed/image", json={"images": "abc"}), 422)
    refused(http.post("/embed/image", json={"images": ["https://example.org/a.jpg"]}), 422)
    refused(http.post("/embed/image", content=b"{", headers={"content-type": "application/json"}), 400)
    refused(http.post("/embed/image", json=[1]), 400)
    refused(http.post("/embed/image", content=b"--x", headers={"content-type": "multipart/form-data; boundary=y"}), 400)
    assert http.post("/embed/image", content=photo, headers=raw).status_code == 200


def test_the_smallest_image_is_an_image(http: httpx.Client) -> None:
    tiny = jpeg(np.full((1, 1, 3), 200, np.uint8))
    wide = io.BytesIO()
    Image.new("RGB", (50_000, 1), (10, 200, 30)).save(wide, "PNG")
    assert http.post("/embed/image", files=[("file", tiny), ("file", wide.getvalue())]).status_code == 200


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_every_format_and_colour_mode_has_the_vector_of_its_picture(
    http: httpx.Client, photos: dict[str, bytes]
) -> None:
    """The same photo in every dress, against itself as a PNG; the second frame of an animation is
    another photo.
    """
    photo = Image.open(io.BytesIO(photos["chelsea"])).resize((300, 300))
    other, exif = Image.open(io.BytesIO(photos["coffee"])).resize((300, 300)), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    shades = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    dressed = {
        "exif": encoded(photo.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG", quality=95),
        "alpha": encoded(photo.convert("RGBA"), "PNG"),
        "palette": encoded(photo.quantize(256), "PNG"),
        "16 bits": encoded(Image.fromarray(shades), "PNG"),
        "grey": encoded(photo.convert("L"), "PNG"),
        "tiff": encoded(photo, "TIFF"),
        "bmp": encoded(photo, "BMP"),
        "webp": encoded(photo, "WEBP", lossless=True),
        "animated webp": encoded(photo, "WEBP", lossless=True, save_all=True, append_images=[other]),
        "animated gif": encoded(photo, "GIF", save_all=True, append_images=[other]),
        **({"avif": encoded(photo, "AVIF", quality=95)} if features.check("avif") else {}),
    }
    files = [("file", encoded(photo, "PNG")), *(("file", data) for data in dressed.values())]
    found = vectors(http.post("/embed/image?enhance=false", files=files))
    cosines = dict(zip(dressed, (found[1:] @ found[0]).tolist(), strict=True))
    exact = {"alpha", "tiff", "bmp", "webp", "animated webp"}
    assert all(cosines[name] > 0.99999 for name in exact), cosines
    assert all(cosine > 0.97 for name, cosine in cosines.items() if name not in {"16 bits", "grey"}), cosines
    grey = {name: found[1 + list(dressed).index(name)] for name in ("16 bits", "grey")}
    assert float(grey["16 bits"] @ grey["grey"]) > 0.99999


def test_a_bad_item_never_hurts_its_neighbours(http: httpx.Client, photos: dict[str, bytes]) -> None:
    files = [("file", photos["coffee"]), ("file", b"broken"), ("file", photos["chelsea"])]
    assert refused(http.post("/embed/image", files=files), 415)["param"] == "images[1]"
    reply = http.post("/embed/image?on_error=null", files=files)
    data = reply.json()["data"]
    assert data[1]["embedding"] is None
    assert data[1]["error"]["param"] == "images[1]"
    alone = vectors(http.post("/embed/image", files={"file": photos["chelsea"]}))
    assert float(np.dot(alone[0], data[2]["embedding"])) > 0.9999
    scored = http.post("/classify?on_error=null", data={"labels": json.dumps(LABELS)}, files=files).json()
    assert scored["data"][1] is None
    assert scored["errors"][1]["code"] == "unsupported_image"
    assert scored["data"][2]


def test_bad_options(http: httpx.Client) -> None:
    def ask(**body: Any) -> httpx.Response:
        return http.post("/embed/text", json={"texts": ["banana"], **body})

    assert refused(ask(colour="red"), 400)["param"] == "colour"
    assert refused(ask(k=0), 422)["param"] == "k"
    assert refused(ask(k=10_000), 422)["param"] == "k"
    assert refused(ask(k="many"), 422)["param"] == "k"
    refused(ask(encoding_format="xml"), 422)
    refused(ask(memory="nothing"), 404, "unknown_memory")
    refused(ask(memory="grocery@never"), 404, "unknown_version")
    refused(ask(memory="grocery@fruit-and-vegetables"), 410, "retired_version")
    refused(ask(memory="../../etc"), 422, "invalid_name")
    refused(http.post("/embed/text", json={}), 400)
    refused(http.post("/embed/text", json={"texts": []}), 400)
    refused(http.post("/embed/text", json={"texts": [None]}), 422)
    refused(http.post("/embed/text", json={"texts": ["x"] * 10_000}), 413)
    refused(http.post("/embed/text", json={"texts": ["x" * 1_000_000]}), 413)
    refused(http.post("/embed/text", content=b"x", headers={"content-type": "text/plain"}), 415)
    refused(
        http.post("/embed/text", json={"texts": ["a"], "on_error": "null"}, headers={"accept": "application/x-npy"}),
        400,
    )
    refused(http.post("/embed/text", json={"texts": ["a"]}, headers={"x-request-timeout-ms": "soon"}), 422)
    assert ask(memory="grocery@all").status_code == 200
    assert http.post("/embed/text", json={"texts": ["NUL \x00 byte", ""]}).status_code == 200


def test_bad_labels(http: httpx.Client) -> None:
    def ask(**body: Any) -> httpx.Response:
        return http.post("/classify", json={"texts": ["banana"], **body})

    refused(ask(labels=[]), 400)
    assert refused(ask(labels=["a", "b", "a"]), 422)["param"] == "labels[2]"
    refused(ask(labels=["a", " "]), 422)
    refused(ask(labels=["a"], templates=["no place"]), 422)
    refused(ask(), 422)
    refused(ask(labels=["a"], label_set="b"), 422)
    refused(ask(labels=[1]), 422)
    refused(ask(label_set="../x"), 422)
    refused(http.put("/label-sets/x", json={"labels": []}), 400)
    refused(http.put("/label-sets/x", json={"labels": ["a", "a"]}), 422)
    refused(http.put("/label-sets/x", json={"labels": ["a"], "colour": 1}), 400)


def test_unknown_routes_and_methods_answer_in_the_same_body(http: httpx.Client) -> None:
    refused(http.get("/nowhere"), 404, "not_found")
    refused(http.get("/embed/text"), 405, "method_not_allowed")
    refused(http.get("/memories/nothing"), 404)
    refused(http.get("/jobs/nothing"), 404)
    refused(http.post("/memories/grocery/activate", json={"version": "../x"}), 422, "invalid_name")
    refused(http.post("/memories/grocery/activate", json={}), 400)


def test_a_declared_length_beyond_the_limit_is_refused_unread(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(
            b"POST /embed/image HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\ncontent-length: 10737418240\r\n\r\nthe beginning"
        )
        reply = b""
        # head and body may come apart
        while not reply.endswith(b"}") and (part := raw.recv(65536)):
            reply += part
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"10737418240" in reply


# --- what is running ------------------------------------------------------------------------------


def test_health_info_and_models(http: httpx.Client) -> None:
    for route in ("/health", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/ping"):
        assert http.get(route).json() == {"status": "ok"}, route
    info = http.get("/info").json()
    assert info["memories"]["live"] == {"grocery": "all"}
    assert info["model"]["name"] == "starter"
    assert http.get("/v1/models").json()["data"][0]["id"] in info["model"]["fingerprint"]
    bodies = http.get("/openapi.json").json()["paths"]["/embed/image"]["post"]["requestBody"]["content"]
    assert "neighbors" in bodies["multipart/form-data"]["schema"]["properties"]


def test_request_ids_travel_and_are_cleaned(http: httpx.Client) -> None:
    assert http.get("/memories", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    assert http.get("/memories", headers={"x-request-id": "bad\tid"}).headers["x-request-id"] != "bad\tid"


def test_metrics_tell_what_happened(http: httpx.Client) -> None:
    http.post("/embed/text", json={"texts": ["banana", "lemon"]})
    http.get("/nowhere/at/all")
    text = http.get("/metrics").text
    for piece in (
        'reco_requests_total{code="200",endpoint="/embed/text",modality="text"}',
        'reco_requests_total{code="404",endpoint="unmatched",modality="none"}',
        'reco_stage_duration_seconds_count{modality="text",stage="encode"}',
        'reco_items_total{modality="text"}',
        'reco_enhanced_total{enhanced="true",reason="neighbors"}',
        'reco_memory_info{encoder="starter/',
        'reco_memory_pairs{name="grocery"}',
        'reco_snapshots_alive{name="grocery"} 1.0',
        'reco_queue_depth{modality="image"} 0.0',
    ):
        assert piece in text, piece
    assert "/nowhere" not in text
