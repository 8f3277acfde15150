"""The beginning of programs that kill themselves at a call of a function, for tests of what is left then."""

KILLING = """
import os, signal, sys

def kill_at(module, name, call):
    original, count = getattr(module, name), 0

    def killing(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, killing)
"""
