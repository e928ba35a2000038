"""Loading of the encoder and the fusion that the settings name, for serving and evaluation."""

from __future__ import annotations

from models.encoder.encoder import Encoder, EncoderSpec
from models.fusion.checkpoint import fusions_by_name, training_free_fusions
from models.reco import Reco
from models.starter import FUSION
from service.settings import Settings


def load_encoder(settings: Settings) -> Encoder:
    """The encoder that the settings name. Raises ModelError."""
    spec = EncoderSpec(
        settings.model,
        settings.pretrained,
        settings.precision,
        settings.device,
        settings.fixed_shapes,
        settings.max_batch,
        packed=True,
        tokenizer=settings.tokenizer,
    )
    return Encoder.load(spec)


def load_reco(settings: Settings) -> Reco:
    """The encoder with its fusion: the named one, else the starter's own, else the rule `mean`.

    Raises ModelError.
    """
    encoder = load_encoder(settings)
    name = settings.fusion or (str(FUSION) if settings.model == "starter" else None)
    if name:
        file = fusions_by_name(name, encoder=encoder.fingerprint, dim=encoder.dim)
    else:
        file = training_free_fusions("mean", encoder.dim)
    return Reco(encoder, file.fusions, fusion_id=file.fusion_id, k=file.k)
