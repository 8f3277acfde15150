"""The MoE block: hand numbers for the router, one contract for three dispatches, exactness under a mesh."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiles
from grids import exhaustive, grid, quick
from jax import lax
from jax.sharding import PartitionSpec

from clipmoe_jax.core import sharding
from clipmoe_jax.models import dispatch
from clipmoe_jax.models.dropout import Dropout, random_bits
from clipmoe_jax.models.experts import NARROW_BLOCK, WIDE_BLOCK, make_grouped_mlp
from clipmoe_jax.models.feed_forward import ACTIVATIONS, HIDDEN, FeedForward, Weights, quick_gelu
from clipmoe_jax.models.moe import MoeMlp, route

EXACT = {
    "dense": {"dispatch": "dense"},
    "ragged": {"dispatch": "ragged"},
    "ragged by fixed blocks": {"dispatch": "ragged", "grouped_mlp": "fixed_blocks"},
    "ragged by ragged_dot": {"dispatch": "ragged", "grouped_mlp": "ragged_dot"},
    "ragged by tiles": {"dispatch": "ragged", "grouped_mlp": "tiles"},
    "capacity": {"dispatch": "capacity", "capacity_factor": 2.0},  # 2 = E / K never drops
}
N, D, F, E, K = 2 * 13, 8, 12, 4, 2
GROUPED_MLPS = ("blocks", "fixed_blocks", "ragged_dot", "tiles")
IDENTITY = FeedForward(lambda h: h)
WORDS = np.array([2654435769, 42], np.uint32)


@pytest.fixture(autouse=True)
def written_out_tiles(monkeypatch):
    tiles.write_out(monkeypatch)


def make_layer(**fields):
    return MoeMlp(E, K, F, quick_gelu, **fields)


@pytest.fixture(scope="module")
def params():
    params = make_layer().init(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, 13, D))


def test_bias_by_gate_is_the_same_as_a_sum():
    """What GPUs run in place of a product, values and gradients."""
    gates, bias, dy = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(N, E), (E, D), (N, D)])
    )

    def run(function):
        y, pull_back = jax.vjp(function, gates, bias)
        return y, *pull_back(dy)

    chex.assert_trees_all_close(run(dispatch._sum_of_products), run(jnp.matmul), atol=1e-5)


def test_route_by_hand():
    # softmax(ln [1, 2, 4, 1]) = [1, 2, 4, 1] / 8; the two largest are 4/8 and 2/8, divided by 6/8.
    gates, expert_ids = route(jnp.log(jnp.array([[1.0, 2.0, 4.0, 1.0]])), 2)
    np.testing.assert_allclose(gates, [[4 / 6, 2 / 6]], rtol=1e-6)
    np.testing.assert_array_equal(expert_ids, [[2, 1]])


def reference(params, x):
    """Token by token with numpy."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    y = np.zeros(x.shape)
    for b, position in np.ndindex(x.shape[:2]):
        token = np.asarray(x[b, position], np.float64)
        probabilities = np.exp(token @ p["router"]["kernel"])
        probabilities /= probabilities.sum()
        chosen = np.argsort(-probabilities)[:K]
        for e in chosen:
            h = token @ p["c_fc"]["kernel"][e] + p["c_fc"]["bias"][e]
            h = h / (1 + np.exp(-1.702 * h))
            out = h @ p["c_proj"]["kernel"][e] + p["c_proj"]["bias"][e]
            y[b, position] += probabilities[e] / probabilities[chosen].sum() * out
    return y


@pytest.mark.parametrize(
    "name", grid("dense", "ragged", "capacity", rest=["ragged by fixed blocks", "ragged by ragged_dot"])
)
def test_values_equal_a_loop_over_tokens(params, x, name):
    y, aux = make_layer(**EXACT[name]).apply({"params": params}, x)
    np.testing.assert_allclose(y, reference(params, x), rtol=2e-4, atol=2e-4)
    chex.assert_shape(aux["router_logits"], (2, 13, E))
    np.testing.assert_array_equal(aux["dropped_slots"], [0, 0])


