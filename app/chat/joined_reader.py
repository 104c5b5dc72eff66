"""Joins the events of several jobs, one for each prompt of a request, into those of one."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from app.chat.response import ChatEventReader, RequestReader
from app.dispatch.event_reader import CHECK_S
from app.dispatch.timings import Timings
from protocol.events import Delta, Echo, Event, Finished, Usage


class ClosableReader(RequestReader, Protocol):
    """The part of app.dispatch.event_reader.EventReader that is needed here."""

    timings: Timings

    def close(self) -> None: ...


class JoinedReader:
    """The events of all prompts, as they arrive: choice `index` of prompt `place` has the index
    `place * n + index`.

    One Finished comes last, with the sum of all usage. Implements app.dispatch.event_reader.Reader. The
    readers must share a signal and their timings (app.dispatch.dispatcher.Dispatcher.begin_all). `close`
    cancels all prompts that are not finished.
    """

    def __init__(self, readers: Sequence[ClosableReader], n: int, *, first_checks: bool = False) -> None:
        """`first_checks`: the first job validates all prompts, and so no event is returned before its own."""
        self._readers = readers
        self._n = n
        self._open = {place: ChatEventReader(reader, n) for place, reader in enumerate(readers)}
        self._held: list[Event] | None = [] if first_checks else None
        """Events of other jobs, while the first one validates their prompts."""
        self._usage = Usage(0, 0)
        self.timings = readers[0].timings
        self.finished = False

    def next_events(self) -> list[Event]:
        """Return the events since the last call; an empty list after a second of silence.

        Raises what the first reader that fails raises.
        """
        gained = self._arrived(0)
        if not gained:
            # the signal that the readers share also wakes this one for events of the others
            gained = self._arrived(CHECK_S)
        if self._held is not None:
            self._held += gained
            if not any(isinstance(event, Echo | Delta) and event.index < self._n for event in self._held):
                return []
            gained, self._held = self._held, None
        if not self._open:
            self.finished = True
            gained.append(Finished(self._usage))
        return gained

    def close(self) -> None:
        """Stop listening. May be called more than once."""
        # the first one decides whether the request counts as finished
        for reader in sorted(self._readers, key=lambda reader: reader.finished):
            reader.close()

    def _arrived(self, wait_s: float) -> list[Event]:
        """Return what has arrived; wait up to `wait_s` for the first."""
        gained = []
        for place, reader in list(self._open.items()):
            for event in reader.next_events(wait_s):
                gained += self._renumbered(event, place)
            wait_s = 0
            if reader.finished:
                del self._open[place]
        return gained

    def _renumbered(self, event: Event, place: int) -> list[Event]:
        first = place * self._n
        if isinstance(event, Echo):
            return [msgspec.structs.replace(event, index=first + index) for index in range(self._n)]
        if isinstance(event, Delta):
            return [msgspec.structs.replace(event, index=first + event.index)]
        if isinstance(event, Finished):
            self._usage = self._usage.plus(event.usage)
            return []
        return [event]
