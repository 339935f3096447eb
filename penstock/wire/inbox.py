"""What has come in on one connection, and who gets it. Shared by the backends of this port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Inbox:
    """Hands frames over in order and then, once, the end. Holds both until somebody asks for them.

    `failed` is told the reason when a receiver raises: the connection must end, since a frame was lost on it.
    """

    def __init__(self, failed: Callable[[str], None]) -> None:
        self.held_bytes = 0
        self._failed = failed
        self._held: list[bytes] = []
        self._receive: Callable[[bytes], None] | None = None
        self._ended: Callable[[str], None] | None = None
        self._is_flowing = False
        self._is_stopped = False
        self._reason: str | None = None

    def on_frame(self, receive: Callable[[bytes], None], ended: Callable[[str], None]) -> None:
        """See `wire.api.Connection`. Nothing is called before the loop's next turn."""
        self._receive, self._ended = receive, ended
        asyncio.get_running_loop().call_soon(self._flow)

    def put(self, frame: bytes) -> None:
        if self._is_stopped:
            return
        if not self._is_flowing or self._receive is None:
            self._held.append(frame)
            self.held_bytes += len(frame)
            return
        try:
            self._receive(frame)
        except Exception as error:
            self.stop()
            message = "a receiver of frames failed; its connection ends"
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
            self._failed(f"the receiver failed: {error!r}")

    def stop(self) -> None:
        """No frame will be handed over any more, only the end."""
        self._is_stopped = True
        self._held.clear()
        self.held_bytes = 0

    def end(self, reason: str) -> None:
        """Nothing more comes. Only the first call counts."""
        if self._reason is not None:
            return
        self._reason = reason
        if self._is_flowing and self._ended is not None:
            self._ended(reason)

    def _flow(self) -> None:
        if self._is_flowing:
            return
        self._is_flowing = True
        held, self._held, self.held_bytes = self._held, [], 0
        for frame in held:
            self.put(frame)
        if self._reason is not None and self._ended is not None:
            self._ended(self._reason)
