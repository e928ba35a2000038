"""The Python client: `RecoClient` and `AsyncRecoClient`."""

from service.client.client import AsyncRecoClient, RecoClient, RecoError

__all__ = ["AsyncRecoClient", "RecoClient", "RecoError"]
