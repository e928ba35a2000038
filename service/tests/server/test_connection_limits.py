"""What `LimitedProtocol` overrides in uvicorn must exist there: an upgrade must not disable a limit
in silence.
"""

import inspect
import resource
import socket
from contextlib import ExitStack

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server.connection_limits import ConnectionLimits, LimitedProtocol
from service.settings import Settings


def test_every_overridden_method_is_one_of_uvicorn() -> None:
    own = {name for name in vars(LimitedProtocol) if inspect.isfunction(vars(LimitedProtocol)[name])}
    overridden = {name for name in own if not name.startswith("_")}
    assert overridden == {
        "connection_made", "connection_lost", "data_received", "on_message_begin", "on_headers_complete",
        "on_message_complete", "on_response_complete", "pause_writing",
    }  # fmt: skip
    for name in overridden:
        theirs, ours = (inspect.signature(getattr(kind, name)) for kind in (HttpToolsProtocol, LimitedProtocol))
        assert list(theirs.parameters) == list(ours.parameters), name


def test_the_limit_belongs_to_one_class() -> None:
    quick = LimitedProtocol.with_limits(ConnectionLimits(head_s=1.5))
    assert (quick.limits.head_s, LimitedProtocol.limits.head_s) == (1.5, 30.0)


def per_address() -> int:
    """The limit for one address, with the files that are open now."""
    limits = ConnectionLimits.from_settings(Settings())
    limits.leave_files()
    return limits.per_address


def test_one_address_never_takes_every_file_of_the_process() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (800, before[1]))
    try:
        alone = per_address()
        assert alone < 600  # three quarters of 800, were nothing open
        with ExitStack() as stack:
            for _ in range(80):
                stack.enter_context(socket.socket())
            assert per_address() == alone - 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
