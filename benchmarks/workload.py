"""What `benchmarks.run` runs on both sides: sizes, parameters, a batch, and the FLOPs that count.

Letters: B pairs, L length of text, H heads, W head width.
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
from clipmoe_jax.data.packing import pack, place_captions
from clipmoe_jax.dmu.recipes import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_ROUTERS
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import VARIANTS, Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.inputs import END_ID, PAD_ID, START_ID
from clipmoe_jax.models.transformer import REMAT
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import MAX_LOGIT_SCALE, LossConfig

TINY = ClipConfig(  # to try the command with
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=2, head_width=32),
    text=TextConfig(width=64, num_layers=2, head_width=32),
)
RULES = {"mcl": TRAIN_FFN, "router": TRAIN_ROUTERS, "everything": TRAIN_EVERYTHING}
CAPTION_DEVIATION = 20  # tokens

# {name: (length, causal, whether with the gradient)}: ViT-B/32, ViT-B/16, stretched text, ViT-L/14, L/14@336.
ATTENTION = {
    f"L={length}{', causal' * causal}, {'forward+gradient' if gradient else 'forward'}": (
        length,
        causal,
        gradient,
    )
    for length, causal in ((50, False), (197, False), (248, True), (257, False), (577, False))
    for gradient in (False, True)
}

# {group: kind of step}: what the section `settings` times, with the choices of `setting_choices`.
SETTINGS = {"experts": "router", "remat": "router"}


def setting_choices(group: str) -> list[str]:
    """The settings that a group of SETTINGS compares, each "FIELD=VALUE …" of a config."""
    return {
        "experts": ["moe.dispatch=ragged", "moe.dispatch=dense"],
        "remat": [f"compute.remat={name}" for name in REMAT],
    }[group]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of everything. text: the context length. caption_tokens: mean length of the captions, 0 is all of
    the context. platform: "cpu", "tpu", "gpu" or "cuda", as `sharding.platform`. remat: of our steps.
    settings: "FIELD=VALUE …" of the config, instead of its own."""

    variant: str
    batch: int
    text: int
    dtype: str
    platform: str
    caption_tokens: int = 0
    remat: str = "none"
    expert_dropout_rate: float = 0.1
    settings: str = ""

    def config(self) -> ConfigDict:
        """The default config at these sizes."""
        config = configs.default_config()
        model = (VARIANTS | {"tiny": TINY})[self.variant]
        text = dataclasses.replace(model.text, context_length=self.text)
        config.base.architecture = ConfigDict(dataclasses.replace(model, text=text).to_dict())
        config.compute.dtype, config.compute.remat = self.dtype, self.remat
        config.moe.expert_dropout_rate = self.expert_dropout_rate
        for section in (config.mcl, config.router):
            section.batch_size = self.batch
        config.update_from_flattened_dict(dict(setting.split("=") for setting in self.settings.split()))
        return config

    def model(self, kind: str) -> Clip:
        """The module of a kind of step ("mcl", "router", "everything"), as a run has it here."""
        config, routers = self.config(), kind == "router"
        dense = configs.architecture(config)
        moe = configs.moe_config(config) if routers else None
        run = configs.compute_config(config, self.platform, training_routers=routers)
        return Clip(dataclasses.replace(dense, moe=moe), run)

    def phase(self, kind: str) -> tuple[PhaseConfig, LossConfig]:
        """Optimizer and loss of a kind of step."""
        config = self.config()
        section = config.router if kind == "router" else config.mcl
        balance = config.router.balance_coefficient if kind == "router" else 0.0
        return configs.phase_config(section), LossConfig(section.label_smoothing, balance)

    def params(self, kind: str) -> dict:
        """Random params on the device, the same ones on every device. logit_scale is a stage's ln 100."""
        return _params(self.model(kind).config)

    def lengths(self, num_pairs: int) -> np.ndarray:
        """(B,) int: tokens of each caption, start and end counted."""
        if not self.caption_tokens:
            return np.full(num_pairs, self.text)
        drawn = np.random.default_rng(0).normal(self.caption_tokens, CAPTION_DEVIATION, num_pairs)
        return np.clip(drawn.round().astype(int), 3, self.text)

    def make_batch(self, num_pairs: int) -> dict[str, Any]:
        """What our loader would give one device: image uint8 (B, H, W, 3), text PackedText."""
        lengths, steps = self.lengths(num_pairs), self.config().data.packing_steps
        places = place_captions(lengths, 1, self.text, steps)
        text = pack(self.padded_tokens(num_pairs), lengths, places, 1)
        return {"image": self.images(num_pairs), "text": text}

    def images(self, num_pairs: int) -> np.ndarray:
        """Random pixels, uint8 (B, H, W, 3)."""
        size = self.config().base.architecture.vision.image_size
        return np.random.default_rng(1).integers(0, 256, (num_pairs, size, size, 3), np.uint8)

    def padded_tokens(self, num_pairs: int) -> np.ndarray:
        """Random captions, int32 (B, text), padded to the context length as the released code does."""
        tokens = np.random.default_rng(2).integers(1, START_ID, (num_pairs, self.text), np.int32)
        lengths = self.lengths(num_pairs)[:, None]
        tokens[:, 0] = START_ID
        column = np.arange(self.text)
        return np.where(column < lengths - 1, tokens, np.where(column == lengths - 1, END_ID, PAD_ID))

    def forward_flops(self, tower: str, num_pairs: int) -> float:
        """Of encoding a dense batch's images ("visual") or captions ("text"), padding left out."""
        return self._of_batch(tower, num_pairs, lambda length: self._forward(tower, length))

    def pair_flops(self, num_pairs: int) -> float:
        """Of encoding both, images and captions."""
        return sum(self.forward_flops(tower, num_pairs) for tower in ("visual", "text"))

    def step_flops(self, kind: str) -> float:
        """Of a step's towers, forward and backward, padding left out; nothing computed again counts."""
        config = self.model(kind).config
        names = trees.flatten(abstract_params(config))
        trains = trees.match_rules(RULES[kind], list(names))

        def of_length(tower: str, length: int) -> float:
            return flops.forward_backward(config, trains, length, towers=[tower])

        return sum(
            self._of_batch(tower, self.batch, functools.partial(of_length, tower))
            for tower in ("visual", "text")
        )

    def _forward(self, tower: str, length: int) -> float:
        layers = flops.layers(self.model("mcl").config, tower, length)
        return sum(layer.flops for layer in layers)

    def _of_batch(self, tower: str, num_pairs: int, of_length: Callable[[int], float]) -> float:
        if tower == "visual":
            return num_pairs * of_length(self.text)
        lengths, counts = np.unique(self.lengths(num_pairs), return_counts=True)
        return float(sum(n * of_length(int(length)) for length, n in zip(lengths, counts, strict=True)))

    @property
    def matrix_size(self) -> int:
        """Of the square product that shows what the device can do."""
        return 2048 if self.platform == "cpu" else 8192

    @property
    def moe_sizes(self) -> dict[str, int]:
        """Of one MoE block: the vision tower's, with the tokens of a batch."""
        config = self.model("router").config
        vision, moe = config.vision, config.moe
        length = (vision.image_size // vision.patch_size) ** 2 + 1
        return {
            "tokens": self.batch * length,
            "width": vision.width,
            "hidden": 4 * vision.width,
            "experts": moe.num_experts,
            "selected": moe.num_selected_experts,
        }

    def moe_flops(self, dense: bool, gradient: bool) -> float:
        """Of one block: with frozen experts the gradient is that for inputs, and for the router's kernel."""
        sizes = self.moe_sizes
        product = 2 * sizes["tokens"] * sizes["width"]
        experts = 2 * product * sizes["hidden"] * (1 if dense else sizes["selected"])
        router = 0 if dense else product * sizes["experts"]
        return float(experts * (2 if gradient else 1) + router * (3 if gradient else 1))

    def attention_shape(self, name: str) -> tuple[int, int, int, int]:
        """(B, L, H, W) of a row of ATTENTION: text is causal, images are not."""
        length, causal, _ = ATTENTION[name]
        config = self.model("mcl").config
        tower = config.text if causal else config.vision
        return self.batch, length, tower.width // tower.head_width, tower.head_width

    def attention_flops(self, name: str) -> float:
        """Two products, and two more for the gradient of each; a causal mask's zeros count, as everywhere."""
        batch, length, heads, width = self.attention_shape(name)
        return float(2 * 2 * batch * heads * length**2 * width * (3 if ATTENTION[name][2] else 1))

    def attention_inputs(self, name: str) -> list[np.ndarray]:
        """Query, key, value and the gradient of the result, float32 (B, L, H, W)."""
        rng = np.random.default_rng(3)
        return [rng.normal(size=self.attention_shape(name)).astype(np.float32) for _ in range(4)]

    def groups(self, section: str) -> list[str]:
        """The groups of a section, each measured in one go."""
        return {
            "peak": ["square product"],
            "towers": ["image", "text"],
            "attention": list(ATTENTION),
            "moe": ["forward", "forward+gradient"],
            "steps": list(RULES),
            "embed": [str(self.batch * 2**i) for i in range(7)],
            "settings": list(SETTINGS),
        }[section]


@functools.lru_cache(maxsize=1)
def _params(config: ClipConfig) -> dict:
    size = config.vision.image_size
    images, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, config.text.context_length), jnp.int32)
    init = jax.jit(Clip(config).init)
    return init(jax.random.key(0), images, tokens)["params"] | {"logit_scale": jnp.float32(MAX_LOGIT_SCALE)}
