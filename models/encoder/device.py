"""GPU memory figures for the metrics."""

import torch

__all__ = ["gpu_memory"]


def gpu_memory(device: str) -> dict[str, int]:
    """Bytes of GPU memory by kind; {} where the device is not CUDA.

    allocated, reserved: torch's tensors and torch's pool, in this process.
    used, total: of the whole card, faiss and other processes included.
    """
    if not device.startswith("cuda"):
        return {}
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return {"allocated": allocated, "reserved": reserved, "used": total - free, "total": total}
