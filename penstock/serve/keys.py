"""API keys: whether a client may ask, and on behalf of which tenant. Used by `frontend`."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from penstock.errors import Unauthorized

_BEARER = b"Bearer "


class Keys:
    """`shared` is for everybody, `tenants` has the key of each tenant. Without any of them no key is needed.

    Keys are looked up by digest, so that how long it takes says nothing of how much of a guess was right.
    """

    def __init__(self, shared: str, tenants: Mapping[str, str]) -> None:
        self._tenants = {_digest(key.encode()): tenant for tenant, key in tenants.items()}
        if shared:
            self._tenants[_digest(shared.encode())] = ""

    def find_tenant(self, headers: Mapping[bytes, bytes]) -> str:
        """Whom the request's key belongs to; empty for the shared key, and where no key is needed.

        Raises Unauthorized.
        """
        if not self._tenants:
            return ""
        given = headers.get(b"authorization", b"")
        tenant = self._tenants.get(_digest(given.removeprefix(_BEARER))) if given.startswith(_BEARER) else None
        if tenant is None:
            problem = "the API key is wrong" if given else "this server needs an API key"
            raise Unauthorized(f"{problem}; send the header Authorization: Bearer KEY")
        return tenant


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
