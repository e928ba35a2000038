"""A Python client, sync and async: long lists in, numpy rows out, busy services waited for.

Needs httpx and numpy alone.

>>> with RecoClient("http://127.0.0.1:8000") as reco:       # doctest: +SKIP
...     vectors = reco.embed_texts(["a red apple", "a lemon"], enhance=False)

What is sent and when is tried again is written once, as generators that yield calls and pauses
(`flows`); the two classes only drive them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import numpy as np

from . import bodies
from . import protocol as flows
from .bodies import ImageLike, Limits
from .protocol import Call, Flow, Outcome, RecoError

__all__ = ["AsyncRecoClient", "Limits", "RecoClient", "RecoError"]

T = TypeVar("T")
UNIX = "unix:"


def _arguments(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Arguments of httpx's client, but for the transport."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    address = "http://localhost" if base_url.startswith(UNIX) else base_url.rstrip("/")
    # a proxy of the environment (HTTP_PROXY) must not see the key of a service on this machine
    local = httpx.URL(address).host in ("127.0.0.1", "::1", "localhost")
    return {"base_url": address, "headers": headers, "timeout": timeout_s, "trust_env": not local}


def _socket_path(base_url: str) -> str | None:
    """PATH of unix:PATH, None for another address."""
    return base_url.removeprefix(UNIX) if base_url.startswith(UNIX) else None


class RecoClient:
    """Calls one service. Safe to share between threads.

    A long list is sent in several requests, and all its rows are of one version of the memory,
    edits included: the first reply's version is pinned, and where it is replaced meanwhile all
    begins anew.
    base_url: http://HOST:PORT, or unix:PATH for a socket.
    limits: how much one request carries, how long a busy service is waited for, and how often an
    answer begins anew.  timeout_s: of one HTTP request.  A proxy of the environment is used, but
    never for a service on this machine. Methods that need another key than a read key say which.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        socket = _socket_path(base_url)
        transport = httpx.HTTPTransport(uds=socket) if socket else None
        self._http = httpx.Client(transport=transport, **_arguments(base_url, api_key, timeout_s))

    def embed_images(
        self, images: Sequence[ImageLike], *, progress: flows.Progress | None = None, **options: Any
    ) -> np.ndarray:
        """(N, D) float32 unit rows in the order of `images` (encoded bytes, or paths).

        progress: told how many more are done; a negative number where all begins anew.
        """
        return self._run(flows.embed_images(images, options, self._limits, progress))

    def embed_texts(
        self, texts: Sequence[str], *, progress: flows.Progress | None = None, **options: Any
    ) -> np.ndarray:
        """(N, D) float32 unit rows in the order of `texts`."""
        return self._run(flows.embed_texts(texts, options, self._limits, progress))

    def classify(
        self,
        items: Sequence[ImageLike | str],
        *,
        texts: bool = False,
        progress: flows.Progress | None = None,
        **options: Any,
    ) -> list[list[dict[str, Any]]]:
        """[{label, score}] of each image, or of each text with texts=True, best first.

        score: of a softmax over all labels, or with a SigLIP model a probability of each label by
        itself.  options: labels or label_set, templates, top_k…
        """
        return self._run(flows.classify(items, texts, options, self._limits, progress))

    def memories(self) -> list[dict[str, Any]]:
        """One row per memory of the service's store (write key)."""
        return self._run(flows.memories(self._limits))

    def activate(
        self, name: str, version: str, *, dry_run: bool = False, wait_s: float | None = 600.0
    ) -> Mapping[str, Any]:
        """Swap to a version and wait until its job is done (admin key).

        wait_s: seconds; None returns the job as started. Raises RecoError where it fails.
        """
        body = {"version": version, "dry_run": dry_run}
        return self._run(flows.start_job(name, "activate", body, wait_s, self._limits))

    def rollback(self, name: str, *, wait_s: float | None = 600.0) -> Mapping[str, Any]:
        """Swap back to the version that was served before (admin key); as `activate`."""
        return self._run(flows.start_job(name, "rollback", None, wait_s, self._limits))

    def compact(self, name: str, *, wait_s: float | None = 600.0) -> Mapping[str, Any]:
        """Fold the online edits into a version that is then served (admin key); as `activate`."""
        return self._run(flows.start_job(name, "compact", None, wait_s, self._limits))

    def job(self, job_id: str) -> Mapping[str, Any]:
        """A swap or a compaction as it is now (write key)."""
        return self._run(flows.request("GET", bodies.route("jobs", job_id), None, self._limits))

    def put_pairs(self, name: str, pairs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Add pairs, or replace those of the same id, all or none (write key).

        pairs: {id, caption, and image (base64) or image_embedding…}, as POST /memories/{name}/pairs
        takes them.
        """
        body = {"pairs": [dict(pair) for pair in pairs]}
        return self._run(flows.request("POST", bodies.route("memories", name, "pairs"), body, self._limits))

    def delete_pair(self, name: str, pair_id: str | int) -> Mapping[str, Any]:
        """Remove one pair (write key)."""
        return self._run(flows.request("DELETE", bodies.route("memories", name, "pairs", pair_id), None, self._limits))

    def label_set(self, name: str) -> Mapping[str, Any]:
        """A stored label set, NAME or NAME@VERSION."""
        return self._run(flows.request("GET", bodies.route("label-sets", name), None, self._limits))

    def put_label_set(
        self, name: str, labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> Mapping[str, Any]:
        """Store or replace a label set (write key)."""
        body = bodies.label_set_body(labels, templates)
        return self._run(flows.request("PUT", bodies.route("label-sets", name), body, self._limits))

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = flow.send(outcome)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            outcome = None
            if isinstance(step, Call):
                outcome = self._send(step)
            else:
                time.sleep(step)

    def _send(self, call: Call) -> httpx.Response | httpx.TransportError:
        try:
            return self._http.request(call.method, call.path, **call.body)
        except httpx.TransportError as error:
            return error


class AsyncRecoClient:
    """`RecoClient` for asyncio: the same methods, awaited."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        socket = _socket_path(base_url)
        transport = httpx.AsyncHTTPTransport(uds=socket) if socket else None
        self._http = httpx.AsyncClient(transport=transport, **_arguments(base_url, api_key, timeout_s))

    async def embed_images(
        self, images: Sequence[ImageLike], *, progress: flows.Progress | None = None, **options: Any
    ) -> np.ndarray:
        """As `RecoClient.embed_images`."""
        return await self._run(flows.embed_images(images, options, self._limits, progress))

    async def embed_texts(
        self, texts: Sequence[str], *, progress: flows.Progress | None = None, **options: Any
    ) -> np.ndarray:
        """As `RecoClient.embed_texts`."""
        return await self._run(flows.embed_texts(texts, options, self._limits, progress))

    async def classify(
        self,
        items: Sequence[ImageLike | str],
        *,
        texts: bool = False,
        progress: flows.Progress | None = None,
        **options: Any,
    ) -> list[list[dict[str, Any]]]:
        """As `RecoClient.classify`."""
        return await self._run(flows.classify(items, texts, options, self._limits, progress))

    async def memories(self) -> list[dict[str, Any]]:
        """As `RecoClient.memories`."""
        return await self._run(flows.memories(self._limits))

    async def activate(
        self, name: str, version: str, *, dry_run: bool = False, wait_s: float | None = 600.0
    ) -> Mapping[str, Any]:
        """As `RecoClient.activate`."""
        body = {"version": version, "dry_run": dry_run}
        return await self._run(flows.start_job(name, "activate", body, wait_s, self._limits))

    async def rollback(self, name: str, *, wait_s: float | None = 600.0) -> Mapping[str, Any]:
        """As `RecoClient.rollback`."""
        return await self._run(flows.start_job(name, "rollback", None, wait_s, self._limits))

    async def compact(self, name: str, *, wait_s: float | None = 600.0) -> Mapping[str, Any]:
        """As `RecoClient.compact`."""
        return await self._run(flows.start_job(name, "compact", None, wait_s, self._limits))

    async def job(self, job_id: str) -> Mapping[str, Any]:
        """As `RecoClient.job`."""
        return await self._run(flows.request("GET", bodies.route("jobs", job_id), None, self._limits))

    async def put_pairs(self, name: str, pairs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """As `RecoClient.put_pairs`."""
        body = {"pairs": [dict(pair) for pair in pairs]}
        return await self._run(flows.request("POST", bodies.route("memories", name, "pairs"), body, self._limits))

    async def delete_pair(self, name: str, pair_id: str | int) -> Mapping[str, Any]:
        """As `RecoClient.delete_pair`."""
        return await self._run(
            flows.request("DELETE", bodies.route("memories", name, "pairs", pair_id), None, self._limits)
        )

    async def label_set(self, name: str) -> Mapping[str, Any]:
        """As `RecoClient.label_set`."""
        return await self._run(flows.request("GET", bodies.route("label-sets", name), None, self._limits))

    async def put_label_set(
        self, name: str, labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> Mapping[str, Any]:
        """As `RecoClient.put_label_set`."""
        body = bodies.label_set_body(labels, templates)
        return await self._run(flows.request("PUT", bodies.route("label-sets", name), body, self._limits))

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = flow.send(outcome)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            outcome = None
            if isinstance(step, Call):
                outcome = await self._send(step)
            else:
                await asyncio.sleep(step)

    async def _send(self, call: Call) -> httpx.Response | httpx.TransportError:
        try:
            return await self._http.request(call.method, call.path, **call.body)
        except httpx.TransportError as error:
            return error
