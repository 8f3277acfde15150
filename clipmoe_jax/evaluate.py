"""Evaluates any model that `clipmoe_jax.load` takes.

    python -m clipmoe_jax.evaluate --model=runs/demo/moe/params --data=runs/demo/data/test
    python -m clipmoe_jax.evaluate --model=ViT-L-14.pt --data='zero_shot:data/imagenet?classes=imagenet' \\
        --data=mmvp:MMVP_VLM --data='knn:data/cifar10_test?train=data/cifar10_train' --out=numbers.json

--data is KIND:PATH?option=value, a line of `clipmoe_jax.evaluation.evaluations`; a path alone is a prepared
data set for retrieval. --experts evaluates each expert of a CLIP-MoE alone, too, as the dense model it came
from. --cost measures latency, throughput and memory of encoding, with --experts of one expert alone in turns.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.analysis.cost import costs
from clipmoe_jax.core import artifacts, cli, distributed, sharding, trees
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import Encoder
from clipmoe_jax.evaluation.evaluations import Evaluation, open_applicable, parse_evaluation
from clipmoe_jax.evaluation.subject import ModelSubject
from clipmoe_jax.interop.load import Loaded, read_model
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.reporting.text_tables import format_cost, format_models


def evaluate(
    model: Loaded,
    evaluations: Sequence[Evaluation],
    *,
    experts: bool = False,
    batch_size: int = 256,
    config: ConfigDict | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {name: {line: {metric: value}}}; name is "model", with `experts` also "expert 0", ….

    Args:
        model: of both towers, its params on the mesh of all devices (`read`).
        evaluations: what to measure.
        experts: whether to evaluate each expert alone too, as the dense model it came from.
        batch_size: images or texts at a time.
        config: a run's, by which the model is computed; None is the default one for this model.

    Raises:
        ValueError: a model without text tower, or experts of a dense one.
    """
    tokenizer = Tokenizer(_context_length(model), parse_special_tokens=False)
    config = config or configs.config_of_model(model.config)
    mesh = sharding.make_mesh()
    numbers = {}
    for name, (architecture, params) in _models(model, experts):
        clip = Clip(architecture, configs.compute_config(config, sharding.platform()))
        subject = ModelSubject(
            Encoder(clip, params, mesh, batch_size), tokenizer, architecture.vision.image_size
        )
        numbers[name] = {evaluation.line: evaluation.measure(subject) for evaluation in evaluations}
    return numbers


def measure_cost(
    model: Loaded, *, experts: bool = False, config: ConfigDict | None = None
) -> dict[str, dict[str, Any]]:
    """Returns {name: numbers of `cost.costs`}, of "model" and with `experts` of "expert 0", timed in turns.

    Images are noise and captions short, padded as they always are. Raises ValueError as `evaluate`.
    """
    size, length = model.config.vision.image_size, _context_length(model)
    config = config or configs.config_of_model(model.config)
    compute = configs.compute_config(config, sharding.platform())
    images = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    models = {
        name: (Clip(architecture, compute), params)
        for name, (architecture, params) in itertools.islice(_models(model, experts), 2)  # all cost the same
    }
    return costs(models, images, Tokenizer(length)(["a photo of a cat"]))


def _context_length(model: Loaded) -> int:
    text = model.config.text
    if text is None:
        raise ValueError(f"the model is a {model.source}: evaluations need a text tower too")
    if not text.has_clips_tokens:
        raise ValueError(f"the model is a {model.source} with tokens of its own: evaluations need CLIP's")
    return text.context_length


def _models(model: Loaded, experts: bool) -> Iterator[tuple[str, tuple[ClipConfig, trees.Params]]]:
    yield "model", (model.config, model.params)
    if experts:
        if model.config.moe is None:
            raise ValueError(f"the model is a {model.source} and has no experts")
        for e in range(model.config.moe.num_experts):
            yield f"expert {e}", expert_as_dense(model.params, model.config, e)


def read(path: str, **options) -> Loaded:
    """Reads a model as `read_model`, its params on the mesh of all devices."""
    return read_model(path, **options, place=functools.partial(sharding.put_param, sharding.make_mesh()))


def main(argv: list[str]) -> str:
    """Evaluates the model that the flags name; returns a table for each line."""
    del argv
    logging.set_verbosity(logging.WARNING)  # tfds and orbax log every file they open
    given = flags.FLAGS
    distributed.keep_compiled_programs()
    if given.out and epath.Path(given.out).exists():
        raise ValueError(f"--out={given.out} exists already: delete it or choose another file")
    if not given.data and not given.cost:
        raise ValueError("there is nothing to measure: give --data=KIND:PATH, --cost or both")
    lines = list(map(_with_kind, given.data or ()))
    # An error in them is raised before the model is read.
    evaluations, reasons = open_applicable([parse_evaluation(line) for line in lines])
    if given.out:
        epath.Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    model = read(given.model, **cli.model_options())
    numbers = (
        evaluate(model, evaluations, experts=given.experts, batch_size=given.batch_size) if lines else {}
    )
    tables = [format_models(evaluation.line, numbers) for evaluation in evaluations]
    if given.cost:
        cost = measure_cost(model, experts=given.experts)
        numbers |= {name: {**numbers.get(name, {}), "cost": of_one} for name, of_one in cost.items()}
        tables.append(format_cost(cost))
    if given.out:
        artifacts.write_json(epath.Path(given.out), {"model": given.model, "source": model.source, **numbers})
    return "\n\n".join(
        [
            f"{printable_line(given.model)}: {model.source}",
            *(f"skipped: {reason}" for reason in reasons),
            *tables,
        ]
    )


def _with_kind(line: str) -> str:
    """Returns a line of --data with the kind that a path alone stands for. "gs://…" begins with no kind."""
    return line if re.match(r"\w+:(?!//)", line) else f"retrieval:{line}"


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "Any file or folder that clipmoe_jax.load takes.")
    flags.DEFINE_multi_string("data", None, "KIND:PATH?option=value; may be given several times.")
    flags.DEFINE_bool("cost", False, "Measures latency, throughput and memory of encoding.")
    flags.DEFINE_bool("experts", False, "Also each expert of a CLIP-MoE alone.")
    flags.DEFINE_string("out", None, "A new JSON file for the numbers.")
    flags.DEFINE_integer("batch_size", 256, "Images or texts at a time.", lower_bound=1)
    cli.define_model_flags()
    flags.mark_flag_as_required("model")


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
