"""Signals: the first asks a run to end well, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from tunesmith.base import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Installs handlers for Ctrl-C and SIGTERM while a job runs, and puts the old ones back.

    Attributes:
        graceful: true while training, when a request is honoured after the step that is under way.
    """

    def __init__(self) -> None:
        self.graceful = False
        self._asked = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether somebody asked the run to end."""
        return self._asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self.graceful:
            raise Interrupted("stopped; what was committed is whole", fix="continue with --resume")
        self._asked = True
