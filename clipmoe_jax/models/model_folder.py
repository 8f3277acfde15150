"""A model on disk: a folder with `model.json` (the architecture) and `params/`."""

import json
from collections.abc import Callable

from etils import epath

from clipmoe_jax.core import artifacts, checkpoints, trees
from clipmoe_jax.core.paths import absolute
from clipmoe_jax.models.clip import ClipConfig, abstract_params

MODEL_FILE, PARAMS = "model.json", "params"


def save_model(path: epath.Path, config: ClipConfig, params: trees.Params) -> None:
    """Writes a model folder; `params` may be sharded. Overwrites what a killed run left there."""
    path = absolute(path)
    path.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path / MODEL_FILE, config.to_dict())
    checkpoints.save_params(path / PARAMS, params)


def read_config(path: epath.Path) -> ClipConfig:
    """Returns the architecture of a model folder. Raises FileNotFoundError if the folder holds no model."""
    if not (path / MODEL_FILE).exists():
        raise FileNotFoundError(f"{path} is not a model folder: it has no {MODEL_FILE}")
    return ClipConfig.from_dict(json.loads((path / MODEL_FILE).read_text()))


def load_model(
    path: epath.Path, place: Callable[[trees.Params], dict] | None = None
) -> tuple[ClipConfig, dict]:
    """Returns the architecture and the params of a model folder.

    place: maps a tree of ShapeDtypeStructs to shardings; None loads numpy arrays.
    Raises FileNotFoundError if the folder holds no model.
    """
    config = read_config(absolute(path))
    return config, checkpoints.load_params(absolute(path) / PARAMS, abstract_params(config), place)
