import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.fusion.losses import info_nce, reco_loss


def unit_vectors(seed: int) -> Tensor:
    return F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def info_nce_by_definition(image: Tensor, text: Tensor, scale: float) -> float:
    """InfoNCE computed term by term."""
    total = 0.0
    for i in range(len(image)):
        to_texts = sum(math.exp(scale * float(image[i] @ text[j])) for j in range(len(text)))
        to_images = sum(math.exp(scale * float(image[j] @ text[i])) for j in range(len(image)))
        own = math.exp(scale * float(image[i] @ text[i]))
        total -= math.log(own / to_texts) + math.log(own / to_images)
    return total / (2 * len(image))


def test_info_nce_equals_its_definition() -> None:
    image, text = unit_vectors(0), unit_vectors(1)
    assert float(info_nce(image, text, 7.0)) == pytest.approx(info_nce_by_definition(image, text, 7.0), rel=1e-5)


def test_the_loss_of_aligned_pairs_is_0_and_of_equal_vectors_log_b() -> None:
    rows = torch.eye(5)
    assert float(info_nce(rows, rows, 100.0)) == pytest.approx(0.0, abs=1e-6)
    equal = rows[:1].expand(5, 5)
    assert float(info_nce(equal, equal, 100.0)) == pytest.approx(math.log(5), rel=1e-6)


def test_rows_of_one_meaning_are_not_negatives() -> None:
    image, text = unit_vectors(0), unit_vectors(1)
    image[3], text[3] = image[0], text[0]
    same = torch.zeros(5, 5, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    loss = info_nce(image, text, 10.0, same=same)
    assert float(loss) < float(info_nce(image, text, 10.0))
    everything = torch.ones(5, 5, dtype=torch.bool)  # no negatives are left
    assert float(info_nce(image, text, 10.0, same=everything)) == pytest.approx(0.0, abs=1e-6)


def test_the_loss_is_the_sum_of_the_terms_that_are_on() -> None:
    fused_image, fused_text, image, text = (unit_vectors(seed) for seed in range(4))
    both, left, right = (
        info_nce(fused_image, fused_text, 9.0),
        info_nce(fused_image, text, 9.0),
        info_nce(image, fused_text, 9.0),
    )
    batch = (fused_image, fused_text, image, text, 9.0)
    torch.testing.assert_close(reco_loss(*batch), both + left + right)
    torch.testing.assert_close(reco_loss(*batch, both=False), left + right)
    torch.testing.assert_close(reco_loss(*batch, image_only=False), both + right)
    torch.testing.assert_close(reco_loss(*batch, text_only=False), both + left)
    with pytest.raises(ValueError, match="keep at least one"):
        reco_loss(*batch, both=False, image_only=False, text_only=False)
