"""Routing, counted by hand and by a loop over tokens; and what kinds of words there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import exhaustive, grid

from clipmoe_jax.analysis import routing
from clipmoe_jax.analysis.words import WORD_CLASSES, classes_of_tokens
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.models.clip import Clip, text_mask
from clipmoe_jax.models.inputs import END_ID
from clipmoe_jax.train import losses

NUMBER, COLOUR, FUNCTION, PUNCTUATION, OTHER = range(5)


def test_routing_sums_leave_padding_out():
    # Probabilities of three experts; the third token is padding.
    logits = jnp.log(jnp.array([[6, 3, 1], [2, 1, 1], [1, 1, 8]]))[None, None]
    mask, place = jnp.array([[True, True, False]]), jnp.array([[0, 1, 1]])
    word = jnp.array([[-1, COLOUR, COLOUR]])
    sums = routing.routing_sums(logits, 2, mask, place, word, 2)
    # Both go to experts 0 and 1 (of the second token's equal ones the lower id).
    np.testing.assert_array_equal(sums.together[0], [[2, 2, 0], [2, 2, 0], [0, 0, 0]])
    np.testing.assert_array_equal(sums.chosen_at[0], [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(sums.chosen_of[0, COLOUR], [1, 1, 0])
    assert int(sums.chosen_of.sum()) == 2 and int(sums.num_tokens) == 2
    np.testing.assert_allclose(sums.top1_gate, [[6 / 9 + 2 / 3]], rtol=1e-6)
    # -0.6 ln 0.6 - 0.3 ln 0.3 - 0.1 ln 0.1 = 0.897946; 0.5 ln 2 + 2 * 0.25 ln 4 = 1.039721
    np.testing.assert_allclose(sums.entropy, [[0.897946 + 1.039721]], rtol=1e-5)


def naive_tables(trained, tower):
    """One token after the other, in float64."""
    num_selected, name = trained.model.config.moe.num_selected_experts, routing.INPUTS[tower]
    keys = ("load", "entropy", "top1_gate", "coactivation")
    places, words, found = {}, {}, {key: [] for key in keys}
    for batch in trained.batches:
        for row in np.flatnonzero(batch["valid"]):
            logits = trained.router_logits(trained.params, batch[name], f"encode_{name}")
            logits = logits[row].astype(np.float64)  # (M, L, E)
            ids = batch["text"][row].tolist()
            for position in range(ids.index(END_ID) + 1 if tower == "text" else logits.shape[1]):
                p = np.exp(logits[:, position])
                p /= p.sum(axis=-1, keepdims=True)
                top = np.argsort(-p, axis=-1)[:, :num_selected]
                chosen = np.zeros(p.shape)
                np.put_along_axis(chosen, top, 1, axis=-1)
                gate = p.max(axis=-1) / (p * chosen).sum(axis=-1)
                values = chosen, -(p * np.log(p)).sum(axis=-1), gate, chosen[:, :, None] * chosen[:, None]
                for key, value in zip(keys, values, strict=True):
                    found[key].append(value)
                if tower == "visual":
                    place = "class token" if position == 0 else f"row {(position - 1) // 2 + 1}"
                else:
                    bins = (1, "0"), (5, "1-4"), (10, "5-9"), (20, "10-19"), (40, "20-39"), (64, "40-")
                    place = next(label for stop, label in bins if position < stop)
                    place = "end token" if ids[position] == END_ID else place
                    kind = classes_of_tokens(batch["text"][row][None])[0, position]
                    words.setdefault(int(kind), []).append(chosen)
                places.setdefault(place, []).append(chosen)
    mean = {key: np.mean(values, axis=0) for key, values in found.items()}
    mean["load"] /= num_selected
    by = [
        {key: np.mean(values, axis=0) / num_selected for key, values in group.items()}
        for group in (places, words)
    ]
    return mean, *by


@pytest.mark.parametrize("tower", grid("text", rest=["visual"]))
def test_tables_equal_a_loop_over_tokens(trained, tower):
    sums = routing.route_by_model(trained.model, trained.params, trained.batches, trained.mesh)
    table = routing.routing_tables(sums, trained.model.config)[tower]
    mean, places, words = naive_tables(trained, tower)
    assert table["layers"] == [0, 1]
    for key, expected in mean.items():
        np.testing.assert_allclose(table[key], expected, rtol=1e-5, atol=1e-9, err_msg=key)
    assert set(table["bins"]) == set(places)  # all seven of text: one caption has more than 40 tokens
    for i, label in enumerate(table["bins"]):
        found = [layer[i] for layer in table["load_by_position"]]
        np.testing.assert_allclose(found, places[label], atol=1e-9, err_msg=label)
    if tower == "text":
        del words[-1]  # start and end
        assert set(table["load_by_word_class"]) == {WORD_CLASSES[kind] for kind in words}
        for kind, expected in words.items():
            found = table["load_by_word_class"][WORD_CLASSES[kind]]
            np.testing.assert_allclose(found, expected, atol=1e-9)


def test_load_equals_the_fraction_of_the_load_balance_loss(trained):
    """f_e is inside `load_balance` = E * sum_e f_e P_e. Scaled logits change P_e and not f_e: as many scales
    as experts leave one f_e alone that gives all the balances."""
    batch = trained.batches[0]
    unscaled = trained.router_logits(trained.params, batch["text"], "encode_text")
    mask = text_mask(batch["text"])
    sums = routing.route_by_model(trained.model, trained.params, trained.batches[:1], trained.mesh)
    load = np.array(routing.routing_tables(sums, trained.model.config)["text"]["load"])
    for scale in (0.25, 0.5, 1.0, 1.5, 2.0):
        logits = scale * unscaled
        p = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
        for layer in range(2):
            of_expert = p[:, layer][np.asarray(mask)].mean(axis=0)
            found = losses.load_balance(logits[:, layer : layer + 1], 2, mask)
            np.testing.assert_allclose(found, 4 * np.sum(load[layer] * of_expert), rtol=1e-5)


def test_sharded_model_gives_the_same_counts(trained):
    """Rows over four devices, experts over two."""
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    params = jax.device_put(trained.params, sharding.param_shardings(mesh, trained.params))
    found = routing.route_by_model(trained.model, params, trained.batches, mesh)
    expected = routing.route_by_model(trained.model, trained.params, trained.batches, trained.mesh)
    for tower in ("visual", "text"):
        for name, value in expected[tower]._asdict().items():
            assert value.dtype == getattr(found[tower], name).dtype
            np.testing.assert_allclose(getattr(found[tower], name), value, rtol=1e-5)


def other_routers(params, tower):
    """The same with the router of the tower's last block turned around."""
    leaves = trees.flatten(params)
    name = f"{tower}/resblocks_1/moe/router/kernel"
    return trees.unflatten({**leaves, name: -leaves[name]})


