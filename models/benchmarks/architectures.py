"""Every architecture of open_clip of at most 200 M parameters a tower, against open_clip itself.

    python -m models.benchmarks.architectures [NAME...]

Weights are random and seeded, as the equality of two computations does not depend on them. Writes
`tested.json`, which `reco info` reads, and the table of docs/reference/models.md, after each model:
a run that stops keeps what it measured, and a run of some names keeps the others (`make
bench-models`). Exits with 1 where vectors differ.
Alphabet: B batch, L tokens, D width.
"""

import argparse
import json
import logging
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import create_model, get_model_config, get_tokenizer, list_models
from torch.nn.functional import normalize

from models.encoder.encoder import Encoder, EncoderSpec
from models.encoder.image_tower import normalize_pixels
from models.encoder.loading.describe import TESTED, count_parameters

MAX_PARAMETERS = 200e6  # of one tower
MIN_COSINE = 0.9999
BATCHES = (1, 3)
TURNS = 2
TABLE = Path(__file__).parents[2] / "docs/reference/models.md"
TEXTS = ("a cat", "two dogs run along a beach at dawn, one of them has a very long tail", "")


class HashTokenizer:
    """Token numbers from the hash of each word: for models whose tokenizer lies on the hub.

    Texts end with a token that is greater than all others, and are padded with 0.
    """

    def __init__(self, context_length: int, vocabulary: int) -> None:
        self._length, self._vocabulary = context_length, vocabulary

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(B, L) int64."""
        tokens = torch.zeros(len(texts), self._length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            words = [2 + zlib.crc32(word.encode()) % (self._vocabulary - 3) for word in text.split()]
            words = [*words[: self._length - 1], self._vocabulary - 1]
            row[: len(words)] = torch.tensor(words)
        return tokens


def compare(name: str) -> dict[str, Any]:
    """Load a model as serving does, and compare it with open_clip: cosines, and images per second.

    A copy of the model stays plain, as the model itself is packed in place.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, pretrained_text=False).eval()
    text = get_model_config(name)["text_cfg"]
    tokenizer = (
        HashTokenizer(text["context_length"], text["vocab_size"])
        if "hf_tokenizer_name" in text
        else get_tokenizer(name)
    )
    size = model.visual.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = np.random.default_rng(0).integers(0, 256, (BATCHES[-1], 3, height, width), dtype=np.uint8)
    tokens = tokenizer(TEXTS)
    plain = deepcopy(model)
    encoder = Encoder(EncoderSpec(name, "random", device="cpu", packed=True), model, tokenizer, f"{name}/random")
    with torch.inference_mode():
        normalized = normalize_pixels(torch.from_numpy(pixels), plain.visual.preprocess_cfg)
        images, texts = plain.encode_image(normalized), plain.encode_text(tokens)
    seconds = cpu_seconds(lambda: encode_plainly(plain, normalized), lambda: encoder.encode(pixels, "image"))
    plain_rate, rate = (round(len(pixels) / each, 2) for each in seconds)
    return {
        "image": min(min_cosine(encoder, pixels[:rows], "image", images[:rows]) for rows in BATCHES),
        "text": min(min_cosine(encoder, tokens.numpy()[:rows], "text", texts[:rows]) for rows in BATCHES),
        "trunk": encoder.trunk_dim,
        "trimmed": encoder.trims_texts,
        "plain_images_per_cpu_s": plain_rate,
        "images_per_cpu_s": rate,
    }


@torch.inference_mode()
def encode_plainly(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) normalized -> (B, D), by open_clip."""
    vectors: torch.Tensor = model.encode_image(pixels)
    return vectors


def min_cosine(encoder: Encoder, batch: np.ndarray, side: Any, expected: torch.Tensor) -> float:
    """The least cosine of a batch's vectors with open_clip's, not normalized, rounded down."""
    ours = torch.from_numpy(encoder.encode(batch, side).vectors).double()
    cosine = float((ours * normalize(expected.double(), dim=-1)).sum(1).min())
    return float(np.floor(1e6 * cosine) / 1e6)


def cpu_seconds(*runs: Callable[[], object]) -> list[float]:
    """Seconds of the processor of each function, in turns: the least of TURNS calls."""
    least = [float("inf")] * len(runs)
    for _ in range(TURNS):
        for place, run in enumerate(runs):
            begun = time.process_time()
            run()
            least[place] = min(least[place], time.process_time() - begun)
    return least


def names_to_compare() -> list[str]:
    """The architectures whose towers have at most MAX_PARAMETERS each, without those that need the
    hub for their text tower.
    """
    names = [name for name in list_models() if "hf_model_name" not in get_model_config(name)["text_cfg"]]
    return [name for name in names if max(count_parameters(name).values()) <= MAX_PARAMETERS]


def write_results(results: dict[str, dict[str, Any]]) -> None:
    """Write both files."""
    TESTED.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    head, mark, _ = TABLE.read_text().partition("<!-- written by models.benchmarks.architectures -->\n")
    rows = [
        f"| {name} | {each['image']:.6f} | {each['text']:.6f} | {each['trunk'] or '–'} | "
        f"{'yes' if each['trimmed'] else 'no'} | {each['plain_images_per_cpu_s']} | {each['images_per_cpu_s']} |"
        for name, each in sorted(results.items())
    ]
    columns = "| architecture | image | text | trunk keys | texts trimmed | images/s, open_clip | images/s |"
    TABLE.write_text("\n".join([head + mark, columns, "| -- | -: | -: | -: | -- | -: | -: |", *rows, ""]))


def main() -> None:
    """Compare the named architectures, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # open_clip warns that it loads no weights
    warnings.simplefilter("ignore")
    results = json.loads(TESTED.read_text()) if TESTED.is_file() else {}
    different = []
    for name in parser.parse_args().names or names_to_compare():
        results[name] = found = compare(name)
        print(name, found, flush=True)
        if min(found["image"], found["text"]) < MIN_COSINE:
            different.append(name)
        write_results(results)
    if different:
        sys.exit(f"other vectors than open_clip: {', '.join(different)}")


if __name__ == "__main__":
    main()