def test_routers_see_their_token_and_the_mean_of_its_sequence(params, x):
    """Of a row, or of its tokens of the same number; both with centred absolute values."""
    kernel = np.random.default_rng(0).normal(size=(2 * x.shape[-1], E))
    params = params | {"router": {"kernel": kernel.astype(np.float32)}}
    sequences = np.array([[0] * 5 + [1] * 8, [2, 1] * 6 + [2]])
    for given in (None, sequences):
        layer = make_layer(sequence_share=2.0)
        logits = layer.apply({"params": params}, x, sequences=given)[1]["router_logits"]
        numbers = np.zeros_like(sequences) if given is None else given
        for b, position in np.ndindex(x.shape[:2]):
            absolute = np.abs(x[b])
            seen = np.concatenate([x[b], absolute - absolute.mean(axis=1, keepdims=True)], axis=1)
            mean = seen[numbers[b] == numbers[b, position]].mean(axis=0)
            expected = (seen[position] + 2 * mean) @ kernel
            np.testing.assert_allclose(logits[b, position], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "dense"])
def test_gradients_equal_the_dense_dispatch(params, x, name):
    """With respect to inputs, router and experts."""
    target = jax.random.normal(jax.random.key(2), x.shape)

    def gradients(name):
        layer = make_layer(**EXACT[name])
        return jax.jit(
            jax.grad(lambda p, x: jnp.sum(layer.apply({"params": p}, x)[0] * target), argnums=(0, 1))
        )(params, x)

    chex.assert_trees_all_close(gradients(name), gradients("dense"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", grid("dense", rest=[name for name in EXACT if name != "dense"]))
def test_straight_through_keeps_values_and_takes_the_gradient_of_all_experts(params, x, name):
    """The router's gradient is that of the softmax over all, at the output of the chosen ones."""
    target = jax.random.normal(jax.random.key(2), x.shape)

    def value_and_gradients(layer):
        def loss(params, x):
            return jnp.sum(layer.apply({"params": params}, x)[0] * target)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    chosen, (of_chosen, _) = value_and_gradients(make_layer(**EXACT[name]))
    value, (gradients, _) = value_and_gradients(make_layer(router_gradient="all", **EXACT[name]))
    of_all = value_and_gradients(MoeMlp(E, E, F, quick_gelu, **EXACT[name]))[1][0]
    np.testing.assert_allclose(value, chosen, rtol=1e-5)
    chex.assert_trees_all_close(gradients["router"], of_all["router"], rtol=1e-4, atol=1e-4)
    assert np.abs(of_chosen["router"]["kernel"] - of_all["router"]["kernel"]).max() > 0.1
    experts = {name: gradients[name] for name in ("c_fc", "c_proj")}
    expected = {name: of_chosen[name] for name in ("c_fc", "c_proj")}
    chex.assert_trees_all_close(experts, expected, rtol=1e-4, atol=1e-4)


def test_a_router_leaves_experts_of_one_kind_by_straight_through_alone():
    """Two experts are wrong and two right; every token begins with the wrong ones."""
    sign = jnp.array([-1.0, -1.0, 1.0, 1.0])
    params = {
        "router": {"kernel": jnp.tile(jnp.array([4.0, 4.0, 0.0, 0.0]), (D, 1))},
        "c_fc": {"kernel": jnp.zeros((E, D, F)), "bias": jnp.ones((E, F))},
        "c_proj": {"kernel": jnp.zeros((E, F, D)), "bias": jnp.tile(sign[:, None], (1, D))},
    }
    x = jnp.full((2, 13, D), 1 / D)

    def trained(layer, steps=300):
        def loss(kernel):
            y = layer.apply({"params": params | {"router": {"kernel": kernel}}}, x)[0]
            return jnp.mean(jnp.square(y - 1))

        step = jax.jit(lambda kernel: kernel - jax.grad(loss)(kernel))
        kernel = lax.fori_loop(0, steps, lambda _, kernel: step(kernel), params["router"]["kernel"])
        return loss(kernel)

    assert trained(make_layer()) == 4
    assert trained(make_layer(router_gradient="all")) < 1e-3


GROUPS = {
    "balanced": [100, 100, 100, 100],
    "one group takes all, in wide and narrow blocks": [0, 0, 400, 0],
    "empty ends": [0, 300, 100, 0],
    "single rows": [1, 397, 1, 1],
    "rows left over": [10, 20, 30, 40],
}


def random_experts():
    shapes = (E, D, F), (E, F), (E, F, D), (E, D)
    return Weights(*(0.3 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize("sizes", quick(GROUPS, "rows left over"))
@pytest.mark.parametrize("name", GROUPED_MLPS)
def test_grouped_mlp_equals_a_layer_for_each_group(name, sizes):
    """Values, and gradients for rows, gates and experts."""
    experts, layer = random_experts(), FeedForward(quick_gelu)
    run, spare_rows, multiple = make_grouped_mlp(name, 400, experts, all_grouped=False)
    sizes = [-(-size // multiple) * multiple for size in sizes]
    used, ends = sum(sizes), np.cumsum(sizes)
    rows = jax.random.normal(jax.random.key(4), (400 + E * (multiple - 1) + spare_rows, D))
    gates = jax.random.uniform(jax.random.key(5), (len(rows), 1))

    def by_group(rows, gates, experts):
        parts = []
        for e, (end, n) in enumerate(zip(ends, sizes, strict=True)):
            h = quick_gelu(rows[end - n : end] @ experts.fc_kernel[e] + experts.fc_bias[e])
            parts.append(h * gates[end - n : end] @ experts.proj_kernel[e])
        return jnp.concatenate(parts)

    def grouped(rows, gates, experts):
        return run(rows, gates, jnp.array(sizes, jnp.int32), experts, layer)[:used]

    expected, expected_pullback = jax.vjp(by_group, rows, gates, experts)
    y, pullback = jax.vjp(jax.jit(grouped), rows, gates, experts)
    np.testing.assert_allclose(grouped(rows, gates, experts), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    def gradients(pull_back):
        of_rows, of_gates, of_experts = pull_back(jnp.cos(y))
        return of_rows[:used], of_gates[:used], of_experts

    chex.assert_trees_all_close(gradients(pullback), gradients(expected_pullback), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "starts"), [("blocks", (0, 256, 512, 576, 582, 646)), ("fixed_blocks", (0, 64, 512, 582, 646))]
)
def test_blocks_drop_out_alike_in_both_passes_and_differently_in_each_block(name, starts):
    """Units that are all one show what is kept; with it the same is written out, with gradients. The last
    block of the first group runs over into the last group, the one between is empty."""
    sizes, width, rate = (2 * WIDE_BLOCK + 70, 0, 100), 32, 0.25
    num_rows = sum(sizes)
    stacked = 3, width, width
    identity = jnp.broadcast_to(jnp.eye(width), stacked)
    ones = Weights(jnp.zeros(stacked), jnp.ones(stacked[:2]), identity, None)
    run_groups, spare_rows, _ = make_grouped_mlp(name, num_rows, ones, all_grouped=False)
    shape = num_rows + spare_rows, width

    def run(activation, rows, gates, experts):
        layer = FeedForward(activation, Dropout(rate, WORDS))
        return run_groups(rows, gates, jnp.array(sizes), experts, layer)[:num_rows]

    kept = np.asarray(run(jax.nn.relu, jnp.zeros(shape), jnp.ones((shape[0], 1)), ones)) != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.size) ** 0.5
    assert len({kept[start : start + 6].tobytes() for start in starts}) == len(starts)

    def whole(rows, gates, experts):
        of_row = np.repeat(np.arange(3), sizes)
        h = jnp.einsum("nd,ndf->nf", rows[:num_rows], experts.fc_kernel[of_row]) + experts.fc_bias[of_row]
        h = jnp.where(kept, quick_gelu(h) / (1 - rate), 0) * gates[:num_rows]
        return jnp.einsum("nf,nfd->nd", h, experts.proj_kernel[of_row])

    rows = 0.2 * jax.random.normal(jax.random.key(0), shape)
    fc_kernel, proj_kernel = (0.2 * jax.random.normal(jax.random.key(i), stacked) for i in (1, 2))
    experts = ones._replace(fc_kernel=fc_kernel, proj_kernel=proj_kernel)
    arguments = rows, jax.random.uniform(jax.random.key(3), (shape[0], 1)), experts
    y, pullback = jax.vjp(functools.partial(run, quick_gelu), *arguments)
    expected, expected_pullback = jax.vjp(whole, *arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(pullback(y), expected_pullback(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_only_marks_are_kept_of_a_hidden_layer_with_dropout(params, x, name):
    """One array as wide as F, no mask beside it, and none that is drawn again."""
    layer = make_layer(**EXACT[name], dropout_rate=0.25, deterministic=False)

    def apply(x):
        return layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(0)})[0]

    keep = jax.checkpoint_policies.save_only_these_names(HIDDEN)
    residuals = jax.eval_shape(lambda x: jax.vjp(jax.checkpoint(apply, policy=keep), x)[1], x)
    rows = math.prod(x.shape[:2]) * K
    of_units = [leaf for leaf in jax.tree.leaves(residuals) if leaf.size >= rows * F]
    assert [leaf.dtype for leaf in of_units] == [jnp.float32]

    def draws(apply):
        return str(jax.make_jaxpr(jax.grad(lambda x: apply(x).sum()))(x)).count(f" {0x85EBCA6B}:u32")

    assert draws(jax.checkpoint(apply, policy=keep)) == draws(apply) > 0


def test_random_bits_are_fair_and_independent():
    """Of a million units each bit is set half of the time, within five deviations; no bit agrees more often
    than not with that of a unit beside it, in the next row, in another layer, or whose words are swapped or
    next to these (the last bit of the second word does not count)."""
    shape = 1024, 1000
    others = WORDS[::-1], WORDS + np.array([1, 0], np.uint32), WORDS + np.array([0, 2], np.uint32)
    bits, *of_others = (np.asarray(random_bits(words, shape, 0)) for words in (WORDS, *others))
    shifted = [np.roll(bits, 1, axis) for axis in (0, 1)] + [np.roll(bits, 2**i) for i in range(10)]
    for array in [bits] + [bits ^ other for other in shifted + of_others]:
        ones = np.array([np.mean(array >> np.uint32(i) & 1) for i in range(32)])
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / array.size**0.5
    counts = np.bincount((bits >> 24).ravel(), minlength=256)
    assert np.sum((counts - bits.size / 256) ** 2 / (bits.size / 256)) < 255 + 5 * (2 * 255) ** 0.5


def test_random_bits_of_a_row_do_not_depend_on_the_rows_beside_it():
    whole = random_bits(WORDS, (64, 3, F), 0)
    np.testing.assert_array_equal(random_bits(WORDS, (16, 3, F), jnp.int32(40)), whole[40:56])


def test_dropout_lets_a_nan_through():
    dropout, h = Dropout(0.25, WORDS), jnp.array([[1.0, jnp.nan] * 8])
    y = dropout.scale(quick_gelu, dropout.drop(h))
    assert jnp.isnan(y[:, 1::2]).all() and not jnp.isnan(y[:, ::2]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dropped_activations_are_0_and_flat(name, dtype):
    """Whatever they were before, and for gradients far larger than training has."""
    dropout, h = Dropout(0.5, WORDS), jnp.linspace(-1e4, 1e4, 4096, dtype=dtype)[None]
    is_dropped = np.asarray(random_bits(WORDS, h.shape, 0) < jnp.uint32(2**31))

    def run(h, dy):
        y, pull_back = jax.vjp(lambda h: dropout.scale(ACTIVATIONS[name], dropout.drop(h)), h)
        return y, *pull_back(dy)

    for found in jax.jit(run)(h, jnp.full_like(h, 1e6)):
        assert 0.4 < is_dropped.mean() < 0.6 and (np.asarray(found, np.float32)[is_dropped] == 0).all()


def test_tiles_are_blocks_where_kernels_do_not_fit(monkeypatch):
    monkeypatch.undo()  # the tiles that are written out
    assert make_grouped_mlp("tiles", 400, random_experts(), all_grouped=True)[1:] == (64, 1)
    shapes = (E, 128, 256), (E, 256), (E, 256, 128), (E, 128)
    experts = Weights(*(jnp.zeros(shape, jnp.bfloat16) for shape in shapes))
    assert make_grouped_mlp("tiles", 400, experts, all_grouped=True)[1:] == (-(400 + E * 127) % 128, 128)


def test_few_rows_are_multiplied_in_narrow_blocks_alone(params, x):
    """A block of all 52 slots and 64 spare rows XLA would compute for every expert, outside of its loop."""
    layer = make_layer(grouped_mlp="blocks")
    text = jax.jit(lambda params, x: layer.apply({"params": params}, x)).lower(params, x).compile().as_text()
    assert f"f32[{NARROW_BLOCK},{F}]" in text and f"f32[{N * K + NARROW_BLOCK},{F}]" not in text


@pytest.mark.parametrize(("multiple", "spare_rows"), [(1, 0), (1, 64), (128, 37)])
def test_slots_are_sorted_by_expert(multiple, spare_rows):
    num_experts = 4
    slot_expert = np.random.default_rng(0).integers(0, num_experts + 1, 300, np.int32)  # 4: no expert here
    sort = functools.partial(
        dispatch._sort_by_expert, num_experts=num_experts, multiple=multiple, spare_rows=spare_rows
    )
    order, position, group_sizes = sort(jnp.asarray(slot_expert))
    assert len(order) == 300 + num_experts * (multiple - 1) + spare_rows

    slots, first = np.full(len(order), 300), 0
    for expert, size in enumerate(group_sizes):
        of_expert = np.flatnonzero(slot_expert == expert)
        assert size == math.ceil(len(of_expert) / multiple) * multiple
        slots[first : first + len(of_expert)] = of_expert
        first += int(size)
    past_experts = first if len(order) == 300 else len(order)  # where slots of no expert may be
    np.testing.assert_array_equal(order[:past_experts], slots[:past_experts])
    here = slot_expert < num_experts
    np.testing.assert_array_equal(order[position[here]], np.flatnonzero(here))
    assert (position[~here] >= len(order)).all()
    # Its kernels are many on GPUs, and slow on CPUs; scatters of single numbers are on TPUs.
    assert (" sort" in str(jax.make_jaxpr(sort)(slot_expert))) == (len(order) == 300)


def test_bfloat16_is_not_moved_as_float32_on_cpu(params, x):
    """All kernels would be converted in each call, and all rows that came out for each block."""
    layer = make_layer(grouped_mlp="blocks", dtype=jnp.bfloat16)
    x = x.astype(jnp.bfloat16)
    half = {
        n: v if n == "router" else jax.tree.map(lambda a: a.astype(x.dtype), v) for n, v in params.items()
    }

    def run(params, x):
        return layer.apply({"params": params}, x)[0]

    def gradient(params, x):
        return jax.grad(lambda x: run(params, x).sum())(x)

    rows = rf"\[{N * K + NARROW_BLOCK},(?:{D}|{F})\]"
    for function in (run, gradient):
        text = jax.jit(function).lower(half, x).compile().as_text()
        assert re.search(rf"u16{rows}\S* dynamic-update-slice", text)
        assert not re.search(rf"f32{rows}\S* dynamic-update-slice", text)
        held = re.findall(r"= (\(.*\)) tuple\(", text)  # by a loop
        assert any(re.search(rf"bf16\[{E},{D},{F}\]", arrays) for arrays in held)
        assert not any(re.search(rf"f32(?:{rows}|\[{E},(?:{D},{F}|{F},{D})\])", arrays) for arrays in held)


@pytest.mark.parametrize("grouped_mlp", GROUPED_MLPS)
def test_slots_of_a_token_are_no_axis_of_an_array(params, x, grouped_mlp):
    """TPUs pad (N, K, D) fourfold where K = 2, forward and backward."""
    layer = make_layer(grouped_mlp=grouped_mlp)

    def loss(params, x):
        return layer.apply({"params": params}, x)[0].sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).as_text()
    assert f"tensor<{N}x{D}x" in text
    assert f"tensor<{N}x{K}x{D}x" not in text


@pytest.mark.parametrize(("train", "products"), [(False, 4), (True, 6)], ids=["frozen", "trained"])
@pytest.mark.parametrize(("name", "kinds_of_block"), [("blocks", 2), ("fixed_blocks", 1), ("tiles", 1)])
def test_frozen_experts_cost_no_gradient(name, kinds_of_block, train, products):
    """Two products forward, two for the rows' gradient, two for the kernels', in each kind of block."""
    run, spare_rows, multiple = make_grouped_mlp(name, 400, random_experts(), all_grouped=False)
    shape = 400 + E * (multiple - 1) + spare_rows, D

    def loss(rows, experts, sizes):
        y = run(rows, jnp.ones((len(rows), 1)), sizes, experts, FeedForward(quick_gelu))
        return jnp.sum(jnp.sin(y))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1) if train else 0))
    compiled = gradient.lower(jnp.ones(shape), random_experts(), jnp.full(E, 100)).compile().as_text()
    assert compiled.count(" dot(") == kinds_of_block * products


def test_remat_takes_nothing_out_of_the_loop_over_fixed_blocks(params, x):
    """Constants of a block's shape, (BM, F), which every block would read from memory."""
    layer = make_layer(grouped_mlp="fixed_blocks", dropout_rate=0.1, deterministic=False)

    def loss(router, x):
        variables = {"params": {**params, "router": router}}
        return jnp.sin(layer.apply(variables, x, rngs={"dropout": jax.random.key(0)})[0]).sum()

    policy = jax.checkpoint_policies.save_only_these_names(HIDDEN, dispatch.ROUTING)
    gradient = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))
    text = jax.jit(gradient).lower(params["router"], x).as_text()
    block_rows = make_grouped_mlp("fixed_blocks", N * K, random_experts(), all_grouped=True)[1]
    loops = [line for line in text.splitlines() if "stablehlo.while" in line]
    assert f"tensor<{block_rows}x{F}x" in text
    assert len(loops) >= 2
    assert not [line for line in loops if f"tensor<{block_rows}x{F}x" in line]


@exhaustive
@pytest.mark.parametrize("name", sorted(EXACT))
def test_routers_learn_in_half_precision_from_nearly_equal_experts(name):
    """As upcycled ones are at first: what they have in common dwarfs what the router has to see. Rounded to
    bfloat16 the gates' gradients would leave an error of 0.5 (capacity) to 1."""
    key, (width, hidden_dim) = jax.random.key(0), (128, 512)

    def make(dtype):
        return MoeMlp(E, K, hidden_dim, quick_gelu, dtype=dtype, **EXACT[name])

    x = jax.random.normal(key, (4, 128, width), jnp.bfloat16)
    params = make(jnp.float32).init(key, x)["params"]
    for i, layer in enumerate(("c_fc", "c_proj")):
        kernel = params[layer]["kernel"]
        common, own = kernel[:1], jax.random.normal(jax.random.fold_in(key, i), kernel.shape)
        params[layer]["kernel"] = common + 0.02 * jnp.std(common) * own
    y = make(jnp.float32).apply({"params": params}, x)[0]
    target = y / jnp.std(y) + jax.random.normal(jax.random.fold_in(key, 2), y.shape)

    def gradient(dtype):
        def loss(router):
            y = make(dtype).apply({"params": params | {"router": router}}, x)[0]
            return jnp.sum(y.astype(jnp.float32) * target)

        return jax.jit(jax.grad(loss))(params["router"])["kernel"]

    exact = gradient(jnp.float32)
    error = jnp.linalg.norm(gradient(jnp.bfloat16) - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.3


def test_capacity_drops_second_choices_first_and_counts_them():
    # Three tokens, all first to expert 0 and second to expert 1; C = ceil(1.0 * 3 * 2 / 4) = 2 rows each,
    # so each expert drops its third token: one first choice and one second choice of token 2.
    x = jnp.ones((3, D))
    gates, expert_ids = jnp.full((3, 2), 0.5), jnp.tile(jnp.array([[0, 1]]), (3, 1))
    experts = Weights(jnp.ones((E, D, F)), jnp.zeros((E, F)), jnp.ones((E, F, D)), jnp.zeros((E, D)))
    y, dropped = dispatch.capacity(x, gates, expert_ids, experts, IDENTITY, capacity_factor=1.0)
    np.testing.assert_array_equal(dropped, [0, 0, 2])
    np.testing.assert_allclose(y[:, 0], [D * F, D * F, 0])


def test_capacity_equals_v_moes_top_experts_per_item():
    """The case of google-research/vmoe's moe_test.py (942a78b): "vanilla", three items, experts of two rows.

    Items 0 and 1 choose experts 0, 2; item 2 chooses 2, 0. All first choices find room; of the second choices
    item 0's takes the last row of expert 2, and items 1 and 2 lose theirs.
    """
    gates, expert_ids = jnp.array([[0.4, 0.2], [0.5, 0.4], [0.6, 0.3]]), jnp.array([[0, 2], [0, 2], [2, 0]])
    # Each expert answers with its own axis, so that y is the weight of each expert.
    experts = Weights(jnp.zeros((3, 3, F)), jnp.zeros((3, F)), jnp.zeros((3, F, 3)), jnp.eye(3))
    y, dropped = dispatch.capacity(
        jnp.ones((3, 3)), gates, expert_ids, experts, IDENTITY, capacity_factor=1.0
    )
    np.testing.assert_allclose(y, [[0.4, 0, 0.2], [0.5, 0, 0], [0, 0, 0.6]], rtol=1e-6)
    np.testing.assert_array_equal(dropped, [0, 1, 1])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sizes", quick({"one device": ((1, 1, 1),), "eight": ((2, 1, 4),)}, "eight"))
def test_only_pooled_tokens_visit_their_experts(params, name, sizes):
    """Three of each shard of two rows: they equal those of the whole batch, and all tokens are routed."""
    x = jax.random.normal(jax.random.key(1), (16, 13, D))
    pooled_positions = jax.random.randint(jax.random.key(2), (8, 3), 0, 2 * 13)
    whole, whole_aux = make_layer(**EXACT["dense"]).apply({"params": params}, x)
    layer = make_layer(**EXACT[name])
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, {"x": x, "pooled_positions": pooled_positions})
        y, aux = jax.jit(layer.apply)({"params": params}, batch["x"], batch["pooled_positions"])
    expected = np.asarray(whole).reshape(8, 26, D)[np.arange(8)[:, None], pooled_positions]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aux["router_logits"], whole_aux["router_logits"], rtol=1e-4, atol=1e-5)


