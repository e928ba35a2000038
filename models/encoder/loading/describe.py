"""What an architecture of open_clip is and needs, before anything is downloaded or allocated."""

import json
import logging
from pathlib import Path
from typing import Any

__all__ = ["TESTED", "count_parameters", "describe_architecture", "is_architecture"]

# What `make bench-models` found: architecture -> its figures.
TESTED = Path(__file__).with_name("tested.json")


def count_parameters(name: str) -> dict[str, int]:
    """Parameters of the image tower ("image") and of all the rest ("text"); allocates nothing."""
    import open_clip
    import torch

    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # open_clip warns that it loads no weights
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", pretrained_text=False)
    finally:
        logging.disable(disabled)
    image = sum(each.numel() for each in model.visual.parameters())
    return {"image": image, "text": sum(each.numel() for each in model.parameters()) - image}


def is_architecture(name: str) -> bool:
    """Whether open_clip builds a model of this name by itself."""
    import open_clip

    return name.replace("/", "-") in open_clip.list_models()


def describe_architecture(name: str) -> dict[str, Any]:
    """What `reco info --model NAME` prints.  name: one of `is_architecture`.

    parameters: of each tower, None where the size of the text tower is unknown before its
    configuration is downloaded from the hub (`hf_model_name`).
    dim: of the vectors.  image_size: height and width in pixels.
    needs: packages beyond our own.  weights: the tags to choose `--pretrained` from.  tested: the
    cosines with open_clip's own vectors that `make bench-models` found, None where it was not run.
    """
    import open_clip

    name = name.replace("/", "-")
    config = open_clip.get_model_config(name) or {}
    text, size = config.get("text_cfg", {}), config.get("vision_cfg", {}).get("image_size", 224)
    tokenizer = text.get("hf_tokenizer_name")
    found = json.loads(TESTED.read_text("utf-8")).get(name)
    return {
        "name": name,
        "parameters": None if "hf_model_name" in text else count_parameters(name),
        "dim": config.get("embed_dim"),
        "image_size": list(size) if isinstance(size, list | tuple) else [size, size],
        "context_length": text.get("context_length", 77),
        "tokenizer": tokenizer or "open_clip's own",
        "needs": ["reco-serve[hf]"] if tokenizer else [],
        "weights": [*open_clip.list_pretrained_tags_by_model(name), "random"],
        "tested": found and {side: found[side] for side in ("image", "text", "trunk")},
    }
