import pytest
import torch

from models.encoder.device import gpu_memory


def test_without_cuda_there_are_no_figures() -> None:
    assert gpu_memory("cpu") == {}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_allocated_tensor_is_counted() -> None:
    device = "cuda:0"
    tensor = torch.zeros(2**20, dtype=torch.uint8, device=device)
    memory = gpu_memory(device)
    assert len(tensor) <= memory["allocated"] <= memory["reserved"] <= memory["used"] <= memory["total"]
