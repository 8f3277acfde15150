"""What JAX compiles, and in which thread."""

import contextlib
import threading
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def recorded(function: str) -> Iterator[list[str]]:
    """Yields a list that gets a thread's name whenever a jitted function of this name compiles there.

    What other tests compiled is forgotten before.
    """
    threads: list[str] = []

    def record(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("/backend_compile_duration") and kwargs.get("fun_name") == f"jit({function})":
            threads.append(threading.current_thread().name)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield threads
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
