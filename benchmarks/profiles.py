"""Reads JAX's profiles: a step's kernels on a GPU, and what a compilation is made of."""

import collections
import contextlib
import pathlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.profiler import ProfileData

NUM_LARGEST = 60


def trace(folder: str, *, device: bool = True) -> contextlib.AbstractContextManager[None]:
    """Profiles what is within into a folder, without Python's own calls, which take time.

    device: its kernels too. A compiler that tries kernels out should not have them profiled.
    """
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.device_tracer_level = int(device)
    return jax.profiler.trace(folder, profiler_options=options)


def kernels(folder: str, num_steps: int) -> dict[str, Any]:
    """Returns the milliseconds and launches of a step by kernel, the largest first."""
    spent, launches = collections.Counter[str](), collections.Counter[str]()
    for plane in _read(folder).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                spent[event.name] += event.duration_ns / 1e6 / num_steps
                launches[event.name] += 1
    largest = [
        {"kernel": name[:120], "milliseconds": round(ms, 3), "launches": launches[name] / num_steps}
        for name, ms in spent.most_common(NUM_LARGEST)
    ]
    total = {"busy milliseconds": spent.total(), "launches": launches.total() / num_steps}
    return total | {"kernels": largest}


def parts(folder: str) -> list[dict[str, Any]]:
    """Returns the seconds of the host by what it did, the largest first, and how often.

    What is within something else does not count as it. Seconds of threads add up, also of those that wait:
    XLA's main thread for the ones that make kernels, for example.
    """
    spent, counts = collections.Counter[str](), collections.Counter[str]()
    for plane in _read(folder).planes:
        if not plane.name.startswith("/host:"):
            continue
        for line in plane.lines:
            around: list[tuple[str, float]] = []  # names and ends
            for event in sorted(line.events, key=lambda event: (event.start_ns, -event.duration_ns)):
                while around and around[-1][1] <= event.start_ns:
                    around.pop()
                name = re.split(r"#|(?<!:):(?!:)", event.name)[0]  # what follows is of one event
                if around:
                    spent[around[-1][0]] -= event.duration_ns / 1e9
                spent[name] += event.duration_ns / 1e9
                counts[name] += 1
                around.append((name, event.start_ns + event.duration_ns))
    return [
        {"part": name[:120], "seconds": round(seconds, 3), "times": counts[name]}
        for name, seconds in spent.most_common(NUM_LARGEST)
    ]


def _read(folder: str) -> "ProfileData":
    """Reads the one profile of a folder."""
    import jax

    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    return jax.profiler.ProfileData.from_file(str(path))
