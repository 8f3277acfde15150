"""The difference of experts against numpy with whole Gram matrices, and the properties it must have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import exhaustive, grid
from scipy.spatial.distance import jensenshannon

from clipmoe_jax.analysis import expert_difference as difference
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.dmu.upcycling import stack_experts
from clipmoe_jax.models.clip import Clip, text_mask

RNG = np.random.default_rng(0)


def reference_cka(x, y):
    """Unbiased, from whole (N, N) matrices, as Song et al. write it. Float64."""

    def hsic(x, y):
        k, l = x @ x.T, y @ y.T  # noqa: E741, the names of the paper
        n = len(k)
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        ones = np.ones(n)
        total = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * ones @ k @ l @ ones) / (n * (n - 3))

    x, y = x.astype(np.float64), y.astype(np.float64)
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def sums_of(outputs, shift=None, parts=1):
    """OutputSums of (E, N, D) float32, summed over some parts."""
    shift = outputs.mean(axis=1) if shift is None else shift
    found = [
        difference.output_sums(jnp.asarray(part[:, None]), jnp.ones((1, part.shape[1]), bool), shift)
        for part in np.array_split(outputs, parts, axis=1)
    ]
    each = zip(*found, strict=True)
    return difference.OutputSums(*(sum(np.asarray(a, np.float64) for a in arrays) for arrays in each))


@pytest.fixture(scope="module")
def outputs():
    """Three experts on 60 tokens: the second near the first, the third unrelated; means far from 0."""
    x = RNG.normal(size=(60, 8))
    near = x @ RNG.normal(size=(8, 8)) + 0.5 * RNG.normal(size=(60, 8))
    return (np.stack([x, near, RNG.normal(size=(60, 8))]) + [[[3.0]], [[-2.0]], [[5.0]]]).astype("f4")


def test_cka_in_parts_equals_whole_gram_matrices(outputs):
    found = difference.linear_cka(sums_of(outputs, parts=7))
    for e, f in np.ndindex(3, 3):
        np.testing.assert_allclose(found[e, f], reference_cka(outputs[e], outputs[f]), atol=1e-5)
    assert 0.3 < found[0, 1] < 0.95 and abs(found[0, 2]) < 0.1


def test_cka_does_not_depend_on_the_shift(outputs):
    expected = difference.linear_cka(sums_of(outputs))
    other = difference.linear_cka(sums_of(outputs, np.float32(RNG.normal(size=(3, 8)))))
    np.testing.assert_allclose(other, expected, atol=1e-4)


def test_cka_is_blind_to_rotation_scale_and_translation_but_not_to_other_maps(outputs):
    x = outputs[0]
    rotation, _ = np.linalg.qr(RNG.normal(size=(8, 8)))
    stretched = x * np.linspace(0.1, 3, 8)
    found = difference.linear_cka(sums_of(np.float32(np.stack([x, 7 * x @ rotation - 4, stretched]))))
    np.testing.assert_allclose(found[0, 1], 1, atol=1e-5)
    assert found[0, 2] < 0.95


def test_few_tokens_do_not_make_unrelated_outputs_alike():
    """24 tokens of 64 features, ten pairs of experts: the plain estimate is above 0.6, ours about 0."""
    outputs = RNG.normal(size=(5, 24, 64)).astype("f4")
    x, y = (a - a.mean(axis=0) for a in outputs[:2])
    plain = np.sum((x.T @ y) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    cka = difference.linear_cka(sums_of(outputs))
    assert plain > 0.6
    # One pair's estimate varies by 0.06 or so, the mean of ten by 0.02.
    np.testing.assert_allclose(difference.diversity(cka[None]), 1, atol=0.06)


def test_diversity_averages_one_less_cka_over_pairs_and_towers():
    # Two layers: 1 - 0.2 and 1 - 0.4, mean 0.7; the other tower's one layer 1 - 0.9: (0.7 + 0.1) / 2.
    visual = np.array([[[1, 0.2], [0.2, 1]], [[1, 0.4], [0.4, 1]]])
    text = np.array([[[1, 0.9], [0.9, 1]]])
    np.testing.assert_allclose(difference.diversity(visual, text), 0.4)


def test_js_divergence_is_in_bits():
    # All mass on feature 0, on feature 1, and half on each: 1 bit between the first two. From the half:
    # m = (3/4, 1/4), KL((1, 0) | m) = log2(4/3), KL((1/2, 1/2) | m) = (log2(2/3) + log2 2) / 2.
    outputs = np.array([[[100, 0]], [[0, 100]], [[0, 0]]], np.float32)
    half = np.log2(4 / 3) / 2 + (np.log2(2 / 3) + 1) / 4
    found = difference.js_divergence(sums_of(outputs, np.zeros((3, 2), "f4")))
    np.testing.assert_allclose(found, [[0, 1, half], [1, 0, half], [half, half, 0]], atol=1e-6)


def test_weight_cosine_is_of_differences_from_expert_0():
    # Differences from expert 0: (3, 0, 4) and (0, 0, -2), and an expert that does not differ.
    # -8 / (5 * 2) = -0.8
    experts = {
        "kernel": np.array([[[1.0, 2]], [[4, 2]], [[1, 2]], [[1, 2]]]),
        "bias": np.array([[1.0], [5], [-1], [1]]),
    }
    expected = [[1, -0.8, 0], [-0.8, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(difference.weight_cosine(experts), expected, atol=1e-6)


def naive_outputs(trained, tower, layer):
    """(E, N, D) float64: each expert, in numpy, on the tokens that reach its block."""
    leaves = trees.flatten(trained.params)
    block = f"{tower}/resblocks_{layer}/moe"
    inputs = []
    for batch in trained.batches:
        arrays = {"inputs": batch["image" if tower == "visual" else "text"], "valid": batch["valid"]}
        x = difference._make_capture(trained.model, tower)(trained.params, arrays)[1][layer]
        mask = np.broadcast_to(batch["valid"][:, None], x.shape[:2])
        if tower == "text":
            mask = mask & np.asarray(text_mask(batch["text"]))
        inputs.append(np.asarray(x, np.float64)[mask])
    x = np.concatenate(inputs)
    outputs = []
    for e in range(4):
        w = {
            name: np.asarray(leaves[f"{block}/{name}"][e], np.float64)
            for name in ("c_fc/kernel", "c_fc/bias", "c_proj/kernel", "c_proj/bias")
        }
        h = x @ w["c_fc/kernel"] + w["c_fc/bias"]
        outputs.append(h / (1 + np.exp(-1.702 * h)) @ w["c_proj/kernel"] + w["c_proj/bias"])
    return np.stack(outputs)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_captured_inputs_are_the_routers(trained, tower):
    """Times the router's kernel they are the logits that the model gives."""
    name = "image" if tower == "visual" else "text"
    inputs, valid = trained.batches[0][name], trained.batches[0]["valid"]
    arrays = {"inputs": inputs, "valid": valid}
    _, captured = difference._make_capture(trained.model, tower)(trained.params, arrays)
    logits = trained.router_logits(trained.params, inputs, f"encode_{name}")
    for layer, x in enumerate(captured):
        router = trained.params[tower][f"resblocks_{layer}"]["moe"]["router"]["kernel"]
        np.testing.assert_allclose(x @ router, logits[:, layer], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def found(trained):
    return difference.expert_difference(trained.model, trained.params, trained.batches, trained.mesh)


@pytest.mark.parametrize("tower", grid("text", rest=["visual"]))
def test_cka_js_divergence_and_weight_cosine_of_a_model_equal_numpys(trained, found, tower):
    assert found[tower]["layers"] == [0, 1]
    for layer in range(2):
        y = naive_outputs(trained, tower, layer)
        p = np.exp(y - y.max(axis=-1, keepdims=True))
        for e, f in np.ndindex(4, 4):
            cka, js = found[tower]["cka"][layer][e][f], found[tower]["js_divergence"][layer][e][f]
            np.testing.assert_allclose(cka, reference_cka(y[e], y[f]), atol=1e-4)
            expected = np.mean(jensenshannon(p[e], p[f], base=2, axis=-1) ** 2)  # scipy's is the root
            np.testing.assert_allclose(js, expected, rtol=1e-3, atol=1e-6)
        leaves = [trees.flatten(params) for params in trained.dense_params]
        names = [name for name in leaves[0] if name.startswith(f"{tower}/resblocks_{layer}/mlp/")]
        d = [np.concatenate([np.ravel(tree[n] - leaves[0][n]) for n in names]) for tree in leaves[1:]]
        expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in d] for a in d]
        np.testing.assert_allclose(found[tower]["weight_cosine"][layer], expected, atol=1e-5)


