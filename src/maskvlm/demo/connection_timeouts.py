"""How long a connection may stall. uvicorn waits forever for the head of a request, and for an answer to be read."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # for a request's head, from its first byte; for the first request, from opening the connection
READ_SECONDS = 30.0  # in which a browser must read some of the answer


class Hurried(H11Protocol):
    """Ends stalled connections to make room for others."""

    late: asyncio.TimerHandle | None = None  # fires if the head takes too long
    unread: asyncio.TimerHandle | None = None  # fires if nothing is read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def watch(self) -> None:
        """Start or stop the timer of a head, which runs until the head is complete, however many pieces it comes in."""
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self.late is None:
            self.late = self.loop.call_later(HEAD_SECONDS, self.stand_still)
        elif not waiting and self.late is not None:
            self.late.cancel()
            self.late = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(READ_SECONDS, self.stand_still)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread is not None:
            self.unread.cancel()

    def timeout_keep_alive_handler(self) -> None:
        self.stand_still()

    def stand_still(self) -> None:
        """End the connection at once: a close would first wait until everything written is read."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for each in (self.late, self.unread):
            if each is not None:
                each.cancel()
