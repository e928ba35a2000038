"""Loading of open_clip models by name or from a file, in float32 on the CPU."""

import difflib
import hashlib
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from models.encoder.loading.huggingface import convert_config, is_huggingface_folder, read_json
from models.encoder.loading.tokenizers import build_tokenizer, check_vocabulary, require_transformers
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


class _Source(NamedTuple):
    """Where a model comes from.

    name: in open_clip.
    weights: a tag, a file, "random", or None where the name includes them (hf-hub:, local-dir:).
    folder: of local-dir:, else None.
    """

    name: str
    weights: str | None
    folder: Path | None = None


def load_model(name: str, pretrained: str | None, tokenizer: Path | None = None) -> LoadedModel:
    """Load a model; all arguments as in `EncoderSpec`. Raises EncoderUnavailable."""
    source = _resolve(name, pretrained)
    model, text = _create_model(source)
    # sha256 releases the interpreter lock, so the vocabulary is read meanwhile
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(model_digest, model)
        loaded = _load_tokenizer(source, model, text, tokenizer)
        return LoadedModel(model, loaded, f"{_label(name, source.weights)}@{digest.result()}")


def _load_tokenizer(source: _Source, model: Any, text: Mapping[str, Any], folder: Path | None) -> Any:
    """The tokenizer of a folder, of the model's own folder, or the one that `text_cfg` names."""
    wanted = text.get("hf_tokenizer_name")
    if folder is None and wanted:
        folder = source.folder
    with _hub_access(folder is None and bool(wanted)):
        tokenizer = build_tokenizer(source.name, text, folder)
    label = folder.name if folder else wanted or "open_clip's own tokenizer"
    check_vocabulary(_label(source.name, None), model, tokenizer, label)
    return tokenizer


def _resolve(model: str, pretrained: str | None) -> _Source:
    import open_clip

    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise EncoderUnavailable(f"{model} brings its own weights: leave pretrained={pretrained!r} out")
        return _Source(model, None, _find_folder(model) if model.startswith("local-dir:") else None)
    config = STARTER if model == "starter" else Path(model)
    if config.suffix == ".json":
        _check_config_file(config)
        with _REGISTRY_LOCK:
            open_clip.add_model_config(config)
        return _Source(config.stem, _check_weights(config.stem, pretrained or str(config.with_suffix(".safetensors"))))
    name, names = model.replace("/", "-"), open_clip.list_models()
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.5)) or "starter"
        raise EncoderUnavailable(f"open_clip has no model {model!r}: the nearest names are {near}")
    return _Source(name, _check_weights(name, pretrained))


def _find_folder(model: str) -> Path:
    """The folder of local-dir:, with a configuration in the layout of open_clip or Hugging Face."""
    folder = Path(model.removeprefix("local-dir:"))
    if not folder.is_dir():
        raise EncoderUnavailable(f"no folder {folder.name!r}: give local-dir: the path of a folder with a model")
    if is_huggingface_folder(folder):
        return folder
    config = read_json(folder / "open_clip_config.json")
    if not {"text_cfg", "vision_cfg"} <= set(config.get("model_cfg") or {}):
        raise EncoderUnavailable(
            f"open_clip_config.json of {folder.name} has no model_cfg with text_cfg and vision_cfg: "
            "export the model again with open_clip, or give the folder of transformers' save_pretrained"
        )
    return folder


def _check_config_file(config: Path) -> None:
    if not config.is_file():
        raise EncoderUnavailable(
            f"no model configuration {config.name}: give an open_clip name, or the path of its .json"
        )
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(read_json(config))
    if missing:
        raise EncoderUnavailable(
            f"{config.name} has no {', '.join(sorted(missing))}: give a configuration of open_clip; that of a "
            "local-dir: model is given as the folder"
        )


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


def _create_model(source: _Source) -> tuple[Any, dict[str, Any]]:
    """The float32 model on the CPU, and the `text_cfg` of its configuration.

    No pickled code is ever executed: open_clip loads with weights_only.
    """
    import open_clip
    import torch

    huggingface = source.folder is not None and is_huggingface_folder(source.folder)
    text = {} if huggingface or source.name.startswith("hf-hub:") else _text_config(source.name)
    if "hf_model_name" in text:
        require_transformers(source.name, f"the text tower {text['hf_model_name']}")
    try:
        with _hub_access(_needs_hub(source, text)), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if source.folder is not None and huggingface:
                model, text = _create_from_huggingface(source.folder)
            else:
                model = _create_from_open_clip(source)
                text = text or open_clip.get_model_config(source.name)["text_cfg"]
    except EncoderUnavailable:
        raise
    except Exception as error:
        raise EncoderUnavailable(_failure_message(source, text, error)) from error
    return model, text


def _create_from_open_clip(source: _Source) -> Any:
    import open_clip

    name, weights = source.name, source.weights
    tag = open_clip.get_pretrained_cfg(name, weights) if weights else {}
    return open_clip.create_model(
        name,
        None if weights == "random" else weights,
        # open_clip alone would only log a warning, and give wrong vectors
        force_quick_gelu=tag.get("quick_gelu", False),
        require_pretrained=weights != "random",
        pretrained_text=False,
        weights_only=True,
    )


def _create_from_huggingface(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a folder in the layout of Hugging Face, and its `text_cfg`."""
    import open_clip

    from models.encoder.loading.huggingface_weights import load_weights

    config = convert_config(folder)
    with TemporaryDirectory() as made:
        (Path(made) / "open_clip_config.json").write_text(json.dumps(config))
        model = open_clip.create_model(f"local-dir:{made}", load_weights=False)
    load_weights(model, folder)
    return model, config["model_cfg"]["text_cfg"]


def _text_config(name: str) -> dict[str, Any]:
    import open_clip

    text: dict[str, Any] = open_clip.get_model_config(name)["text_cfg"]
    return text


def _needs_hub(source: _Source, text: Mapping[str, Any]) -> bool:
    if "hf_model_name" in text or source.name.startswith("hf-hub:"):
        return True
    local = source.folder is not None or source.weights == "random" or Path(source.weights or "").is_file()
    return not local


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


def _failure_message(source: _Source, text: Mapping[str, Any], error: Exception) -> str:
    """One line with the remedy: a local file is bad, or else the download failed."""
    name, weights = source.name, source.weights
    file = weights if weights is not None and Path(weights).is_file() else None
    reason = " ".join(str(error).split()).partition(". ")[0]
    if file is not None or source.folder is not None:
        path = Path(file or str(source.folder))
        reason = f"{type(error).__name__}: {reason.replace(str(path), path.name)[:160]}"
        if isinstance(error, UnpicklingError):
            return (
                f"{path.name} does not hold weights of {_label(name, None)} alone ({reason}): a pickle with code is "
                "refused, save its state_dict as .safetensors"
            )
        return (
            f"{path.name} does not hold weights of {_label(name, None)} ({reason}): give the --model that they belong "
            "to, or export them again"
        )
    if "hf_model_name" in text and weights == "random":
        return (
            f"the configuration of the text tower {text['hf_model_name']} of {name} could not be fetched from the hub "
            f"({type(error).__name__}): load the model once where the hub answers, or choose another"
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
