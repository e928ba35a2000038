"""What the check runs on: processor, GPU, driver, versions of the packages."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import distributions
from typing import Any

from loadtests.gpu.part import Part, run_part
from loadtests.support.report import environment

QUERIED = "name,memory.total,driver_version,clocks.max.sm,clocks.max.memory,power.limit"
PACKAGES = {
    "faiss-cpu", "faiss-gpu", "fastapi", "httptools", "httpx", "numpy", "open-clip-torch", "pillow", "pyarrow",
    "pydantic", "starlette", "timm", "torch", "torchvision", "transformers", "triton", "uvicorn", "uvloop",
}  # fmt: skip


def gpus() -> list[str]:
    """One line per GPU as the driver's own tool names it; [] where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={QUERIED}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=15).stdout.splitlines()


def torch_device(device: str) -> dict[str, Any]:
    """The device as torch sees it. RuntimeError where it was asked for and is absent."""
    import torch

    if device == "cpu":
        return {"threads": torch.get_num_threads(), "cuda_of_torch": torch.version.cuda}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda_of_torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def measure(part: Part) -> None:
    """Record all of it."""
    machine = part.attempt("machine", lambda: environment("loadtests.gpu"))
    part.attempt("driver", gpus)
    device = part.attempt("torch", lambda: torch_device(part.device))
    named = {str(each.name).lower().replace("_", "-"): each.version for each in distributions() if each.name}
    versions = part.attempt("packages", lambda: {name: named.get(name) for name in sorted(PACKAGES)})
    if machine and device and versions:
        hardware = machine["hardware"]
        part.say(f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB")
        part.say(", ".join(f"{name} {value}" for name, value in device.items()))
        part.say(", ".join(f"{name} {versions[name]}" for name in ("torch", "faiss-gpu", "faiss-cpu", "timm")))


if __name__ == "__main__":
    raise SystemExit(run_part(measure))
