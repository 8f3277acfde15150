"""The contrastive loss and the load balance, by hand and against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipmoe_jax.core import sharding
from clipmoe_jax.train import losses

LN = np.log


def naive_contrastive(images, texts, logit_scale, smoothing):
    """Two loops over queries, float64."""
    images = [row / np.sqrt(np.sum(row**2)) for row in images.astype(np.float64)]
    texts = [row / np.sqrt(np.sum(row**2)) for row in texts.astype(np.float64)]
    total, size = 0.0, len(images)
    for queries, keys in ((images, texts), (texts, images)):
        for i, query in enumerate(queries):
            scores = [np.exp(logit_scale) * np.dot(query, key) for key in keys]
            log_sum = LN(sum(np.exp(score - max(scores)) for score in scores)) + max(scores)
            for j, score in enumerate(scores):
                target = smoothing / size + (1 - smoothing) * (i == j)
                total -= target * (score - log_sum) / size / 2
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrastive_loss_equals_two_loops(smoothing):
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 7, 5)).astype(np.float32)
    found = losses.contrastive_loss(images, 3 * texts, jnp.log(20.0), smoothing)
    expected = naive_contrastive(images, texts, LN(20), smoothing)
    np.testing.assert_allclose(found["contrastive_loss"], expected, rtol=1e-5)


# Three pairs along the axes: own similarity 1, others 0; a scale of ln 4 makes the logits (ln 4, 0, 0), the
# probabilities (4, 1, 1) / 6.
@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [
        (0.0, -LN(4 / 6)),
        # Targets are 0.7 + 0.3 / 3 = 0.8 for the own caption and 0.1 for the two others.
        (0.3, -0.8 * LN(4 / 6) - 0.2 * LN(1 / 6)),
    ],
)
def test_contrastive_loss_by_hand(smoothing, expected):
    scale = jnp.log(jnp.log(4.0))
    found = losses.contrastive_loss(2 * jnp.eye(3), jnp.eye(3), scale, smoothing)
    np.testing.assert_allclose(found["contrastive_loss"], expected, rtol=1e-6)


def test_batch_accuracy_counts_images_that_rank_their_own_caption_first():
    # Captions 1 and 2 are exchanged: of four images 0 and 3 find theirs.
    found = losses.contrastive_loss(jnp.eye(4), jnp.eye(4)[jnp.array([0, 2, 1, 3])], 0.0)
    np.testing.assert_allclose(found["batch_accuracy"], 2 / 4)


def test_contrastive_loss_of_bfloat16_features_is_computed_in_float32():
    rng = np.random.default_rng(1)
    images, texts = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.bfloat16)
    found = losses.contrastive_loss(images, texts, jnp.log(100.0))["contrastive_loss"]
    expected = naive_contrastive(np.asarray(images), np.asarray(texts), LN(100), 0.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def balanced_logits(num_experts, num_selected):
    """(1, 1, E, E): token t prefers experts t, …, t + K - 1, so every expert gets K of the E * K slots."""
    places = (np.arange(num_experts)[None] - np.arange(num_experts)[:, None]) % num_experts
    return jnp.asarray(np.where(places < num_selected, 2.0, 0.0), jnp.float32)[None, None]


@pytest.mark.parametrize(("num_experts", "num_selected"), [(4, 2), (8, 1), (3, 3)])
def test_perfect_balance(num_experts, num_selected):
    logits = balanced_logits(num_experts, num_selected)
    np.testing.assert_allclose(losses.load_balance(logits, num_selected), 1.0, rtol=1e-6)
    # The released code does not divide the K slots of a token by K.
    released = losses.released_load_balance(logits, num_selected)
    np.testing.assert_allclose(released, num_selected, rtol=1e-6)


# Two experts, K = 1. Three tokens have probabilities (3/4, 1/4) and go to expert 0, one has (1/5, 4/5).
SKEWED = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [1.0, 4.0]]))
# f = (3/4, 1/4); P = ((3 * 0.75 + 0.2) / 4, (3 * 0.25 + 0.8) / 4); E = 2.
SKEWED_BALANCE = 2 * (3 / 4 * 2.45 / 4 + 1 / 4 * 1.55 / 4)


def test_skewed_balance_by_hand():
    found = losses.load_balance(SKEWED[None, None], 1)
    np.testing.assert_allclose(found, SKEWED_BALANCE, rtol=1e-6)


def test_balance_of_one_expert_a_token_is_v_moes_gshard_loss():
    """The case of google-research/vmoe's nn/routing_test.py (942a78b): 3² · mean(top-1 share · mean gate)."""
    gates = jnp.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
    found = losses.load_balance(jnp.log(gates)[None, None], 1)
    np.testing.assert_allclose(found, 1.0875, rtol=1e-6)


