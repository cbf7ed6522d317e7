"""Requests to stop a run, by signals or by another host."""

import contextlib
import itertools
import logging
import signal
from typing import Any

from jax.experimental import multihost_utils

from hnet.runtime.distributed import note_step, num_hosts
from hnet.runtime.interrupts import Interrupts

log = logging.getLogger(__name__)
# Number of each query to JAX's sync point. A step number would not change during an evaluation.
_questions = itertools.count(1)


class StopRequest(contextlib.AbstractContextManager):
    """Whether this run should save and end. One object per program, queried by every loop.

    Several processes: SIGTERM to any host makes ``stop_requested`` true on all hosts at the same
    query, through JAX's preemption service (which polls about once per second). One process: its
    own handler of SIGTERM. The first Ctrl-C also requests a stop, the second one interrupts; both
    are acknowledged at once (`hnet.runtime.interrupts`).
    """

    def __init__(self):
        self._stopped = False
        self._reason: str | None = None
        self._several = num_hosts() > 1
        # With several processes JAX's own handler of SIGTERM must stay.
        numbers = [signal.SIGINT] + [signal.SIGTERM] * (not self._several)
        self._old = {number: signal.signal(number, self._on_signal) for number in numbers}
        self._interrupts = Interrupts()

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Restore the former signal handlers."""
        self._interrupts.close()
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    def request(self, reason: str) -> None:
        """Request that the whole run stops, from any host, e.g. for a time limit or an alarm."""
        self._reason = reason
        if self._several:
            signal.raise_signal(signal.SIGTERM)  # JAX passes it on to the other hosts

    def stop_requested(self, step: int) -> bool:
        """True from the agreed query on: save ``step`` and exit with REQUEUE_EXIT_CODE.

        Every host must query equally often, in train, warm-up, evaluation and sweep loops, and
        often enough for the grace period of the scheduler (once per training step, once per slice
        of an evaluation).
        """
        note_step(step)
        if not self._stopped:
            if self._several:
                self._stopped = multihost_utils.reached_preemption_sync_point(next(_questions))
            else:
                self._stopped = self._reason is not None
            if self._stopped:
                reason = self._reason or "SIGTERM to one of the hosts"
                log.warning("stop requested at step %d (%s)", step, reason)
        return self._stopped
