"""Where models come from: a name or a file -> open_clip's float32 model on the CPU, or one line that names the way out."""

import difflib
import hashlib
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import EncoderUnavailable

__all__ = ["STARTER", "Found", "digest", "found", "import_libraries"]

STARTER = Path(__file__).parents[1] / "starter" / "clip.json"
_REGISTRY = threading.Lock()  # open_clip's list of configurations is one global


class Found(NamedTuple):
    """A loaded model, its tokenizer, and MODEL/TAG@DIGEST."""

    model: Any
    tokenizer: Any
    fingerprint: str


def import_libraries() -> None:
    """Import what every model needs, which takes seconds, in the calling thread: two that import at once may meet half a module."""
    import open_clip  # noqa: F401


def found(name: str, pretrained: str | None) -> Found:
    """Load a model, both as in `EncoderSpec`, or raise EncoderUnavailable."""
    known, weights = _resolve(name, pretrained)
    model, tokenizer, digested = _create(known, weights)
    return Found(model, tokenizer, f"{_label(name, weights)}@{digested}")


def _resolve(model: str, pretrained: str | None) -> tuple[str, str | None]:
    """The name under which open_clip knows the model, and its weights: a tag, a file, "random", or None where the name says it all."""
    import open_clip

    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise EncoderUnavailable(f"{model} brings its own weights: leave pretrained={pretrained!r} out")
        return model, None
    config = STARTER if model == "starter" else Path(model)
    if config.suffix == ".json":
        if not config.is_file():
            raise EncoderUnavailable(
                f"no model configuration {config.name}: give an open_clip name, or the path of its .json"
            )
        with _REGISTRY:
            open_clip.add_model_config(config)
        return config.stem, _weights(config.stem, pretrained or str(config.with_suffix(".safetensors")))
    name, known = model.replace("/", "-"), open_clip.list_models()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5)) or "starter"
        raise EncoderUnavailable(f"open_clip has no model {model!r}: the nearest names are {near}")
    return name, _weights(name, pretrained)


def _weights(name: str, pretrained: str | None) -> str:
    """A tag, a file that exists, or "random"; anything else is refused with what could be given instead."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    some = ", ".join([*tags[:5], "…"] if len(tags) > 5 else tags)
    if pretrained is not None and (pretrained == "random" or pretrained in tags or Path(pretrained).is_file()):
        return pretrained
    what = (
        "no weights given for"
        if pretrained is None
        else f"{Path(pretrained).name!r} is neither a file nor a hub tag of"
    )
    remedy = (
        f"give a local .safetensors file, or one of its tags ({some})" if tags else "give a local .safetensors file"
    )
    raise EncoderUnavailable(f"{what} {name}: {remedy}")


def _create(name: str, weights: str | None) -> tuple[Any, Any, str]:
    """The float32 model on the CPU, its tokenizer and its digest. Nothing pickled is ever executed: open_clip loads with weights_only."""
    import open_clip
    import torch

    random = weights == "random"
    tag = open_clip.get_pretrained_cfg(name, weights) if weights else {}
    asked = not random and not name.startswith("local-dir:") and not (weights and Path(weights).is_file())
    try:
        with _hub(asked), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(
                name,
                None if random else weights,
                force_quick_gelu=tag.get(
                    "quick_gelu", False
                ),  # open_clip alone would only warn, and give wrong vectors
                require_pretrained=not random,
                pretrained_text=False,
                weights_only=True,
            )
        with ThreadPoolExecutor(1) as hashing:  # which needs no interpreter, unlike reading a vocabulary
            digested = hashing.submit(digest, model)
            return model, open_clip.get_tokenizer(name), digested.result()
    except Exception as error:
        raise EncoderUnavailable(_why(name, weights, error)) from error


@contextmanager
def _hub(asked: bool) -> Iterator[None]:
    """Load without log lines, since one error tells all, and offline at once where the hub does not answer: it would retry for 50 s."""
    from huggingface_hub import constants

    offline, disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = offline or (
        asked and not _answers(constants.ENDPOINT)
    )  # what was fetched before is still found
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(disabled)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()  # noqa: S310 (the hub's own address)
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # a refusal is an answer too
    return True


def _why(name: str, weights: str | None, error: Exception) -> str:
    """One line: a bad file is named as such, anything else is taken for a hub that did not answer."""
    if weights is not None and Path(weights).is_file():
        reason = " ".join(str(error).replace(weights, Path(weights).name).split()).partition(". ")[0]
        return f"{Path(weights).name} does not hold weights of {name} ({type(error).__name__}: {reason[:160]}): export them again"
    return (
        f"the weights {weights or name!r} could not be fetched from the hub ({type(error).__name__}): "
        f"download them elsewhere and give the file, as in --model {name} --pretrained weights.safetensors"
    )


def _label(model: str, weights: str | None) -> str:
    """MODEL/TAG for people to read; a file is called by its stem, and no folder is told."""
    name = Path(model).stem if model.endswith(".json") else model
    if name.startswith("local-dir:"):
        name = Path(name).name
    return name if weights is None else f"{name}/{Path(weights).stem if Path(weights).is_file() else weights}"


def digest(model: Any) -> str:
    """12 hex digits of what decides the vectors: every float32 weight as loaded, and the preprocessing."""
    import torch

    found = hashlib.sha256(json.dumps(model.visual.preprocess_cfg, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]
