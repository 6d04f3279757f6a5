"""Around a run: signals, the first cause of a failure, and our own log."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron_vespo.config import ConfigError
from megatron_vespo.types import Interrupted, RunError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Stop:
    """SIGINT and SIGTERM: the first ends the run after the step in progress, the second at once."""

    def __init__(self) -> None:
        self.requested = False
        self.gently: Callable[[], object] | None = None
        """How to ask for the gentle end; None while no step is in progress: the first signal then ends at once."""

    def on_signals(self, at_once: Callable[[], object], tell: Callable[[str], None]) -> None:
        """Install the handlers in the running event loop."""

        def handle(number: signal.Signals) -> None:
            if self.requested or self.gently is None:
                at_once()
                return
            self.requested = True
            tell(f"{number.name}: ending after the step in progress, then saving; once more to end at once")
            self.gently()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, handle, number)


def run(main: Callable[[Stop], Awaitable[T]], tell: Callable[[str], None]) -> T:
    """asyncio.run with our signals, and the first cause instead of an exception group.

    Raises:
        Interrupted: a signal ended it at once.
    """

    collect_rarely()

    async def guarded() -> T:
        stop, task = Stop(), asyncio.current_task()
        assert task is not None
        stop.on_signals(task.cancel, tell)
        try:
            return await main(stop)
        except asyncio.CancelledError:
            raise Interrupted("stopped at once, in the middle of what was being done") from None

    try:
        return asyncio.run(guarded())
    except Interrupted:
        raise
    except Exception as error:
        logger.info("the run failed", exc_info=True)  # to the log file; the person gets the message
        cause = _cause(error)
        if cause is error:
            raise
        raise cause from error


def collect_rarely() -> None:
    """Have Python look for cycles less often; call it after the imports.

    Responses hold many small objects that live long and form no cycles.  By default all of them are gone through again and
    again, each time for a third of a second (benchmarks/controller.py).
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 1_000)


def _cause(error: Exception) -> BaseException:
    """The first RunError or ConfigError among the leaves of an exception group, else its first leaf."""
    leaves = list(_leaves(error))
    return next((leaf for leaf in leaves if isinstance(leaf, RunError | ConfigError)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for child in error.exceptions:
            yield from _leaves(child)
    else:
        yield error


@contextlib.contextmanager
def logging_to(file: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Our own log goes to `file`, its warnings also to the person."""

    class Tell(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.getMessage())

    to_file, to_person = logging.FileHandler(file), Tell(logging.WARNING)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    ours = logging.getLogger("megatron_vespo")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handlers = (to_file, to_person)
    for handler in handlers:
        ours.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            ours.removeHandler(handler)
        to_file.close()
