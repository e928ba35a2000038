"""Loading of open_clip models by name or from a file, in float32 on the CPU."""

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

__all__ = ["STARTER", "LoadedModel", "import_libraries", "load_model", "model_digest"]

STARTER = Path(__file__).parents[2] / "starter" / "clip.json"
_REGISTRY_LOCK = threading.Lock()  # open_clip's registry of configurations is a global


class LoadedModel(NamedTuple):
    """An open_clip model, its tokenizer, and its fingerprint MODEL/TAG@DIGEST."""

    model: Any
    tokenizer: Any
    fingerprint: str


def import_libraries() -> None:
    """Import what every model needs, which takes seconds.

    To be called before threads that load models start: two threads that import open_clip at once
    may see a half-initialised module.
    """
    import open_clip  # noqa: F401


def load_model(name: str, pretrained: str | None) -> LoadedModel:
    """Load a model; both arguments as in `EncoderSpec`. Raises EncoderUnavailable."""
    open_clip_name, weights = _resolve(name, pretrained)
    model, tokenizer, digest = _create(open_clip_name, weights)
    return LoadedModel(model, tokenizer, f"{_label(name, weights)}@{digest}")


def _resolve(model: str, pretrained: str | None) -> tuple[str, str | None]:
    """The model's name in open_clip, and its weights.

    weights: a tag, a file, "random", or None where the name includes them (hf-hub:, local-dir:).
    """
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
        with _REGISTRY_LOCK:
            open_clip.add_model_config(config)
        return config.stem, _check_weights(config.stem, pretrained or str(config.with_suffix(".safetensors")))
    name, names = model.replace("/", "-"), open_clip.list_models()
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.5)) or "starter"
        raise EncoderUnavailable(f"open_clip has no model {model!r}: the nearest names are {near}")
    return name, _check_weights(name, pretrained)


def _check_weights(name: str, pretrained: str | None) -> str:
    """The given tag, existing file or "random". Raises EncoderUnavailable for anything else."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    known = ", ".join([*tags[:5], "…"] if len(tags) > 5 else tags)
    if pretrained is not None and (pretrained == "random" or pretrained in tags or Path(pretrained).is_file()):
        return pretrained
    given = "" if pretrained is None else f"{Path(pretrained).name!r} is neither a file nor a hub tag of {name}"
    remedy = "give a local .safetensors file" + (f", or one of its tags ({known})" if tags else "")
    raise EncoderUnavailable(f"{given or f'no weights given for {name}'}: {remedy}")


def _create(name: str, weights: str | None) -> tuple[Any, Any, str]:
    """The float32 model on the CPU, its tokenizer and its digest.

    No pickled code is ever executed: open_clip loads with weights_only.
    """
    import open_clip
    import torch

    random = weights == "random"
    tag = open_clip.get_pretrained_cfg(name, weights) if weights else {}
    needs_hub = not random and not name.startswith("local-dir:") and not (weights and Path(weights).is_file())
    try:
        with _hub_access(needs_hub), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(
                name,
                None if random else weights,
                # open_clip alone would only log a warning, and give wrong vectors
                force_quick_gelu=tag.get("quick_gelu", False),
                require_pretrained=not random,
                pretrained_text=False,
                weights_only=True,
            )
        # sha256 releases the interpreter lock, so the vocabulary is read meanwhile
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(model_digest, model)
            return model, open_clip.get_tokenizer(name), digest.result()
    except Exception as error:
        raise EncoderUnavailable(_failure_message(name, weights, error)) from error


@contextmanager
def _hub_access(needed: bool) -> Iterator[None]:
    """Silence log lines within the context, and go offline if the hub is needed but not responding.

    Log lines are off because a failure is reported as one error. Online, huggingface_hub would
    retry for 50 s; offline it still finds files that were downloaded before.
    """
    from huggingface_hub import constants

    offline, disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = offline or (needed and not _responds(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(disabled)


def _responds(url: str) -> bool:
    head = urllib.request.Request(url, method="HEAD")  # noqa: S310  (the hub's own address)
    try:
        urllib.request.urlopen(head, timeout=5).close()  # noqa: S310  (the hub's own address)
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # an error status is a response too
    return True


def _failure_message(name: str, weights: str | None, error: Exception) -> str:
    """One line with the remedy: a local file is bad, or else the download failed."""
    if weights is not None and Path(weights).is_file():
        reason = " ".join(str(error).replace(weights, Path(weights).name).split()).partition(". ")[0]
        return (
            f"{Path(weights).name} does not hold weights of {name} ({type(error).__name__}: {reason[:160]}): "
            "export them again"
        )
    return (
        f"the weights {weights or name!r} could not be fetched from the hub ({type(error).__name__}): "
        f"download them elsewhere and give the file, as in --model {name} --pretrained weights.safetensors"
    )


def _label(model: str, weights: str | None) -> str:
    """The readable part of the fingerprint, MODEL/TAG; of a file its stem, never its folder."""
    name = Path(model).stem if model.endswith(".json") else model
    if name.startswith("local-dir:"):
        name = Path(name).name
    return name if weights is None else f"{name}/{Path(weights).stem if Path(weights).is_file() else weights}"


def model_digest(model: Any) -> str:
    """12 hex digits of the SHA-256 over the float32 weights and the preprocessing."""
    import torch

    digest = hashlib.sha256(json.dumps(model.visual.preprocess_cfg, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
