import pytest
import torch

from models.encoder.device import gpu_memory


def test_without_cuda_there_is_nothing_to_tell() -> None:
    assert gpu_memory("cpu") == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_is_counted() -> None:
    device = "cuda:0"
    held = torch.zeros(2**20, dtype=torch.uint8, device=device)
    found = gpu_memory(device)
    assert len(held) <= found["allocated"] <= found["reserved"] <= found["used"] <= found["total"]
