"""The Python client: `RecoClient` and `AsyncRecoClient`."""

from .client import AsyncRecoClient, RecoClient, RecoError

__all__ = ["AsyncRecoClient", "RecoClient", "RecoError"]
