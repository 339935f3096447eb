"""What a client wishes beside an answer: where, how urgently, on whose behalf. From headers; used by `frontend`.

    x-penstock-require: zone=a,rack=b    workers without these labels do not get the request
    x-penstock-prefer: rack=b,zone=a     workers with these had better get it; the first matters most
    x-penstock-session: anything         requests of one session meet at one worker, unless that is busy
    x-penstock-timeout: 2.5              seconds for the whole answer
    x-penstock-tenant: acme              whose share of the server this uses; an API key may say it instead

The session may also come in the headers of other routers, or as the body's `prompt_cache_key`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from penstock.errors import BadRequest
from penstock.request import Constraints, Label
from penstock.serve.asks import Ask

Headers = Mapping[bytes, bytes]

MAX_LABELS = 8
REQUIRE, PREFER, SESSION = b"x-penstock-require", b"x-penstock-prefer", b"x-penstock-session"
TIMEOUT, TENANT = b"x-penstock-timeout", b"x-penstock-tenant"
SESSION_HEADERS = (SESSION, b"x-dynamo-session-id", b"x-smg-routing-key")
_LABEL = re.compile(rb"([A-Za-z0-9._/-]{1,128})=([A-Za-z0-9._/:-]{1,128})")
_NAME = re.compile(rb"[A-Za-z0-9._:@=+/-]{1,128}")


def constraints_of(headers: Headers, ask: Ask, tenant: str, adapter: str) -> Constraints:
    """Where the request may go and should. `tenant` is whom the API key belongs to, if it belongs to one.

    Raises BadRequest for what cannot be understood.
    """
    session = next((name for name in SESSION_HEADERS if name in headers), None)
    return Constraints(
        require=_labels(headers, REQUIRE),
        prefer=_labels(headers, PREFER),
        session=_name(headers, session) if session is not None else ask.session,
        adapter=adapter,
        tenant=tenant or _name(headers, TENANT),
        priority=ask.priority,
    )


def timeout_of(headers: Headers, most_s: float) -> float:
    """Seconds for the answer, at most `most_s`. Raises BadRequest."""
    given = headers.get(TIMEOUT)
    if given is None:
        return most_s
    try:
        wanted_s = float(given)
    except ValueError:
        wanted_s = math.nan
    if not wanted_s > 0:
        raise _bad(TIMEOUT, f"{_shown(given)} is no number of seconds above 0")
    return min(wanted_s, most_s)


def _labels(headers: Headers, header: bytes) -> tuple[Label, ...]:
    given = headers.get(header)
    if given is None:
        return ()
    parts = [part.strip() for part in given.split(b",")]
    if len(parts) > MAX_LABELS:
        raise _bad(header, f"{len(parts)} labels are more than the {MAX_LABELS} that may be named")
    return tuple(_label(header, part) for part in parts)


def _label(header: bytes, part: bytes) -> Label:
    if (found := _LABEL.fullmatch(part)) is None:
        raise _bad(header, f"{_shown(part)} is no label; write them as zone=a,rack=b")
    return found[1].decode(), found[2].decode()


def _name(headers: Headers, header: bytes) -> str:
    given = headers.get(header, b"")
    if given and _NAME.fullmatch(given) is None:
        raise _bad(header, f"{_shown(given)} is no name of up to 128 letters, digits and ._:@=+/-")
    return given.decode()


def _bad(header: bytes, problem: str) -> BadRequest:
    return BadRequest(f"{header.decode()}: {problem}", header.decode())


def _shown(given: bytes) -> str:
    return repr(given[:60].decode(errors="replace"))
