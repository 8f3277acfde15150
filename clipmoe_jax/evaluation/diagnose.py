"""Writes the diagnostics of a CLIP-MoE to files of a folder, for a report to show.

Letters: n examples, H, W image height and width, I images, T captions, d embedding, M MoE blocks, L length,
G patches along a side.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from clipmoe_jax import artifacts, distributed, trees
from clipmoe_jax.evaluation.cost import BATCH_SIZES, costs
from clipmoe_jax.evaluation.expert_difference import expert_difference
from clipmoe_jax.evaluation.routing import changed_routing, route_by_model, routing_tables, top1_experts
from clipmoe_jax.evaluation.words import token_texts
from clipmoe_jax.models.clip import Clip

Batches = Iterable[Mapping[str, np.ndarray]]
Features = tuple[np.ndarray, np.ndarray]


def write_routing(
    folder: epath.Path, model: Clip, params: trees.Params, batches: Batches, mesh: Mesh
) -> None:
    """routing.json: load, entropy, gates, co-activation, load by position and by kind of word, for each tower
    and MoE layer. Params on the mesh, batches as the loader's."""
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
    """routing_change.json: {tower: for each MoE layer, share of tokens whose experts are others with
    `before`, the params of an earlier checkpoint}. Arguments else as of `write_routing`."""
    found = changed_routing(model, params, before, batches, mesh)
    artifacts.write_json(folder / "routing_change.json", found)


def write_experts(
    folder: epath.Path, model: Clip, params: trees.Params, batches: Batches, mesh: Mesh
) -> None:
    """experts.json: how different the experts' outputs and weights are. Arguments as of `write_routing`."""
    artifacts.write_json(folder / "experts.json", expert_difference(model, params, batches, mesh))


def write_heat_maps(
    folder: epath.Path,
    model: Clip,
    params: trees.Params,
    images: np.ndarray,
    tokens: np.ndarray,
    captions: Sequence[str],
    records: Sequence[int],
    mesh: Mesh,
) -> None:
    """heat_maps.npz and heat_maps.json: some examples, and the top-1 expert of each of their tokens.

    images (n, H, W, 3) uint8, tokens (n, L) int32 of the n captions, records: the numbers of the images. The
    npz has images, tokens, visual_experts int8 (n, M, G, G) and text_experts int8 (n, M, L), -1 after the end
    token; the json caption, words (the text of each token up to the end token) and record.
    """
    visual, text = top1_experts(model, params, images, tokens, mesh)
    if distributed.is_main():
        packed = io.BytesIO()
        np.savez_compressed(packed, images=images, visual_experts=visual, text_experts=text, tokens=tokens)
        (folder / "heat_maps.npz").write_bytes(packed.getvalue())
    examples = [
        {"caption": caption, "words": token_texts(ids), "record": int(record)}
        for caption, ids, record in zip(captions, tokens, records, strict=True)
    ]
    artifacts.write_json(folder / "heat_maps.json", examples)


def write_cost(
    folder: epath.Path,
    models: Mapping[str, tuple[Clip, trees.Params]],
    images: np.ndarray,
    tokens: np.ndarray,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = 15,
) -> None:
    """cost.json: parameters, FLOPs, latency, throughput and memory of each model (`cost.costs`)."""
    found = costs(models, images, tokens, batch_sizes=batch_sizes, rounds=rounds)
    artifacts.write_json(folder / "cost.json", found)


def write_neighbours(
    folder: epath.Path,
    base_features: Features,
    moe_features: Features,
    captions: Sequence[str],
    image_of_text: np.ndarray,
    count: int = 8,
) -> None:
    """neighbours.json: images that one model finds a caption of and the other does not (`neighbours`)."""
    found = neighbours(base_features, moe_features, captions, image_of_text, count)
    artifacts.write_json(folder / "neighbours.json", found)


def neighbours(
    base_features: Features,
    moe_features: Features,
    captions: Sequence[str],
    image_of_text: np.ndarray,
    count: int = 8,
) -> dict[str, list[dict[str, Any]]]:
    """{"clip_moe_right": examples, "base_right": examples}: at most `count` images each for which the
    CLIP-MoE ranks an own caption first and the base does not, and the reverse.

    Features: (I, d) and (T, d) float32, compared by inner product; image_of_text (T,) int. A model's margin
    on an image is the score of its best own caption less that of the best other one; the model is right where
    that is above 0 (a tie is not). First come the images on which the two margins are furthest apart; those
    for which the wrong model's first caption is an own one's text, word for word, are left out. An example is
    {"image": number, "caption": the own caption that the right model ranks first, "base", "clip_moe": [the
    caption that the model ranks first, its score]}.
    """
    image_of_text = np.asarray(image_of_text)
    ranked = {
        "base": _rank_captions(*base_features, image_of_text),
        "clip_moe": _rank_captions(*moe_features, image_of_text),
    }
    own_words, found = set(zip(image_of_text.tolist(), captions, strict=True)), {}
    for right, wrong in (("clip_moe", "base"), ("base", "clip_moe")):
        (margin, best_own, *_), (other_margin, _, taken, _) = ranked[right], ranked[wrong]
        same_words = [(i, captions[caption]) in own_words for i, caption in enumerate(taken)]
        differ = (margin > 0) & (other_margin <= 0) & ~np.array(same_words)
        apart = np.where(differ, margin - other_margin, 0)
        images = [int(i) for i in np.argsort(-apart, kind="stable")[:count] if apart[i] > 0]
        found[f"{right}_right"] = [
            {"image": i, "caption": captions[best_own[i]]}
            | {name: [captions[first[i]], float(score[i])] for name, (*_, first, score) in ranked.items()}
            for i in images
        ]
    return found


def _rank_captions(
    image_features: np.ndarray, text_features: np.ndarray, image_of_text: np.ndarray, chunk_size: int = 1024
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each image (I,): margin, best own caption, first caption of all, and that one's score."""
    parts = []
    for start in range(0, len(image_features), chunk_size):
        scores = image_features[start : start + chunk_size] @ text_features.T
        own = np.arange(start, start + len(scores))[:, None] == image_of_text[None]
        own_scores = np.where(own, scores, -np.inf)
        other_best = np.where(own, -np.inf, scores).max(axis=1)
        first = scores.argmax(axis=1)
        score = scores[np.arange(len(scores)), first]
        parts.append((own_scores.max(axis=1) - other_best, own_scores.argmax(axis=1), first, score))
    margin, best_own, first, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    return margin, best_own, first, score