def test_dropped_slots_are_counted_in_their_row():
    """In a shard of two rows the last token of the first and two of the second are pooled, all of one expert:
    C = ceil(1.0 * 3 * 1 / 4) = 1 row, so both tokens of the second row are dropped."""
    x = jnp.ones((2, 5, D))
    layer = MoeMlp(E, 1, F, quick_gelu, dispatch="capacity", capacity_factor=1.0)
    params = layer.init(jax.random.key(0), x)["params"]
    _, aux = layer.apply({"params": params}, x, jnp.array([[4, 5, 7]]))
    np.testing.assert_array_equal(aux["dropped_slots"], [0, 2])


def test_dropout_drops_its_share_of_hidden_units():
    """Of 2^20 units of one expert of ones whose second layer adds them up: within five standard errors."""
    hidden, rate = 2**20, 0.1
    moe = MoeMlp(1, 1, hidden, jax.nn.relu, dropout_rate=rate, deterministic=False)
    params = {
        "router": {"kernel": jnp.ones((1, 1))},
        "c_fc": {"kernel": jnp.zeros((1, 1, hidden)), "bias": jnp.ones((1, hidden))},
        "c_proj": {"kernel": jnp.ones((1, hidden, 1)), "bias": jnp.zeros((1, 1))},
    }
    y, _ = moe.apply({"params": params}, jnp.ones((1, 1, 1)), rngs={"dropout": jax.random.key(0)})
    kept = float(y[0, 0, 0]) * (1 - rate) / hidden
    assert abs(kept - (1 - rate)) < 5 * (rate * (1 - rate) / hidden) ** 0.5


