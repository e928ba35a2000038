"""The encoder: any open_clip model, frozen. The only importer of open_clip, and only where a model is really loaded."""

import difflib
import hashlib
import json
import logging
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from index_store.pairs import KeyKind, Side
from models.crop import Crop
from models.errors import ConfigError, EncoderUnavailable
from models.images import MAX_PIXELS, read_image
from models.text import text_encoder

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
STARTER = Path(__file__).parent / "starter" / "clip.json"
_REGISTRY = threading.Lock()  # open_clip's list of configurations is one global


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Which model to load, and how.

    model: "starter", an open_clip name, or a path to an open_clip configuration (.json).
    pretrained: a hub tag, a local weights file, or "random" (seeded; for speed tests); None = what stands beside the configuration.
    device: "auto" is CUDA where there is one.
    """

    model: str = "starter"
    pretrained: str | None = None
    precision: Precision = "fp32"
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder made of a batch.

    vectors: (B, D) float32 unit.  trunk: (B, Dt) float32 unit, the image tower's features before projection, where it shows them.
    """

    vectors: np.ndarray
    trunk: np.ndarray | None

    def key(self, kind: KeyKind) -> np.ndarray:
        """(B, Dk) float32 unit: what a memory with this kind of key is searched with."""
        if kind == "vector":
            return self.vectors
        if self.trunk is None:
            raise ConfigError("this encoder shows no trunk features on this side: build the memory with vector keys")
        return self.trunk

    def take(self, rows: Sequence[int]) -> "Encoded":
        """Some of the items, as a batch of their own."""
        chosen = list(rows)
        return Encoded(self.vectors[chosen], None if self.trunk is None else self.trunk[chosen])


def together(blocks: Sequence[Encoded]) -> Encoded:
    """Several blocks as one."""
    trunks = [block.trunk for block in blocks if block.trunk is not None]
    return Encoded(np.concatenate([block.vectors for block in blocks]), np.concatenate(trunks) if len(trunks) == len(blocks) else None)


