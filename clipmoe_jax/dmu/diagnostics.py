"""Writes the diagnostics of a CLIP-MoE to files, for a report to show.

Letters: n examples, H, W image height and width, I images, T captions, d embedding, M MoE blocks, L length,
G patches along a side.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from clipmoe_jax.analysis.cost import counted_costs
from clipmoe_jax.analysis.expert_difference import expert_difference
from clipmoe_jax.analysis.neighbours import Features, neighbours
from clipmoe_jax.analysis.routing import changed_routing, route_by_model, routing_tables, top1_experts
from clipmoe_jax.analysis.words import token_texts
from clipmoe_jax.core import artifacts, distributed, trees
from clipmoe_jax.models.clip import Clip, ClipConfig

Batches = Iterable[Mapping[str, Any]]  # of a loader, captions not packed


def write_routing(
    folder: epath.Path, model: Clip, params: trees.Params, batches: Batches, mesh: Mesh
) -> None:
    """Writes routing.json: load, entropy, gates, co-activation, load by position and by kind of word.

    Of each tower and MoE layer. params on the mesh; batches as the loader's.
    """
    sums = route_by_model(model, params, batches, mesh)
    artifacts.write_json(folder / "routing.json", routing_tables(sums, model.config))


def write_routing_change(
    folder: epath.Path,
    model: Clip,
    params: trees.Params,
    before: trees.Params,
    batches: Batches,
    mesh: Mesh,
) -> None:
    """Writes routing_change.json: {tower: share of tokens whose experts changed since `before`, by MoE
    layer}.

    before: params of an earlier checkpoint; other arguments as for `write_routing`.
    """
    changes = changed_routing(model, params, before, batches, mesh)
    artifacts.write_json(folder / "routing_change.json", changes)


def write_experts(
    folder: epath.Path, model: Clip, params: trees.Params, batches: Batches, mesh: Mesh
) -> None:
    """Writes experts.json: differences of experts' outputs and weights. Arguments as for `write_routing`."""
    artifacts.write_json(folder / "experts.json", expert_difference(model, params, batches, mesh))


def write_heat_maps(
    folder: epath.Path,
    model: Clip,
    params: trees.Params,
    images: np.ndarray,
    tokens: np.ndarray,
    captions: Sequence[str],
    records: Sequence[int] | np.ndarray,
    mesh: Mesh,
    batch_size: int = 1,
) -> None:
    """Writes heat_maps.npz and heat_maps.json: some examples, and the top-1 expert of each of their tokens.

    images (n, H, W, 3) uint8, tokens (n, L) int32 of the n captions, records: the numbers of the images;
    batch_size as of `top1_experts`. The npz has images, tokens, visual_experts int8 (n, M, G, G) and
    text_experts int8 (n, M, L), -1 after the end token; the json caption, words (the text of each token up to
    the end token) and record.
    """
    visual, text = top1_experts(model, params, images, tokens, mesh, batch_size)
    if distributed.is_main():
        packed = io.BytesIO()
        np.savez_compressed(packed, images=images, visual_experts=visual, text_experts=text, tokens=tokens)
        (folder / "heat_maps.npz").write_bytes(packed.getvalue())
    examples = [
        {"caption": caption, "words": token_texts(ids), "record": int(record)}
        for caption, ids, record in zip(captions, tokens, records, strict=True)
    ]
    artifacts.write_json(folder / "heat_maps.json", examples)


def write_cost(folder: epath.Path, architectures: Mapping[str, ClipConfig], length: int) -> None:
    """Writes cost.json: parameters and FLOPs of each model, captions of `length` tokens
    (`cost.counted_costs`)."""
    costs = {title: counted_costs(architecture, length) for title, architecture in architectures.items()}
    artifacts.write_json(folder / "cost.json", costs)


def write_neighbours(
    folder: epath.Path,
    base_features: Features,
    moe_features: Features,
    captions: Sequence[str],
    image_of_text: np.ndarray,
    count: int = 8,
) -> None:
    """Writes neighbours.json: images whose caption one model finds and the other does not (`neighbours`)."""
    examples = neighbours(base_features, moe_features, captions, image_of_text, count)
    artifacts.write_json(folder / "neighbours.json", examples)