@exhaustive
def test_negated_router_changes_the_experts_of_all_its_tokens(trained):
    """With K = E / 2 the smallest logits take the places of the largest; the other blocks see nothing."""
    other = other_routers(trained.params, "text")
    arguments = trained.model, trained.params, other, trained.batches, trained.mesh
    assert routing.changed_routing(*arguments) == {"visual": [0, 0], "text": [0, 1]}


def test_changed_routing_equals_a_loop_over_tokens(trained):
    """Another router in the first block: what share of the valid tokens has another set of experts."""
    leaves = trees.flatten(trained.params)
    name = "visual/resblocks_0/moe/router/kernel"
    noise = np.random.default_rng(1).normal(0, 0.2, leaves[name].shape).astype("f4")
    other = trees.unflatten({**leaves, name: leaves[name] + noise})
    found = routing.changed_routing(trained.model, trained.params, other, trained.batches, trained.mesh)

    def sets(params):
        chosen = []
        for batch in trained.batches:
            logits = trained.router_logits(params, batch["image"], "encode_image")[batch["valid"]]
            chosen += [np.sort(np.argsort(-row, axis=-1)[..., :2], axis=-1) for row in logits]
        return np.stack(chosen)

    differs = (sets(trained.params) != sets(other)).any(axis=-1).mean(axis=(0, 2))
    assert 0 < differs[0] < 1
    np.testing.assert_allclose(found["visual"], differs)


def test_top1_experts_are_the_largest_logits_of_patches_and_words(trained):
    """Three examples on eight devices, as the logits say; -1 after the end token."""
    mesh = sharding.make_mesh()
    params = jax.device_put(trained.params, sharding.replicated(mesh))
    images, tokens = trained.batches[0]["image"][:3], trained.batches[0]["text"][:3]
    visual, text = routing.top1_experts(trained.model, params, images, tokens, mesh)
    logits = trained.router_logits(trained.params, trained.batches[0]["image"], "encode_image")
    best = np.argmax(logits[:3], axis=-1)  # (n, M, L)
    assert visual.dtype == text.dtype == np.int8 and visual.shape == (3, 2, 2, 2)
    for down, right in np.ndindex(2, 2):
        np.testing.assert_array_equal(visual[:, :, down, right], best[:, :, 1 + 2 * down + right])
    logits = trained.router_logits(trained.params, trained.batches[0]["text"], "encode_text")
    best = np.argmax(logits[:3], axis=-1)
    for i, ids in enumerate(tokens.tolist()):
        end = ids.index(END_ID)
        np.testing.assert_array_equal(text[i, :, : end + 1], best[i, :, : end + 1])
        assert np.all(text[i, :, end + 1 :] == -1)


def test_gates_of_patches_are_the_largest_probabilities(trained):
    """As a softmax by hand has them, each in its patch's place."""
    images = trained.batches[0]["image"]
    found = routing.make_patch_gates(trained.model)(trained.params, images)
    logits = trained.router_logits(trained.params, images, "encode_image")
    p = np.exp(logits.astype(np.float64))  # (B, M, L, E)
    p[p < np.sort(p, axis=-1)[..., -2:-1]] = 0
    p /= p.sum(axis=-1, keepdims=True)
    assert found.shape == (4, 2, 2, 2, 4)
    for down, right in np.ndindex(2, 2):
        np.testing.assert_allclose(found[:, :, down, right], p[:, :, 1 + 2 * down + right], atol=1e-6)


def test_routing_of_a_dense_model_is_refused(trained):
    model = Clip(trained.dense)
    with pytest.raises(ValueError, match="the model is dense: it has no experts"):
        routing.route_by_model(model, trained.dense_params[0], trained.batches, trained.mesh)
    with pytest.raises(ValueError, match="the model is dense: it has no experts"):
        routing.make_patch_gates(model)


def test_batches_without_tokens_are_refused(trained):
    empty = {**trained.batches[0], "valid": np.zeros(4, bool)}
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="there is no token to count"):
            routing.route_by_model(trained.model, trained.params, batches, trained.mesh)
