"""What the accelerator's memory holds, for the gauge; without CUDA there is nothing to tell."""

import torch

__all__ = ["gpu_memory"]


def gpu_memory(device: str) -> dict[str, int]:
    """Bytes by kind; {} where the device is not CUDA.

    allocated, reserved: torch's tensors and its pool, this process alone.  used, total: of the card, faiss and other processes included.
    """
    if not device.startswith("cuda"):
        return {}
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return {"allocated": allocated, "reserved": reserved, "used": total - free, "total": total}
