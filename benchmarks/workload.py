"""The work that both sides of `benchmarks.steps` do: sizes, parameters, a batch, and the FLOPs that count.

Letters: B pairs, L length of text.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import trees
from clipmoe_jax.data.packing import pack, place_captions, with_room
from clipmoe_jax.dmu.recipe import TRAIN_BLOCKS, TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_ROUTERS
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import VARIANTS, Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.inputs import END_ID, PAD_ID, START_ID
from clipmoe_jax.models.transformer import num_visited_experts
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import MAX_LOGIT_SCALE, LossConfig

TINY = ClipConfig(  # to try the command with
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=2, head_width=32),
    text=TextConfig(width=64, num_layers=2, head_width=32),
)
RULES = {"mcl": TRAIN_FFN, "everything": TRAIN_EVERYTHING, "router": TRAIN_ROUTERS}
CAPTION_DEVIATION = 20  # tokens


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of a step. text: the context length. caption_tokens: mean length of the captions; 0 fills the
    context. platform: as `sharding.platform`. remat: of our steps. keep: the experts and routers of
    `configs/vit_l14_sharegpt4v.py:keep`, with the contrastive loss."""

    variant: str
    batch: int
    text: int
    dtype: str
    platform: str
    caption_tokens: int = 0
    remat: str = "none"
    expert_dropout_rate: float = 0.1
    keep: bool = False

    def config(self) -> ConfigDict:
        """Returns the default config at these sizes."""
        config = configs.default_config()
        architecture = (VARIANTS | {"tiny": TINY})[self.variant]
        text = dataclasses.replace(architecture.text, context_length=self.text)
        configs.set_architecture(config, dataclasses.replace(architecture, text=text))
        config.compute.dtype, config.compute.remat = self.dtype, self.remat
        config.moe.expert_dropout_rate = self.expert_dropout_rate
        if self.keep:
            config.moe.update(expert_layers="attention_and_feed_forward", routing="token_and_sequence")
            config.router.gradient = "all"
        config.mcl.batch_size = config.router.batch_size = self.batch
        return config

    def model(self, kind: str) -> Clip:
        """Returns the module of a kind of step, a key of RULES, as a run has it on this platform."""
        config, routers = self.config(), kind == "router"
        moe = configs.moe_config(config) if routers else None
        gradient = config.router.gradient if routers else "chosen"
        compute = configs.compute_config(
            config, self.platform, training_routers=routers, router_gradient=gradient
        )
        return Clip(dataclasses.replace(configs.architecture(config), moe=moe), compute)

    def phase(self, kind: str) -> tuple[PhaseConfig, LossConfig]:
        """Returns optimizer and loss of a kind of step."""
        config = self.config()
        section = config.router if kind == "router" else config.mcl
        balance = config.router.balance_coefficient if kind == "router" else 0.0
        return configs.phase_config(section), LossConfig(section.label_smoothing, balance)

    def params(self, kind: str) -> dict:
        """Returns random params on the device, the same ones on every device, with a stage's logit_scale."""
        return _params(self.model(kind).config)

    def rules(self, kind: str) -> trees.Rules:
        """Returns which parameters train in a kind of step."""
        return TRAIN_BLOCKS if self.keep and kind == "mcl" else RULES[kind]

    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each caption, start and end counted: int (B,)."""
        if not self.caption_tokens:
            return np.full(self.batch, self.text)
        drawn = np.random.default_rng(0).normal(self.caption_tokens, CAPTION_DEVIATION, self.batch)
        return np.clip(drawn.round().astype(int), 3, self.text)

    def make_batch(self) -> dict[str, Any]:
        """Returns what our loader would give one device: image uint8 (B, H, W, 3), text PackedText."""
        lengths = self.lengths()
        places = place_captions(lengths, 1, self.text)
        places = places._replace(num_rows=int(with_room(places.num_rows, len(lengths))))
        return {"image": self.images(), "text": pack(self.padded_tokens(), lengths, places, 1)}

    def images(self) -> np.ndarray:
        """Returns random pixels, uint8 (B, H, W, 3)."""
        size = self.config().base.architecture.vision.image_size
        return np.random.default_rng(1).integers(0, 256, (self.batch, size, size, 3), np.uint8)

    def padded_tokens(self) -> np.ndarray:
        """Returns random captions, int32 (B, L), padded to the context length as the released code does."""
        tokens = np.random.default_rng(2).integers(1, START_ID, (self.batch, self.text), np.int32)
        last, column = self.lengths()[:, None] - 1, np.arange(self.text)
        tokens[:, 0] = START_ID
        return np.where(column < last, tokens, np.where(column == last, END_ID, PAD_ID))

    def step_flops(self, kind: str) -> float:
        """Returns the FLOPs of a step's towers, forward and backward, without padding and recomputation."""
        model = self.model(kind)
        config, slots = model.config, num_visited_experts(model.config.moe, model.compute.router_gradient)
        trains = trees.match_rules(self.rules(kind), list(trees.flatten(abstract_params(config))))
        of_image = flops.forward_backward(config, trains, slots=slots, towers=["visual"])
        of_text: Callable[[int], float] = functools.cache(
            lambda length: flops.forward_backward(config, trains, length, slots, towers=["text"])
        )
        return float(self.batch * of_image + sum(map(of_text, self.lengths().tolist())))

    @property
    def matrix_size(self) -> int:
        """The side of the square product that shows what the device can do."""
        return 2048 if self.platform == "cpu" else 8192


@functools.lru_cache(maxsize=1)
def _params(config: ClipConfig) -> dict:
    size = config.vision.image_size
    images, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, config.text.context_length), jnp.int32)
    init = jax.jit(Clip(config).init)
    return init(jax.random.key(0), images, tokens)["params"] | {"logit_scale": jnp.float32(MAX_LOGIT_SCALE)}
