"""The settings' model, loaded: what the service answers with and what an evaluation asks."""

from __future__ import annotations

from models.encoder.encoder import Encoder, EncoderSpec
from models.fusion.checkpoint import fusions_by_name, training_free_fusions
from models.reco import Reco
from models.starter import FUSION
from service.settings import Settings


def load_encoder(settings: Settings) -> Encoder:
    """The encoder that the settings name. Raises ModelError."""
    chosen = settings
    shapes = (chosen.fixed_shapes, chosen.max_batch)
    return Encoder.load(
        EncoderSpec(chosen.model, chosen.pretrained, chosen.precision, chosen.device, *shapes, packed=True)
    )


def load_reco(settings: Settings) -> Reco:
    """The encoder, with the fusion asked for, else the starter's own, else the training-free rule. Raises ModelError."""
    encoder = load_encoder(settings)
    name = settings.fusion or (str(FUSION) if settings.model == "starter" else None)
    file = (
        fusions_by_name(name, encoder=encoder.fingerprint, dim=encoder.dim)
        if name
        else training_free_fusions("mean", encoder.dim)
    )
    return Reco(encoder, file.fusions, fusion_id=file.fusion_id, k=file.k)
