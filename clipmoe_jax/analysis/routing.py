"""The routing of a CLIP-MoE's tokens: sums over a data set, and maps of single examples.

Letters: B batch, L length, M MoE blocks, E experts, K selected experts, P places (bins of positions),
C classes of words, G patches along a side.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipmoe_jax.analysis.words import WORD_CLASSES, classes_of_tokens
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.evaluation.encoder import cache_programs
from clipmoe_jax.models.clip import METHODS, Clip, ClipConfig, TextConfig, end_position, text_mask
from clipmoe_jax.models.dispatch import gates_of_experts
from clipmoe_jax.models.moe import route
from clipmoe_jax.models.transformer import MoeConfig, first_moe_layer

Array = jax.Array

INPUTS = {"visual": "image", "text": "text"}  # a tower's name -> its inputs' in a batch
FIRST_POSITIONS = (0, 1, 5, 10, 20, 40)  # of each bin of text positions
TEXT_PLACES = ("0", "1-4", "5-9", "10-19", "20-39", "40-", "end token")


class RoutingSums(NamedTuple):
    """Sums over the tokens that count, of one batch on the device or of many on the host.

    Attributes:
        chosen_at: (M, P, E) int, slots that each expert received at each place.
        chosen_of: (M, C, E) int, slots that each expert received of each class of words.
        together: (M, E, E) int, tokens that chose both experts; on the diagonal, those that chose the expert.
        num_tokens: () int.
        entropy, top1_gate: (B, M) float32 sums of each row on the device, (M,) float64 on the host.
    """

    chosen_at: Any
    chosen_of: Any
    together: Any
    num_tokens: Any
    entropy: Any
    top1_gate: Any


def moe_layers(config: ClipConfig) -> dict[str, list[int]]:
    """Returns {tower: numbers of its MoE blocks}. Raises ValueError for a dense model."""
    moe, text = _moe(config), _text(config)
    depth = {"visual": config.vision.num_layers, "text": text.num_layers}
    return {tower: list(range(first_moe_layer(n, moe), n)) for tower, n in depth.items()}


def route_by_model(
    model: Clip, params: trees.Params, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> dict[str, RoutingSums]:
    """Returns {tower: sums over all batches, exact integers and float64}.

    params on the mesh. batches: as the loader's, each process its own rows: image (B, H, W, 3),
    text (B, L) int32, valid (B,) bool. Rows that are not valid do not count, nor does padding after the end
    token. Raises ValueError if no token is left.
    """
    moe_layers(model.config)
    totals: dict[str, RoutingSums] = {}
    for tower, arrays in placed_inputs(batches, mesh):
        with jax.set_mesh(mesh):
            logits = make_logits(model, tower)(params, arrays["inputs"])
            on_device = sharding.replicate(mesh, _make_sums(model.config, tower)(logits, arrays))
        sums = RoutingSums(*map(_on_host, on_device))
        sums = sums._replace(entropy=sums.entropy.sum(axis=0), top1_gate=sums.top1_gate.sum(axis=0))
        totals[tower] = jax.tree.map(np.add, totals[tower], sums) if tower in totals else sums
    if not totals or not all(sums.num_tokens for sums in totals.values()):
        raise ValueError("routing: there is no token to count: give at least one valid image and caption")
    return totals


def routing_tables(sums: Mapping[str, RoutingSums], config: ClipConfig) -> dict[str, dict[str, Any]]:
    """Returns {tower: load, entropy (nats), top1_gate, coactivation, load_by_position, …} as lists for JSON.

    load: share of the routed slots that each expert received, f_e of `losses.load_balance`. A bin of
    positions or a class of words that no token was in is left out.
    """
    places = {
        "visual": ["class token"] + [f"row {i + 1}" for i in range(config.vision.grid)],
        "text": TEXT_PLACES,
    }
    tables = {}
    for tower, layers in moe_layers(config).items():
        of_tower = sums[tower]
        chosen = np.einsum("mee->me", of_tower.together)
        filled = of_tower.chosen_at[0].sum(axis=-1) > 0  # every layer sees the same tokens
        tables[tower] = {
            "layers": layers,
            "load": _shares(chosen),
            "entropy": (of_tower.entropy / of_tower.num_tokens).tolist(),
            "top1_gate": (of_tower.top1_gate / of_tower.num_tokens).tolist(),
            "coactivation": (of_tower.together / of_tower.num_tokens).tolist(),
            "load_by_position": _shares(of_tower.chosen_at[:, filled]),
            "bins": [place for place, there in zip(places[tower], filled, strict=True) if there],
        }
    chosen_of = sums["text"].chosen_of
    tables["text"]["load_by_word_class"] = {
        name: _shares(chosen_of[:, c]) for c, name in enumerate(WORD_CLASSES) if chosen_of[:, c].any()
    }
    return tables


def routing_sums(
    router_logits: Array, num_selected: int, mask: Array, place: Array, word: Array, num_places: int
) -> RoutingSums:
    """Returns the sums of one batch; jittable.

    router_logits (B, M, L, E) float32; mask (B, L) bool, the tokens that count; place, word (B, L) int, the
    bin of a token's position and the class of its word, -1 for none.
    """
    gates, expert_ids = route(router_logits, num_selected)
    num_experts = router_logits.shape[-1]
    chosen = jax.nn.one_hot(expert_ids, num_experts, dtype=jnp.int32).sum(axis=-2)
    chosen = chosen * mask[:, None, :, None]
    log_probabilities = jax.nn.log_softmax(router_logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)  # (B, M, L)

    def by(ids: Array, count: int) -> Array:
        return jnp.einsum("bmle,blp->mpe", chosen, jax.nn.one_hot(ids, count, dtype=jnp.int32))

    return RoutingSums(
        chosen_at=by(place, num_places),
        chosen_of=by(word, len(WORD_CLASSES)),
        together=jnp.einsum("bmle,bmlf->mef", chosen, chosen),
        num_tokens=mask.sum(dtype=jnp.int32),
        entropy=jnp.sum(entropy * mask[:, None], axis=-1),
        top1_gate=jnp.sum(gates[..., 0] * mask[:, None], axis=-1),
    )


def changed_routing(
    model: Clip,
    params: trees.Params,
    other: trees.Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, list[float]]:
    """Compares two checkpoints of a model.

    Returns {tower: for each MoE layer, share of tokens whose set of experts is not the same with `params` as
    with `other`}. Batches as for `route_by_model`.
    """
    layers = moe_layers(model.config)
    changed = {tower: np.zeros(len(of_tower), np.int64) for tower, of_tower in layers.items()}
    num_tokens = dict.fromkeys(layers, np.zeros((), np.int64))
    for tower, arrays in placed_inputs(batches, mesh):
        with jax.set_mesh(mesh):
            both = (make_logits(model, tower)(tree, arrays["inputs"]) for tree in (params, other))
            counts = sharding.replicate(mesh, _make_changed(model.config, tower)(*both, arrays))
        changed[tower] = changed[tower] + _on_host(counts[0])
        num_tokens[tower] = num_tokens[tower] + _on_host(counts[1])
    return {tower: (changed[tower] / num_tokens[tower]).tolist() for tower in changed}


def top1_experts(
    model: Clip,
    params: trees.Params,
    images: np.ndarray,
    tokens: np.ndarray,
    mesh: Mesh,
    batch_size: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the expert with the largest gate: int8 (n, M, G, G) of each patch, (n, M, L) of each token of a
    caption, -1 after the end token.

    images (n, H, W, 3) uint8, tokens (n, L) int32, the same in every process; computed as one batch
    of n, or of batch_size where that is more: that of other batches shares their program.
    """
    moe_layers(model.config)
    count, grid = len(images), model.config.vision.grid
    rows = -(-max(count, batch_size) // mesh.size) * mesh.size
    part = slice(*(rows // jax.process_count() * (jax.process_index() + i) for i in range(2)))
    batch = {"image": images, "text": tokens, "valid": np.ones(count, bool)}
    batch = {
        name: np.pad(array, [(0, rows - count)] + [(0, 0)] * (array.ndim - 1))[part]
        for name, array in batch.items()
    }
    top = {}
    for tower, arrays in placed_inputs([batch], mesh):
        with jax.set_mesh(mesh):
            logits = make_logits(model, tower)(params, arrays["inputs"])
            experts = sharding.replicate(mesh, _make_top1(model.config, tower)(logits, arrays))
        top[tower] = np.asarray(experts, np.int8)[:count]
    visual = top["visual"][:, :, 1:]  # the class token is no place in the image
    return visual.reshape(*visual.shape[:2], grid, grid), top["text"]


def placed_inputs(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yields (tower, its arrays on the mesh) of each batch: inputs, valid and, of text, word (B, L) int8."""
    for batch in batches:
        sharding.check_batch(mesh, len(batch["valid"]) * jax.process_count())
        for tower, name in INPUTS.items():
            arrays = {"inputs": batch[name], "valid": batch["valid"]}
            if tower == "text":
                arrays["word"] = classes_of_tokens(batch[name])
            yield tower, sharding.put_batch(mesh, arrays)


def token_mask(config: ClipConfig, tower: str, arrays: Mapping[str, Array]) -> Array:
    """Marks the tokens that count, (B, L) bool: those of valid rows, of text none after the end token."""
    valid = arrays["valid"][:, None]
    if tower == "text":
        return text_mask(arrays["inputs"], _text(config).eos_token_id) & valid
    return jnp.broadcast_to(valid, (len(valid), config.vision.grid**2 + 1))


def _places(config: ClipConfig, tower: str, inputs: Array) -> tuple[Array, int]:
    """Returns the bin of each token's position, (B, L) int32, and the number of bins."""
    if tower == "visual":
        grid = config.vision.grid
        row = jnp.concatenate([jnp.zeros(1, jnp.int32), 1 + jnp.arange(grid**2) // grid])
        return jnp.broadcast_to(row, (len(inputs), len(row))), grid + 1
    position = jnp.arange(inputs.shape[1])
    place = jnp.searchsorted(jnp.array(FIRST_POSITIONS), position, side="right") - 1
    end = end_position(inputs, _text(config).eos_token_id)[:, None]
    return jnp.where(position == end, len(FIRST_POSITIONS), place), len(TEXT_PLACES)


@cache_programs
def make_logits(model: Clip, tower: str) -> Callable[[trees.Params, Array], Array]:
    """Returns a jitted (params, inputs (B, …)) -> router logits (B, M, L, E), which every analysis of routing
    shares: one program of the model for each tower."""

    def logits(params, inputs):
        outputs: Any = model.apply({"params": params}, inputs, method=METHODS[INPUTS[tower]])
        return outputs[1]["router_logits"]

    return jax.jit(logits)


@cache_programs
def make_patch_gates(model: Clip) -> Callable[[trees.Params, Array], Array]:
    """Returns a jitted (params, images (B, H, W, 3)) -> gates of patches (B, M, G, G, E) float32, 0 of those
    experts that a patch does not use. Raises ValueError for a dense model."""
    moe, grid = _moe(model.config), model.config.vision.grid

    def gates(params, images):
        logits = make_logits(model, "visual")(params, images)[:, :, 1:]  # without the class token
        of_experts = gates_of_experts(*route(logits, moe.num_selected_experts), moe.num_experts)
        return of_experts.reshape(*logits.shape[:2], grid, grid, moe.num_experts)

    return jax.jit(gates)


@functools.cache
def _make_sums(config: ClipConfig, tower: str) -> Callable[[Array, dict[str, Array]], RoutingSums]:
    def sums(logits, arrays):
        mask = token_mask(config, tower, arrays)
        place, num_places = _places(config, tower, arrays["inputs"])
        word = arrays.get("word", jnp.full(mask.shape, -1))
        return routing_sums(logits, _moe(config).num_selected_experts, mask, place, word, num_places)

    return jax.jit(sums)


@functools.cache
def _make_changed(config: ClipConfig, tower: str) -> Callable[..., tuple[Array, Array]]:
    """Returns a jitted function of two checkpoints' logits: (tokens (M,) int32 whose set of experts differs,
    tokens () int32)."""

    def changed(logits, other, arrays):
        mask = token_mask(config, tower, arrays)

        def sets(logits):  # (B, M, L, E) of 0 and 1
            _, expert_ids = route(logits, _moe(config).num_selected_experts)
            return jax.nn.one_hot(expert_ids, logits.shape[-1], dtype=jnp.int32).sum(axis=-2)

        differs = jnp.any(sets(logits) != sets(other), axis=-1) & mask[:, None]
        return differs.sum(axis=(0, 2), dtype=jnp.int32), mask.sum(dtype=jnp.int32)

    return jax.jit(changed)


@functools.cache
def _make_top1(config: ClipConfig, tower: str) -> Callable[[Array, dict[str, Array]], Array]:
    def top1(logits, arrays):
        mask = token_mask(config, tower, arrays)
        return jnp.where(mask[:, None], route(logits, 1)[1][..., 0], -1)

    return jax.jit(top1)


def _moe(config: ClipConfig) -> MoeConfig:
    if config.moe is None:
        raise ValueError("the model is dense: it has no experts; give the CLIP-MoE (WORKDIR/moe/params)")
    return config.moe


def _text(config: ClipConfig) -> TextConfig:
    if config.text is None:
        raise ValueError("the model has no text tower")
    return config.text


def _on_host(array: Array) -> np.ndarray:
    on_host = np.asarray(array)
    return on_host.astype(np.float64 if on_host.dtype == np.float32 else np.int64)


def _shares(counts: np.ndarray) -> list:
    """Returns integers as shares of their sum over the last axis."""
    return (counts / counts.sum(axis=-1, keepdims=True)).tolist()