def test_collapse_to_one_expert_costs_e_over_k():
    # Every token goes to experts 0 and 1 of 4 with certainty: f = P = (1/2, 1/2, 0, 0); 4 * 2 * 1/4 = 2.
    logits = jnp.broadcast_to(jnp.array([50.0, 50.0, 0.0, 0.0]), (2, 3, 5, 4))
    np.testing.assert_allclose(losses.load_balance(logits, 2), 2.0, rtol=1e-6)


def test_padding_counts_for_nothing():
    """Tokens that the mask leaves out, whatever their logits, and however many each caption has of them."""
    caption_a = jnp.concatenate([SKEWED[:1], jnp.full((3, 2), 7.0).at[:, 1].set(-9.0)])
    caption_b = jnp.concatenate([SKEWED[1:], jnp.array([[-30.0, 5.0]])])
    logits = jnp.stack([caption_a, caption_b])[:, None]  # (B, M, L, E)
    mask = jnp.array([[True, False, False, False], [True, True, True, False]])
    np.testing.assert_allclose(losses.load_balance(logits, 1, mask), SKEWED_BALANCE, rtol=1e-6)
    gradient = jax.grad(lambda x: losses.load_balance(x, 1, mask))(logits)
    assert not np.any(gradient[:, 0][~mask])
    assert np.all(gradient[:, 0][mask])


def test_blocks_are_averaged_in_the_paper_and_pooled_in_the_released_code():
    # Block 0 sends every token to expert 0, block 1 to expert 1: each is collapsed (2 at E = 2, K = 1), but
    # together they are balanced (f = P = (1/2, 1/2): 2 * (1/4 + 1/4) = 1).
    block = jnp.broadcast_to(jnp.array([60.0, 0.0]), (1, 3, 2))
    logits = jnp.stack([block, block[..., ::-1]], axis=1)
    np.testing.assert_allclose(losses.load_balance(logits, 1), 2.0, rtol=1e-6)
    np.testing.assert_allclose(losses.released_load_balance(logits, 1), 1.0, rtol=1e-6)