class Encoder:
    """A loaded CLIP. Immutable, and `encode` may run in several threads at once."""

    def __init__(self, spec: EncoderSpec, model: Any, tokenizer: Any, fingerprint: str) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self.device = _device(spec.device)
        self.logit_scale = math.exp(model.logit_scale.item())  # before any rounding to half precision
        self._model = _frozen(model, self.device, spec.precision)
        self._encode_text = text_encoder(self._model)
        self._tokenizer = tokenizer
        self._crop = _crop(model.visual.preprocess_cfg)
        self.image_size = self._crop.size  # (H, W)
        self.context_length = int(self.tokenize([""]).shape[1])
        probe = self.encode(np.zeros((1, 3, *self.image_size), np.uint8), "image")
        self.dim = probe.vectors.shape[1]
        self.trunk_dim = None if probe.trunk is None else probe.trunk.shape[1]

    @classmethod
    def load(cls, spec: EncoderSpec) -> "Encoder":
        """Load the model or raise EncoderUnavailable, in one line that names the way out."""
        name, weights = _resolve(spec)
        model, tokenizer = _create(name, weights)
        return cls(spec, model, tokenizer, f"{_label(spec.model, weights)}@{_digest(model)}")

    @property
    def module(self) -> Any:
        """The open_clip model itself, for a script that trains or takes it apart; serving has no use for it."""
        return self._model

    def around(self, model: Any) -> "Encoder":
        """This encoder with other weights: what training made of a copy of `module`. Its fingerprint is that of the weights."""
        return Encoder(self.spec, model, self._tokenizer, f"{self.fingerprint.partition('@')[0]}+tuned@{_digest(model)}")

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) uint8: open_clip's own resize and crop; normalising is left to `encode`, on the device."""
        return np.ascontiguousarray(np.asarray(self._crop(image)).transpose(2, 0, 1))

    def read(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """`preprocess` of an encoded image, which may come from anyone; or an ImageError."""
        return self.preprocess(read_image(data, max_pixels=max_pixels, frame=self.image_size))

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """(B, L) int64, cut at the context length. Half a surrogate pair, which no tokenizer survives, becomes a "?"."""
        tokens: np.ndarray = self._tokenizer([text.encode("utf-8", "replace").decode() for text in texts]).numpy()
        return tokens

    def encode(self, batch: np.ndarray, side: Side) -> Encoded:
        """The unit vectors of a batch.

        batch: (B, 3, H, W) uint8 from `preprocess`, or (B, L) int64 from `tokenize`.
        """
        import torch

        with torch.inference_mode():
            tensor = torch.from_numpy(batch).to(self.device)
            if side == "text":
                return Encoded(_unit(self._encode_text(tensor)), None)
            vectors, trunk = _see(self._model, tensor)
            return Encoded(_unit(vectors), None if trunk is None else _unit(trunk))


def _crop(preprocess: Mapping[str, Any]) -> Crop:
    """The half of open_clip's evaluation transform that makes pixels; its ToTensor and Normalize are `normalised`."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose

    config = PreprocessCfg(**preprocess)
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    *pixels, _to_tensor, _normalize = image_transform_v2(config, is_train=False).transforms
    return Crop((height, width), config.resize_mode, config.interpolation, Compose(pixels))


def normalised(pixels: "torch.Tensor", preprocess: Mapping[str, Any]) -> "torch.Tensor":
    """(B, 3, H, W) uint8 -> float32, as open_clip's ToTensor and Normalize."""
    scaled = pixels.float() / 255
    mean, std = (scaled.new_tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (scaled - mean) / std


def _see(model: Any, pixels: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor | None"]:
    """The image vectors (B, D) and, where the tower shows them, its features before projection (B, Dt). pixels: (B, 3, H, W) uint8."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    visual = model.visual
    pixels = normalised(pixels, visual.preprocess_cfg).to(model.logit_scale.dtype)
    if isinstance(visual, TimmModel):
        trunk = visual.trunk(pixels)
        return visual.head(trunk), trunk if trunk.ndim == 2 and len(visual.head) else None
    if isinstance(visual, VisionTransformer) and visual.proj is not None and not visual.output_tokens:
        trunk = visual._pool(visual.transformer(visual._embeds(pixels)))[0]  # as VisionTransformer.forward
        return trunk @ visual.proj, trunk
    return model.encode_image(pixels, normalize=False), None


def _unit(vectors: "torch.Tensor") -> np.ndarray:
    """(B, D) any precision, any device -> float32 unit numpy."""
    import torch.nn.functional as F

    return F.normalize(vectors.float(), dim=-1).cpu().numpy()


def _device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise EncoderUnavailable(f"device {wanted!r} was asked for, and torch sees no CUDA device: use cpu or auto")
    return wanted


def _frozen(model: Any, device: str, precision: Precision) -> Any:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return model.eval().requires_grad_(False).to(device=device, dtype=dtypes[precision])


def _resolve(spec: EncoderSpec) -> tuple[str, str | None]:
    """The name under which open_clip knows the model, and its weights: a tag, a file, "random", or None where the name says it all."""
    import open_clip

    if spec.model.startswith(("hf-hub:", "local-dir:")):
        if spec.pretrained is not None:
            raise EncoderUnavailable(f"{spec.model} brings its own weights: leave pretrained={spec.pretrained!r} out")
        return spec.model, None
    config = STARTER if spec.model == "starter" else Path(spec.model)
    if config.suffix == ".json":
        if not config.is_file():
            raise EncoderUnavailable(f"no model configuration {config.name}: give an open_clip name, or the path of its .json")
        with _REGISTRY:
            open_clip.add_model_config(config)
        return config.stem, _weights(config.stem, spec.pretrained or str(config.with_suffix(".safetensors")))
    name, known = spec.model.replace("/", "-"), open_clip.list_models()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5)) or "starter"
        raise EncoderUnavailable(f"open_clip has no model {spec.model!r}: the nearest names are {near}")
    return name, _weights(name, spec.pretrained)


def _weights(name: str, pretrained: str | None) -> str:
    """A tag, a file that exists, or "random"; anything else is refused with what could be given instead."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    some = ", ".join([*tags[:5], "…"] if len(tags) > 5 else tags)
    if pretrained is not None and (pretrained == "random" or pretrained in tags or Path(pretrained).is_file()):
        return pretrained
    what = "no weights given for" if pretrained is None else f"{Path(pretrained).name!r} is neither a file nor a hub tag of"
    remedy = f"give a local .safetensors file, or one of its tags ({some})" if tags else "give a local .safetensors file"
    raise EncoderUnavailable(f"{what} {name}: {remedy}")


def _create(name: str, weights: str | None) -> tuple[Any, Any]:
    """The float32 model on the CPU, and its tokenizer. Nothing pickled is ever executed: open_clip loads with weights_only."""
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
                force_quick_gelu=tag.get("quick_gelu", False),  # open_clip alone would only warn, and give wrong vectors
                require_pretrained=not random,
                pretrained_text=False,
                weights_only=True,
            )
        return model, open_clip.get_tokenizer(name)
    except Exception as error:
        raise EncoderUnavailable(_why(name, weights, error)) from error


@contextmanager
def _hub(asked: bool) -> Iterator[None]:
    """Load without log lines, since one error tells all, and offline at once where the hub does not answer: it would retry for 50 s."""
    from huggingface_hub import constants

    offline, disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = offline or (asked and not _answers(constants.ENDPOINT))  # what was fetched before is still found
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


def _digest(model: Any) -> str:
    """12 hex digits of what decides the vectors: every float32 weight as loaded, and the preprocessing."""
    import torch

    digest = hashlib.sha256(json.dumps(model.visual.preprocess_cfg, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
