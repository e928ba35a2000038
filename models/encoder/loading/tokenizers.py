"""Tokenizers: open_clip's own, and those of Hugging Face from the hub or from a folder."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.errors import EncoderUnavailable

__all__ = ["build_tokenizer", "check_vocabulary", "require_transformers"]

# A model's table of tokens may be padded: CLIPA has 32 000 rows for the 30 522 tokens of BERT.
MAX_UNUSED_ROWS = 0.05


def build_tokenizer(name: str, text: Mapping[str, Any], folder: Path | None) -> Any:
    """The tokenizer of a model: texts -> (B, L) int64 tensor.

    name: of the model in open_clip.  text: the `text_cfg` of its configuration.
    folder: a tokenizer of Hugging Face, None for what the configuration names.
    Raises EncoderUnavailable.
    """
    wanted = text.get("hf_tokenizer_name")
    if folder is None and not wanted:
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {}))
    if folder is not None and not folder.is_dir():
        raise EncoderUnavailable(
            f"no tokenizer folder {folder.name!r}: give the folder that save_pretrained wrote, with its tokenizer.json"
        )
    require_transformers(name, f"the tokenizer {folder.name if folder else wanted}")
    source = str(folder or wanted)
    try:
        return _read_tokenizer(source, text)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).replace(source, Path(source).name).split())[:120]}"
        if folder is not None:
            message = f"the folder {folder.name} holds no tokenizer that transformers reads ({reason}): save it again"
        else:
            message = f"the tokenizer {wanted} of {name} could not be fetched from the hub ({reason}): give its folder"
        raise EncoderUnavailable(f"{message}, as in --tokenizer DIR with a tokenizer.json") from error


def _read_tokenizer(source: str, text: Mapping[str, Any]) -> Any:
    from open_clip.tokenizer import HFTokenizer

    tokenizer = HFTokenizer(
        source,
        context_length=text.get("context_length", 77),
        tokenizer_mode=text.get("tokenizer_mode"),
        **text.get("tokenizer_kwargs", {}),
    )
    tokenizer(["a text"])  # fails without a padding token
    return tokenizer


def require_transformers(name: str, need: str) -> None:
    """Raise EncoderUnavailable where the model needs transformers and it is not installed."""
    if find_spec("transformers") is None:
        raise EncoderUnavailable(
            f"{name} needs {need}, and transformers is not installed: pip install 'reco-serve[hf]'"
        )


def check_vocabulary(name: str, model: Any, tokenizer: Any, label: str) -> None:
    """Raise EncoderUnavailable where the tokenizer was made for another vocabulary.

    label: what the message calls the tokenizer.
    """
    rows = getattr(getattr(model, "text", model), "vocab_size", None)
    inner = getattr(tokenizer, "tokenizer", None)
    size = getattr(tokenizer, "vocab_size", None) if inner is None else len(inner)
    if not rows or not size or (1 - MAX_UNUSED_ROWS) * rows <= size <= rows:
        return
    raise EncoderUnavailable(
        f"{label} has {size} tokens, {name} takes {rows}: give the tokenizer that the model was trained with, "
        "as in --tokenizer DIR"
    )
