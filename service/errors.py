"""Errors of requests as a tree, and the table of their HTTP statuses.

    ServiceError
    ├── BadRequest           the request is empty, unreadable, or asks for something unsupported
    ├── InvalidValue         an option or an item has a value outside what is allowed
    ├── MissingKey           no key was sent, or not one of ours
    ├── WrongKey             a key without permission for this route
    ├── WrongHost            called by a name that is not the service's own
    ├── RateExceeded         this key has used what it may per second
    ├── NotFound             no label set, job or route by that name
    ├── VersionNotServed     the version asked for exists but is not the one being served
    ├── SwapInProgress       another swap of the same memory is running
    ├── SlowSender           the body did not arrive in time
    ├── TooLarge             too many bytes or items
    ├── CapacityExceeded     all requests, or all of one address, are too many bytes or too many
    ├── UnsupportedType      a content type that this route does not read
    ├── ItemRefused          one item of a request was refused
    └── NotServing           starting up, shutting down, or without a memory

Errors of the packages below (StoreError, ModelError, the batcher's) keep their own class; the table
maps them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import index_store.errors as store
import models.errors as model
from service.batching import batcher, shared_threads, workers


class ServiceError(Exception):
    """A refusal with a message for the caller: value, limit, remedy."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequest(ServiceError):
    """The request is empty, unreadable, or asks for something unsupported."""


class InvalidValue(ServiceError):
    """A value is outside what is allowed."""


class MissingKey(ServiceError):
    """No key was sent, or it is not one of ours."""


class WrongKey(ServiceError):
    """The key is not enough for this route. key_name: the name of the key."""

    def __init__(self, message: str, *, key_name: str) -> None:
        super().__init__(message)
        self.key_name = key_name


class WrongHost(ServiceError):
    """The Host header holds a name that is not the service's own."""


class RateExceeded(ServiceError):
    """The key has used what it may per second.

    retry_after_s: seconds until it may go on.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotFound(ServiceError):
    """Nothing by that name."""


class VersionNotServed(ServiceError):
    """The pinned version exists but is no longer, or not yet, served."""


class SwapInProgress(ServiceError):
    """A swap of this memory is already running."""


class SlowSender(ServiceError):
    """The body did not arrive in time; the caller's fault, so not a 504, which operators count
    against the service.
    """


class TooLarge(ServiceError):
    """Too many bytes or items."""


class CapacityExceeded(ServiceError):
    """The bodies of all requests together, or the requests of one address, are too many."""


class UnsupportedType(ServiceError):
    """A content type that this route does not read."""


class NotServing(ServiceError):
    """Starting up, shutting down, or without what the request needs."""


class ItemRefused(ServiceError):
    """One item of a request was refused; `cause` is why and decides the status."""

    def __init__(self, param: str, cause: Exception) -> None:
        super().__init__(f"{param}: {cause}", param)
        self.cause = cause


# Most specific first: the first row whose class matches decides. (class, status, type, code)
STATUS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (BadRequest, 400, "invalid_request_error", "bad_request"),
    (MissingKey, 401, "authentication_error", "missing_key"),
    (WrongKey, 403, "permission_error", "wrong_key"),
    (WrongHost, 403, "permission_error", "wrong_host"),
    (RateExceeded, 429, "rate_limit_error", "rate_exceeded"),
    (NotFound, 404, "not_found_error", "not_found"),
    (store.UnknownMemory, 404, "not_found_error", "unknown_memory"),
    (store.UnknownVersion, 404, "not_found_error", "unknown_version"),
    (store.NameRefused, 422, "invalid_request_error", "invalid_name"),
    (SlowSender, 408, "timeout_error", "slow_sender"),
    (SwapInProgress, 409, "conflict_error", "swap_in_progress"),
    (store.IncompatibleSnapshot, 409, "conflict_error", "encoder_mismatch"),
    (model.IncompatibleFusion, 409, "conflict_error", "encoder_mismatch"),
    (store.StoreBusy, 409, "conflict_error", "store_busy"),
    (VersionNotServed, 410, "not_found_error", "retired_version"),
    (TooLarge, 413, "invalid_request_error", "too_large"),
    (model.ImageTooLarge, 413, "invalid_request_error", "too_large"),
    (UnsupportedType, 415, "invalid_request_error", "unsupported_type"),
    (model.UnsupportedImage, 415, "invalid_request_error", "unsupported_image"),
    (model.CostlyImage, 422, "invalid_request_error", "costly_image"),
    (model.BrokenImage, 422, "invalid_request_error", "undecodable_image"),
    (store.PairsRefused, 422, "invalid_request_error", "invalid_value"),
    (store.QueryRefused, 422, "invalid_request_error", "invalid_value"),
    (InvalidValue, 422, "invalid_request_error", "invalid_value"),
    (batcher.QueueFull, 429, "rate_limit_error", "queue_full"),
    (CapacityExceeded, 429, "rate_limit_error", "capacity_exceeded"),
    (NotServing, 503, "service_unavailable_error", "not_serving"),
    (batcher.BatcherClosed, 503, "service_unavailable_error", "not_serving"),
    (shared_threads.ThreadsClosed, 503, "service_unavailable_error", "not_serving"),
    (workers.WorkerLost, 503, "service_unavailable_error", "worker_lost"),
    (batcher.DeadlinePassed, 504, "timeout_error", "deadline_passed"),
    (store.StoreError, 503, "service_unavailable_error", "store_error"),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the caller is told. The body of every error, on every route."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The reply's JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def refusal(error: Exception) -> Refusal:
    """The row of STATUS for `error`; anything unknown is a bug: 500, and nothing of it is shown."""
    cause = error.cause if isinstance(error, ItemRefused) else error
    for kind, status, name, code in STATUS:
        if isinstance(cause, kind):
            return Refusal(status, str(error), name, code, getattr(error, "param", None))
    return Refusal(
        500,
        "internal error: the request id in X-Request-ID finds it in the service's log",
        "server_error",
        "internal_error",
    )
