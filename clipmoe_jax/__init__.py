"""CLIP-MoE in JAX: diversified multiplet upcycling of any dense CLIP (arXiv 2409.19291)."""

__version__ = "0.1.0"


_API = ("load", "LoadedClip")


def __dir__() -> list[str]:
    return [*globals(), *_API]


def __getattr__(name: str):
    if name in _API:  # not before it is asked for: importing JAX takes a second
        from clipmoe_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'clipmoe_jax' has no attribute {name!r}")
