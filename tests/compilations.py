"""What JAX compiles, and in which thread."""

import contextlib
import logging
from collections.abc import Iterator

import jax

_LOGGER = logging.getLogger("jax._src.interpreters.pxla")


@contextlib.contextmanager
def recorded(function: str) -> Iterator[list[str]]:
    """Yields a list that gets a thread's name whenever a jitted function of this name compiles there.

    Other tests may have changed the level of the root logger, or disabled this one, or compiled the function.
    """
    threads: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if f"Compiling jit({function})" in record.getMessage():
                threads.append(str(record.threadName))

    jax.clear_caches()
    recorder, level, _LOGGER.disabled = Recorder(), _LOGGER.level, False
    _LOGGER.addHandler(recorder)
    _LOGGER.setLevel(logging.WARNING)
    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        yield threads
    finally:
        jax.config.update("jax_log_compiles", False)
        _LOGGER.setLevel(level)
        _LOGGER.removeHandler(recorder)
