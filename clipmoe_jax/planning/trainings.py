"""The stages of a config that train: what each trains, by which rules, for how long."""

import dataclasses
import functools
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.data.loader import SHORT_LENGTH
from clipmoe_jax.dmu.recipes import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_MOE, TRAIN_ROUTERS
from clipmoe_jax.models.clip import ClipConfig, abstract_params
from clipmoe_jax.models.transformer import ComputeConfig
from clipmoe_jax.train.phase import PhaseConfig


@dataclasses.dataclass(frozen=True)
class Training:
    """A stage that trains: the model it trains, by which rules, for how long. short_length: of the short
    captions that it sees beside the long ones. frozen_dtype: what frozen matrices are held in."""

    name: str
    config: ClipConfig
    compute: ComputeConfig
    rules: trees.Rules
    phase: PhaseConfig
    num_steps: int
    short_length: int = 0
    frozen_dtype: str = "float32"

    @property
    def stage(self) -> str:
        """The pipeline's stage that trains it: all baselines are one."""
        return "baselines" if self.name in configs.BASELINES else self.name

    @property
    def kind(self) -> tuple:
        """Stages of one kind compile to one step."""
        phase = dataclasses.replace(self.phase, num_steps=0)
        return self.config, self.compute, tuple(self.rules), phase, self.short_length, self.frozen_dtype


def models_of(config: ConfigDict) -> tuple[ClipConfig, ClipConfig]:
    """The dense base and the CLIP-MoE."""
    dense = configs.architecture(config)
    return dense, dataclasses.replace(dense, moe=configs.moe_config(config))


def trainings(config: ConfigDict, platform: str, num_pairs: int) -> Iterator[Training]:
    """The stages of a config that train, in order."""
    dense, moe = models_of(config)
    mcl, router = configs.phase_config(config.mcl), configs.phase_config(config.router)
    compute = configs.compute_config(config, platform)
    stage = functools.partial(Training, frozen_dtype=config.compute.frozen_dtype or compute.dtype)
    routing = configs.compute_config(config, platform, training_routers=True)
    mcl_steps = mcl.length(num_pairs // mcl.batch_size)
    router_steps = router.length(num_pairs // router.batch_size)
    if not config.base.checkpoint and config.data.digit_scenes:
        phase = configs.phase_config(config.base.train)
        steps = phase.length(num_pairs // phase.batch_size)
        yield stage("base", dense, compute, TRAIN_EVERYTHING, phase, steps)
    num_stages, of_long_clip = config.mcl.num_stages, min(SHORT_LENGTH, dense.text.context_length)
    short = of_long_clip if config.loss.short_caption_weight else 0
    for number in range(1, num_stages + 1):
        yield stage(f"mcl_{number}", dense, compute, TRAIN_FFN, mcl, mcl_steps, short)
    yield stage("router", moe, routing, TRAIN_ROUTERS, router, router_steps, short)
    same_pairs = math.ceil(num_stages * mcl_steps + router_steps * router.batch_size / mcl.batch_size)
    pair = moe_of_two(moe)
    for name, *rest in (
        ("direct_ft", dense, compute, TRAIN_FFN, mcl, mcl_steps, short),
        ("direct_ft_same_pairs", dense, compute, TRAIN_FFN, mcl, same_pairs, short),
        ("full_ft", dense, compute, TRAIN_EVERYTHING, mcl, mcl_steps, short),
        ("long_clip", dense, compute, TRAIN_EVERYTHING, mcl, mcl_steps, of_long_clip),
        ("base_ft_moe", pair, routing, TRAIN_ROUTERS, router, router_steps, short),
        ("sparse_upcycling", moe, routing, TRAIN_MOE, mcl, mcl_steps, short),
        ("drop_upcycling", moe, routing, TRAIN_MOE, mcl, mcl_steps, short),
        ("clip_up", moe, routing, TRAIN_EVERYTHING, mcl, mcl_steps, short),
    ):
        if name in config.baselines:
            yield stage(name, *rest)


def check_mesh(mesh: Mesh | AbstractMesh, training: Training) -> None:
    """Raises ValueError if its batch or its parameters cannot be split over the mesh."""
    try:
        sharding.check_batch(mesh, training.phase.batch_size, training.phase.accumulation_steps)
        if mesh.size > mesh.shape["data"]:  # else every device holds all of them
            sharding.param_shardings(mesh, abstract_params(training.config))
    except ValueError as error:
        raise ValueError(f"{training.name}: {error}") from error


def moe_of_two(config: ClipConfig) -> ClipConfig:
    """The MoE of the base and one fine-tuned model."""
    moe = config.moe
    two = dataclasses.replace(moe, num_experts=2, num_selected_experts=min(2, moe.num_selected_experts))
    return dataclasses.replace(config, moe=two)
