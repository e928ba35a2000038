"""What an architecture of open_clip is and needs, before anything is downloaded or allocated."""

import logging
from pathlib import Path

__all__ = ["TESTED", "count_parameters"]

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
