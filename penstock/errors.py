"""Every failure penstock raises, as one tree.

PenstockError
├── SetupError                      the start is refused; the command line prints it as one line
│   ├── MissingExtra                a package of an optional extra is not installed
│   ├── UnreadableModel             the model folder cannot be read
│   ├── UnsupportedModel            the architecture cannot be served
│   ├── BadTopology                 what is said to be wired to what cannot be
│   ├── AddressInUse                somebody else listens there
│   └── UnsafeBind                  an address beyond loopback without a key
├── RequestError                    the client's mistake; answered with a 4xx
│   ├── BadRequest                  400, `param` names the field
│   ├── PromptTooLong               400, says the limit
│   ├── Unsupported                 400, a field that this server does not implement
│   ├── Unauthorized                401
│   ├── UnknownModel                404
│   ├── NotFound                    404, nothing is at that path
│   ├── MethodNotAllowed            405
│   ├── TooSlow                     408, the rest of the request did not come in time
│   ├── BodyTooLarge                413
│   └── HeadTooLarge                431
├── Overloaded                      503 with Retry-After: try again, nothing is wrong
│   └── OverShare                   429 with Retry-After: this tenant has more waiting than its share
├── DeadlineExceeded                504
├── Cancelled                       the client left; nobody is told
├── WorkerError                     a worker failed the request
│   ├── NoWorker                    503: nobody can take it now
│   ├── WorkerLost                  the connection or the process is gone
│   ├── WorkerStalled               it is there and makes no progress
│   ├── WorkerDraining              it takes nothing new
│   └── EngineFailed                its engine raised
├── NoPath                          no links lead from one device to another
├── WireError
│   ├── ConnectionLost              the peer is gone, or frames went missing
│   ├── Refused                     wrong token or protocol
│   └── FrameTooLarge
└── KvError
    ├── OutOfBlocks                 the pool cannot give what was asked
    ├── LeaseLost                   the lease lapsed or was aborted; nothing written under it counts
    └── StaleEpoch                  a message from, or to, an earlier incarnation of a worker

An error crosses a process boundary by its class name and message (`to_wire`, `from_wire`).
"""

from __future__ import annotations

from typing import ClassVar


class PenstockError(Exception):
    """Says what, where, and what to do. `status` and `type` are what an HTTP client sees."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    param: str | None = None
    retry_after_s: float | None = None


class SetupError(PenstockError):
    """The start is refused; the message names the setting and the way out."""


class MissingExtra(SetupError):
    """A package of an optional extra is not installed."""


class UnreadableModel(SetupError):
    """The model folder cannot be read."""


class UnsupportedModel(SetupError):
    """The architecture cannot be served."""


class BadTopology(SetupError):
    """What is said to be wired to what cannot be; the message names the vertex, or the file, line and field."""


class AddressInUse(SetupError):
    """Somebody else listens there."""


class UnsafeBind(SetupError):
    """An address beyond loopback without a key."""


class RequestError(PenstockError):
    """The client's mistake."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequest(RequestError):
    """A field is missing, misspelt or out of range."""


class PromptTooLong(RequestError):
    """Prompt plus output do not fit; the message says the limit."""

    code = "context_length_exceeded"


class Unsupported(RequestError):
    """A field of the standard that this server does not implement."""

    code = "unsupported_parameter"


class Unauthorized(RequestError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class UnknownModel(RequestError):
    """No worker serves that model."""

    status = 404
    code = "model_not_found"


class NotFound(RequestError):
    """Nothing is at that path."""

    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """The path is there, for other methods."""

    status = 405
    code = "method_not_allowed"


class BodyTooLarge(RequestError):
    """The request body is over the limit that the message names."""

    status = 413


class TooSlow(RequestError):
    """The rest of the request did not come in time."""

    status = 408
    code = "request_timeout"


class HeadTooLarge(RequestError):
    """The request's headers are over the limit that the message names."""

    status = 431


class Overloaded(PenstockError):
    """Queues are full; try again after `retry_after_s`."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverShare(Overloaded):
    """One tenant's requests fill the queue that others need too."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class DeadlineExceeded(PenstockError):
    """The request's deadline passed before it was done."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Cancelled(PenstockError):
    """The client left."""

    status = 499


class WorkerError(PenstockError):
    """A worker failed the request."""

    status = 502
    type = "worker_error"


class NoWorker(WorkerError):
    """Nobody can take the request now."""

    status = 503
    code = "no_worker"
    retry_after_s = 1.0


class WorkerLost(WorkerError):
    """The connection or the process is gone."""

    code = "worker_lost"


class WorkerStalled(WorkerError):
    """The worker answers and makes no progress."""

    code = "worker_stalled"


class WorkerDraining(WorkerError):
    """The worker finishes what it has and takes nothing new."""

    status = 503
    code = "worker_draining"
    retry_after_s = 1.0


class EngineFailed(WorkerError):
    """The engine raised; the message is its own."""

    status = 500
    code = "engine_failed"


class NoPath(PenstockError):
    """No links lead from one device to another."""


class WireError(PenstockError):
    """Messages between processes."""

    status = 502


class ConnectionLost(WireError):
    """The peer is gone, or frames went missing."""


class Refused(WireError):
    """Wrong token, wrong protocol, or nobody listens."""


class FrameTooLarge(WireError):
    """A frame over the limit; the connection is closed."""


class KvError(PenstockError):
    """KV memory."""


class OutOfBlocks(KvError):
    """The pool cannot give what was asked."""


class LeaseLost(KvError):
    """The lease lapsed or was aborted; nothing written under it counts."""


class StaleEpoch(KvError):
    """A message from, or to, an earlier incarnation of a worker."""


def _tree(root: type[PenstockError]) -> dict[str, type[PenstockError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_NAME = _tree(PenstockError)

WireForm = tuple[str, str, str | None, float | None]  # class name, message, param, retry_after_s


def to_wire(error: BaseException) -> WireForm:
    """The form in which an error crosses a process boundary. Foreign exceptions become PenstockError."""
    if not isinstance(error, PenstockError):
        return ("PenstockError", f"{type(error).__name__}: {error}", None, None)
    return (type(error).__name__, str(error), error.param, error.retry_after_s)


def from_wire(form: WireForm) -> PenstockError:
    """The error that `to_wire` saw. A name this version does not know becomes PenstockError."""
    name, message, param, retry_after_s = form
    error = _BY_NAME.get(name, PenstockError)(message)
    if param is not None:
        error.param = param
    if retry_after_s is not None:
        error.retry_after_s = retry_after_s
    return error
