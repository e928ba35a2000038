"""`reco info`: what would be served, or what a model is and needs, as JSON."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import typer

from service.cli.options import MODEL, with_settings
from service.settings import Settings

app = typer.Typer(rich_markup_mode=None)
PACKAGES = ("reco-serve", "torch", "torchvision", "open_clip_torch")


@app.command("info")
@with_settings(*MODEL)
def info(settings: Settings) -> None:
    """Print the versions of the packages, the encoder and the memories in the store.

    With --model NAME and no --pretrained: what that architecture of open_clip is and needs; nothing
    is downloaded.
    """
    from index_store import Store
    from models.encoder.loading.describe import describe_architecture, is_architecture
    from service.pipeline.load import load_encoder

    if settings.pretrained is None and settings.model != "starter" and is_architecture(settings.model):
        print(json.dumps(describe_architecture(settings.model), indent=2))
        return
    encoder, store = load_encoder(settings), Store(settings.store)
    faiss = "faiss-gpu" if sys.platform == "linux" else "faiss-cpu"
    model = {
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "trunk_dim": encoder.trunk_dim,
        "device": str(encoder.device),
    }
    found = {
        "versions": {name: version(name) for name in (*PACKAGES, faiss)},
        "model": model,
        "memories": {name: store.versions(name) for name in store.names()},
    }
    print(json.dumps(found, indent=2))
