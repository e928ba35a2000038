"""Architectures other than the starter's, from the command line to the replies of all routes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.tests.encoder.loading.test_tokenizers import siglip_config
from models.tests.encoder.test_optimize import CONFIGS
from models.tests.tokenizer import train_tokenizer
from service.tests.conftest import Server


def write_config(folder: Path, name: str, config: dict[str, Any]) -> str:
    path = folder / f"{name}-to-serve.json"
    path.write_text(json.dumps(config))
    return str(path)


def resnet_flags(folder: Path) -> tuple[str, ...]:
    return ("--model", write_config(folder, "resnet", CONFIGS["resnet"]))


def coca_flags(folder: Path) -> tuple[str, ...]:
    return ("--model", write_config(folder, "coca", CONFIGS["coca"]))


def siglip_flags(folder: Path) -> tuple[str, ...]:
    tokens = train_tokenizer(folder / "tokenizer")
    config = write_config(folder, "siglip", siglip_config(tokens))
    return ("--model", config, "--tokenizer", str(folder / "tokenizer"))


@pytest.mark.parametrize(
    ("flags", "scores"), [(resnet_flags, "softmax"), (coca_flags, "softmax"), (siglip_flags, "sigmoid")]
)
def test_every_route_answers(
    serve: Callable[..., Server], photos: dict[str, bytes], tmp_path: Path, flags: Any, scores: str
) -> None:
    server = serve(tmp_path / "store", *flags(tmp_path), "--pretrained", "random", "--device", "cpu")
    labels = ["a cat", "a ripe banana", "two dogs"]
    with server.client() as http:
        image = http.post("/embed/image?enhance=false", files={"file": photos["coffee"]})
        text = http.post("/embed/text", json={"texts": labels, "enhance": False})
        form = {"labels": json.dumps(labels), "enhance": "none"}
        found = http.post("/classify", data=form, files={"file": photos["coffee"]})
        for reply in (image, text, found):
            assert reply.status_code == 200, reply.text
    assert len(text.json()["data"]) == 3
    assert len(image.json()["data"][0]["embedding"]) == len(text.json()["data"][0]["embedding"])
    assert found.json()["scores"] == scores
    values = [row["score"] for row in found.json()["data"][0]]
    assert values == sorted(values, reverse=True)
    assert (sum(values) == pytest.approx(1, abs=1e-4)) == (scores == "softmax")