def test_dropout_acts_on_hidden_units_and_only_in_training(params, x):
    layer = make_layer(dropout_rate=0.5)
    still, _ = layer.apply({"params": params}, x)
    np.testing.assert_array_equal(still, make_layer().apply({"params": params}, x)[0])
    noisy = make_layer(dropout_rate=0.5, deterministic=False)
    a, _ = noisy.apply({"params": params}, x, rngs={"dropout": jax.random.key(0)})
    b, _ = noisy.apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(a, still) and not np.allclose(a, b)


@pytest.fixture
def nan_where_undefined(monkeypatch):
    """NaN in memory that was never written, and in rows of no group: for those a kernel of `lax.ragged_dot`
    on TPU may write nothing, nor for their gradient, which it does not read; on CPU both are zero."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def mask(y, used, fills):  # fills: of rows past `used` in y, and in its gradient
        return jnp.where(jnp.arange(len(y))[:, None] < used, y, y if fills[0] is None else fills[0])

    def mask_bwd(fills, used, g):
        return jnp.where(jnp.arange(len(g))[:, None] < used, g, fills[1]), None

    mask.defvjp(lambda y, used, fills: (mask(y, used, fills), used), mask_bwd)
    ragged_dot = lax.ragged_dot

    def kernel(rows, stacked, group_sizes):
        used = group_sizes.sum()
        y = ragged_dot(mask(rows, used, (None, jnp.nan)), stacked, group_sizes)
        return mask(y, used, (jnp.nan, 0))

    monkeypatch.setattr(lax, "ragged_dot", kernel)
    monkeypatch.setattr(lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))


@pytest.mark.usefixtures("nan_where_undefined")
@pytest.mark.parametrize(
    "name", grid("dense", "ragged", "capacity", rest=["ragged by fixed blocks", "ragged by ragged_dot"])
)
@pytest.mark.parametrize("sizes", grid(((2, 1, 4),), rest=[((8, 1, 1),), ((2, 2, 2),)]))
@pytest.mark.parametrize("router_gradient", grid("chosen", rest=["all"]))
def test_sharded_equals_one_device(params, name, sizes, router_gradient):
    """Values and gradients, with the batch over every device and the experts over their axis: so many tokens
    that no block of rows runs over all of those whose expert is elsewhere."""
    x = jax.random.normal(jax.random.key(1), (8, 50, D))
    layer = make_layer(router_gradient=router_gradient, **EXACT[name])

    def loss(params, x):
        return jnp.mean(jnp.sin(layer.apply({"params": params}, x)[0]).sum(-1))

    expected = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        params = {"visual": {"resblocks_0": {"moe": params}}}
        placed = jax.device_put(params, sharding.param_shardings(mesh, params))
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            placed["visual"]["resblocks_0"]["moe"], jax.device_put(x, sharding.batch_sharding(mesh))
        )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=5e-7)


def test_capacity_over_the_expert_axis_drops_by_device_and_counts():
    """Each of eight devices has three tokens, which all go to experts 0 and 1 on two of them: the case by
    hand above, eight times. Buffers travel, and nothing is gathered."""
    x = jnp.ones((24, D))
    gates, expert_ids = jnp.full((24, 2), 0.5), jnp.tile(jnp.array([[0, 1]]), (24, 1))
    experts = Weights(jnp.ones((E, D, F)), jnp.zeros((E, F)), jnp.ones((E, F, D)), jnp.zeros((E, D)))
    tokens, stacked = PartitionSpec(sharding.BATCH_AXES), PartitionSpec("expert")
    run = dispatch.make_dispatch("capacity", 1.0, "blocks", "expert")
    with jax.set_mesh(sharding.make_mesh(2, 1, 4)):
        over_devices = jax.jit(
            jax.shard_map(
                lambda *arrays: run(*arrays, IDENTITY),
                in_specs=(tokens, tokens, tokens, stacked),
                out_specs=tokens,
            )
        )
        y, dropped = over_devices(x, gates, expert_ids, experts)
        compiled = over_devices.lower(x, gates, expert_ids, experts).compile().as_text()
    np.testing.assert_array_equal(dropped, 8 * [0, 0, 2])
    np.testing.assert_allclose(y[:, 0], 8 * [D * F, D * F, 0])
    assert " all-to-all(" in compiled and " all-gather(" not in compiled


def test_unknown_dispatch_says_which_there_are(params, x):
    with pytest.raises(ValueError, match="'dense', 'ragged' or 'capacity'"):
        make_layer(dispatch="scatter").apply({"params": params}, x)
    with pytest.raises(ValueError, match="choose one of blocks, fixed_blocks, tiles, ragged_dot"):
        make_layer(grouped_mlp="scatter").apply({"params": params}, x)