# Both towers collapsed to one of 2 experts: each balance is 2. In the paper's kind the text's last token, on
# the other expert, is padding; the released kind counts it: f = (3/4, 1/4) = P, 2 * (9/16 + 1/16) = 1.25.
@pytest.mark.parametrize(
    ("kind", "text", "total"), [("paper", 2.0, (2 + 2) / 2), ("released", 1.25, 2 + 1.25 / 2)]
)
def test_how_towers_are_weighed(kind, text, total):
    collapsed = jnp.broadcast_to(jnp.array([60.0, 0.0]), (1, 1, 4, 2))
    outputs = {
        "image_aux": {"router_logits": collapsed},
        "text_aux": {"router_logits": collapsed.at[0, 0, 3].set(jnp.array([0.0, 60.0]))},
    }
    mask = jnp.array([[True, True, True, False]])
    found = losses.balance_losses(outputs, mask, 1, 0.01, kind)
    np.testing.assert_allclose(found["balance_image"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(found["balance_text"], text, rtol=1e-6)
    np.testing.assert_allclose(found["balance_loss"], 0.01 * total, rtol=1e-6)


def test_a_dense_model_has_no_balance():
    outputs = {"image_aux": {}, "text_aux": {}}
    assert losses.balance_losses(outputs, jnp.ones((1, 4)), 2, 0.01) == {}


def test_an_unknown_balance_says_which_there_are():
    aux = {"router_logits": jnp.zeros((1, 1, 2, 2))}
    with pytest.raises(ValueError, match="balance='mean' is not known: choose 'paper' or 'released'"):
        losses.balance_losses({"image_aux": aux, "text_aux": aux}, jnp.ones((1, 2)), 1, 0.01, "mean")


def test_only_keys_that_end_in_loss_are_summed():
    found = {"contrastive_loss": 2.0, "balance_loss": 0.5, "balance_image": 100.0, "loss_scale": 100.0}
    assert losses.total_loss(found) == 2.5


def test_memory_of_the_global_loss_shrinks_with_the_devices():
    """4,096 pairs: no device of eight holds the whole similarity matrix."""
    pairs, width, peak = 4096, 16, {}
    for num_devices in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
        rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

        def loss(images, texts, logit_scale):
            return losses.contrastive_loss(images, texts, logit_scale, 0.1)["contrastive_loss"]

        features = jax.ShapeDtypeStruct((pairs, width), jnp.float32, sharding=rows)
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        step = jax.jit(
            jax.value_and_grad(loss, (0, 1, 2)), out_shardings=(everywhere, (rows, rows, everywhere))
        )
        compiled = step.lower(features, features, scale).compile()
        peak[num_devices] = compiled.memory_analysis().temp_size_in_bytes
    whole = 4 * pairs**2
    assert peak[1] > whole and peak[8] < peak[1] / 7
    assert f"f32[{pairs},{pairs}]" not in compiled.as_text()


def test_short_captions_see_the_principal_components_of_the_images():
    """Against scikit-learn's PCA, cross-entropy by torch-like sums: features keep the length that they have
    after the projection."""
    from scipy.special import log_softmax
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(12, 8)), rng.normal(size=(12, 8))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    pca = PCA(3).fit(images)
    logits = 20 * pca.inverse_transform(pca.transform(images)) @ texts.T
    own = np.arange(12)
    expected = -(log_softmax(logits, 1)[own, own] + log_softmax(logits, 0)[own, own]).mean() / 2
    found = losses.short_caption_loss(
        5 * jnp.asarray(images, jnp.float32),
        jnp.asarray(texts, jnp.float32),
        jnp.log(20.0),
        num_components=3,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_with_every_component_short_captions_have_the_contrastive_loss_and_its_gradient():
    rng = np.random.default_rng(1)
    images, texts = (jnp.asarray(rng.normal(size=(12, 8)), jnp.float32) for _ in range(2))

    def short(images):
        return losses.short_caption_loss(images, texts, jnp.log(20.0), 0.1)

    def long(images):
        return losses.contrastive_loss(images, texts, jnp.log(20.0), 0.1)["contrastive_loss"]

    found, expected = jax.value_and_grad(short)(images), jax.value_and_grad(long)(images)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_the_gradient_of_short_captions_is_finite_for_fewer_images_than_components():
    """Where all but a few components explain nothing at all, which a derivative of them could not bear."""
    images = jnp.eye(4, 16)
    grad = jax.grad(lambda x: losses.short_caption_loss(x, jnp.eye(4, 16), jnp.log(20.0)))(images)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_router_z_by_hand_without_padding():
    """logsumexp of (0, 0) is ln 2, of (ln 3, ln 5) ln 8; a third token is padding. Block 1 adds ln 2
    to each logit, which makes ln 4 and ln 16."""
    tokens = jnp.log(jnp.array([[1.0, 1.0], [3.0, 5.0], [1e9, 1e9]]))
    logits = jnp.stack([tokens, tokens + jnp.log(2.0)])[None]  # (B, M, L, E)
    mask = jnp.array([[True, True, False]])
    expected = ((LN(2) ** 2 + LN(8) ** 2) / 2 + (LN(4) ** 2 + LN(16) ** 2) / 2) / 2
    np.testing.assert_allclose(losses.router_z(logits, mask), expected, rtol=1e-6)
    gradient = jax.grad(lambda x: losses.router_z(x, mask))(logits)
    assert not np.any(gradient[:, :, 2]) and np.all(gradient[:, :, :2])

    # All image tokens count: (ln 2)^2 each.
    outputs = {
        "image_aux": {"router_logits": jnp.zeros((1, 1, 4, 2))},
        "text_aux": {"router_logits": logits},
    }
    found = losses.router_z_loss(outputs, mask, 0.01)["router_z_loss"]
    np.testing.assert_allclose(found, 0.01 * (LN(2) ** 2 + expected) / 2, rtol=1e-6)
