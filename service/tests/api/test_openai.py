"""POST /v1/embeddings with the official `openai` package against a real service; /embed/* is the
oracle.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from service.tests.conftest import Server

TEXTS = ["a ripe banana", "a carton of milk", "lemon"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def rows(reply: Any) -> np.ndarray:
    return np.array([item.embedding for item in reply.data], np.float32)


def ours(http: httpx.Client, texts: list[str], **options: Any) -> np.ndarray:
    return np.array(
        [item["embedding"] for item in http.post("/embed/text", json={"texts": texts, **options}).json()["data"]],
        np.float32,
    )


def image(http: httpx.Client, photo: bytes) -> np.ndarray:
    return np.array(http.post("/embed/image", files={"file": photo}).json()["data"][0]["embedding"], np.float32)


def uri(photo: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_texts_in_the_clients_default_and_either_format(
    client: openai.OpenAI, http: httpx.Client, options: dict[str, Any]
) -> None:
    reply = client.embeddings.create(model="any", input=TEXTS, user="me", **options)
    if options.get("encoding_format") == "base64":  # the client hands it over as it came
        found = np.array([np.frombuffer(base64.b64decode(item.embedding), "<f4") for item in reply.data])  # type: ignore[arg-type]
    else:
        found = rows(reply)
    np.testing.assert_allclose(found, ours(http, TEXTS), atol=1e-6)
    assert [item.index for item in reply.data] == [0, 1, 2]
    assert reply.model == client.models.list().data[0].id
    one = client.embeddings.create(model="any", input=TEXTS[0])
    np.testing.assert_allclose(rows(one), found[:1], atol=1e-6)
    assert 0 < one.usage.prompt_tokens < reply.usage.prompt_tokens == reply.usage.total_tokens


def test_images_and_mixed_input_in_order(client: openai.OpenAI, http: httpx.Client, photos: dict[str, bytes]) -> None:
    coffee, cat = photos["coffee"], photos["chelsea"]
    found = rows(client.embeddings.create(model="any", input=[uri(coffee), uri(cat)], extra_body={"modality": "image"}))
    expected = np.stack([image(http, coffee), image(http, cat)])
    np.testing.assert_allclose((found * expected).sum(1), 1, atol=1e-5)
    mixed: Any = [{"text": "lemon"}, {"image": uri(cat)}, "milk", {"image": uri(coffee)}]
    reply = client.embeddings.create(model="any", input=mixed)
    texts = ours(http, ["lemon", "milk"])
    expected = np.stack([texts[0], expected[1], texts[1], expected[0]])
    np.testing.assert_allclose((rows(reply) * expected).sum(1), 1, atol=1e-5)
    assert 'reco_requests_total{code="200",endpoint="/v1/embeddings",modality="mixed"}' in http.get("/metrics").text


def test_our_own_options_are_further_fields(client: openai.OpenAI, http: httpx.Client) -> None:
    plain = client.embeddings.create(model="any", input=TEXTS, extra_body={"enhance": False})
    np.testing.assert_allclose(rows(plain), ours(http, TEXTS, enhance=False), atol=1e-6)
    near = client.embeddings.create(
        model="any", input="lemon", extra_body={"neighbors": True, "k": 3, "memory": "grocery@all"}
    )
    assert len(near.data[0].model_extra["neighbors"]) == 3  # type: ignore[index]
    assert near.model_extra is not None
    assert near.model_extra["memory"] == "grocery@all"
    width = rows(plain).shape[1]
    assert rows(client.embeddings.create(model="any", input="lemon", dimensions=width)).shape == (1, width)


def test_what_it_refuses(client: openai.OpenAI) -> None:
    def refused(given: Any, **options: Any) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as raised:
            client.embeddings.create(model="any", input=given, **options)
        return raised.value

    shorter = refused("lemon", dimensions=64)
    assert (shorter.status_code, shorter.param) == (400, "dimensions")
    for tokens in ([1, 2, 3], [[1, 2], [3]], [7] * 1000):
        error = refused(tokens)
        assert error.status_code == 400
        assert "send the text itself" in error.message
    assert refused([]).status_code == 400
    assert refused("lemon", extra_body={"colour": "red"}).status_code == 400
    assert refused([{"text": "a", "image": "b"}]).status_code == 422
    assert refused("lemon", extra_body={"memory": "nothing"}).status_code == 404
    bad = refused([{"text": "fine"}, {"image": "data:image/png;base64,AAAA"}])
    assert (bad.status_code, bad.param) == (415, "input[1]")


def test_a_bad_item_may_be_null(http: httpx.Client) -> None:
    reply = http.post(
        "/v1/embeddings", json={"input": [{"image": "AAAA"}, {"text": "lemon"}], "on_error": "null", "user": None}
    )
    data = reply.json()["data"]
    assert (data[0]["embedding"], data[0]["error"]["param"]) == (None, "input[0]")
    assert len(data[1]["embedding"]) > 0
    assert http.post("/v1/embeddings", json={"model": "any"}).json()["error"]["param"] == "input"
    npy = http.post("/v1/embeddings", json={"input": TEXTS}, headers={"accept": "application/x-npy"})
    assert npy.content.startswith(b"\x93NUMPY")