def test_diversity_is_the_towers_mean_of_one_less_cka(found):
    of_towers = [
        np.mean([1 - np.array(cka)[e, f] for cka in found[tower]["cka"] for e in range(4) for f in range(e)])
        for tower in ("visual", "text")
    ]
    np.testing.assert_allclose(found["diversity"], np.mean(of_towers))
    assert 0.05 < found["diversity"] < 0.9


def test_equal_experts_have_no_diversity(trained):
    params = stack_experts([trained.dense_params[0]] * 4, jax.random.key(1))
    found = difference.expert_difference(trained.model, params, trained.batches, trained.mesh)
    np.testing.assert_allclose(found["diversity"], 0, atol=1e-6)
    np.testing.assert_allclose(found["visual"]["cka"], 1, atol=1e-6)
    np.testing.assert_allclose(found["text"]["js_divergence"], 0, atol=1e-7)
    assert not np.any(found["text"]["weight_cosine"])


@exhaustive
def test_sharded_and_recomputed_blocks_give_the_same(trained, found):
    """Rows over four devices, experts over two, in blocks that are recomputed."""
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    params = jax.device_put(trained.params, sharding.param_shardings(mesh, trained.params))
    model = Clip(trained.model.config, dataclasses.replace(trained.model.compute, remat="full"))
    on_mesh = difference.expert_difference(model, params, trained.batches, mesh)
    for tower in ("visual", "text"):
        for name in ("cka", "js_divergence", "weight_cosine"):
            np.testing.assert_allclose(on_mesh[tower][name], found[tower][name], rtol=1e-4, atol=1e-5)


def test_too_few_tokens_and_constant_outputs_are_refused():
    outputs = RNG.normal(size=(2, 9, 4)).astype("f4")
    with pytest.raises(ValueError, match="the CKA of text block 3 takes at least 4 tokens, not 3"):
        difference.linear_cka(sums_of(outputs[:, :3]), "text block 3")
    outputs[1] = 2.0
    with pytest.raises(ValueError, match="expert 1 of the layer gives all 9 tokens the same output"):
        difference.linear_cka(sums_of(outputs))
