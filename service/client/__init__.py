"""The Python client: `RecoClient` and `AsyncRecoClient`, and the `Limits` of what they send."""

from .client import AsyncRecoClient, Limits, RecoClient, RecoError

__all__ = ["AsyncRecoClient", "Limits", "RecoClient", "RecoError"]
