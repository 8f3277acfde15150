"""The recipe table worked out for a config: each phase that trains, over which model, for how many steps."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.data.loader import SHORT_LENGTH
from clipmoe_jax.dmu import recipes
from clipmoe_jax.dmu.recipe import ROUTER_NAME, Budget, Recipe
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import ClipConfig, abstract_params
from clipmoe_jax.models.transformer import ComputeConfig, num_visited_experts
from clipmoe_jax.train.adapters import NO_ADAPTERS, Adapters, add_adapters
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import LossConfig

FEW_STEPS = 200  # of a phase on few pairs: many enough for a warm-up of a tenth


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """A phase before it runs.

    Attributes:
        name: the recipe's.
        stage: the stage that trains it.
        architecture: the model's.
        compute: how the model is computed.
        rules: which parameters train.
        hyperparameters: those of its section of the config.
        num_steps: the steps that the config asks for with so many pairs.
        short_length: tokens of the short captions that it sees beside the long ones, 0 for none.
        frozen_dtype: the type that frozen matrices are held in.
        is_bound: whether it may take fewer steps: mcl.small_clusters=drop leaves pairs out of an epoch.
        number: of an MCL stage, 0 for other phases.
        adapters: that train, if any.
        loss: of its own steps.
        rehearsed: the share of its steps that rehearse.
    """

    name: str
    architecture: ClipConfig
    compute: ComputeConfig
    rules: trees.Rules
    hyperparameters: PhaseConfig
    num_steps: int
    short_length: int = 0
    frozen_dtype: str = "float32"
    stage: str = ""
    is_bound: bool = False
    number: int = 0
    adapters: Adapters = NO_ADAPTERS
    loss: LossConfig = LossConfig()
    rehearsed: float = 0.0

    def with_remat(self, remat: str) -> "PlannedPhase":
        """Returns the phase with another `ComputeConfig.remat`."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, remat=remat))

    @property
    def step_key(self) -> tuple:
        """Returns what the compiled step depends on: phases with equal keys share one."""
        any_length = dataclasses.replace(self.hyperparameters, num_steps=0)
        model = self.architecture, self.compute, tuple(self.rules)
        shapes = self.short_length, self.frozen_dtype, self.adapters
        return *model, any_length, *shapes, self.loss


def architectures_of(config: ConfigDict) -> tuple[ClipConfig, ClipConfig]:
    """Returns the architectures of the base and of the CLIP-MoE."""
    made = recipes.recipes(config)
    return configs.architecture(config), architecture_of(config, made[ROUTER_NAME])


def architecture_of(config: ConfigDict, recipe: Recipe) -> ClipConfig:
    """Returns the architecture of a recipe's model."""
    base = configs.architecture(config)
    if recipe.group == "base":
        return base
    dense = dataclasses.replace(base, moe=None)
    if not recipe.is_moe(config):
        return dense
    num_experts = len(recipe.experts(config))
    if recipe.extends(config):
        num_experts = configs.num_experts(config)
    num_selected = min(num_experts, config.moe.num_selected_experts)
    moe = dataclasses.replace(
        configs.moe_config(config), num_experts=num_experts, num_selected_experts=num_selected
    )
    if recipe.group != "moe":
        moe = dataclasses.replace(moe, sequence_share=0.0)
    return dataclasses.replace(dense, moe=moe)


def phases_of(
    config: ConfigDict, platform: str, num_pairs: int, num_base_pairs: int = 0
) -> list[PlannedPhase]:
    """Returns the phases of a config in order, for so many training pairs on a platform.

    num_base_pairs: how many pairs a base is trained on from scratch; 0 is as many as num_pairs.
    Raises ValueError naming each section whose batch is larger than the data, or whose warm-up does not fit,
    each baseline for which a budget leaves too few steps, and more clusters than pairs.
    """
    trained = [recipe for recipe in recipes.recipes(config).values() if _is_trained(config, recipe)]
    steps: dict[str, int] = {}
    errors = Errors()
    if num_pairs < config.cluster.num_clusters:
        errors.add(
            f"cluster.num_clusters={config.cluster.num_clusters} is more than the {num_pairs} training "
            "pairs: take more data or choose fewer clusters"
        )
    for recipe in trained:
        pairs = num_base_pairs or num_pairs if recipe.group == "base" else num_pairs
        fields, hyperparameters = recipe.fields(config), configs.phase_config(recipe.hyperparameters(config))
        with errors.of():
            if recipe.num_steps is None:
                steps[recipe.name] = steps_of_section(fields, hyperparameters, pairs)
            else:
                _check_batch(fields, hyperparameters, pairs)
    errors.raise_all()
    phases, planned = [], budget(config, steps.__getitem__, num_pairs)
    for recipe in trained:
        if recipe.num_steps is not None:
            steps[recipe.name] = recipe.num_steps(planned, recipe)
            with errors.of():
                check_steps(config, recipe, steps[recipe.name])
        compute = compute_of(config, recipe, platform)
        architecture = architecture_of(config, recipe)
        loss = loss_config(config, recipe)
        phase = PlannedPhase(
            recipe.name,
            architecture,
            compute,
            recipe.rules(config),
            configs.phase_config(recipe.hyperparameters(config)),
            steps[recipe.name],
            short_length=short_length_of(config) if loss.short_caption_weight else 0,
            frozen_dtype=frozen_dtype(config, compute),
            stage=recipe.stage,
            is_bound=_is_bound(config, recipe),
            number=recipe.number if recipe.group == "stage" else 0,
            adapters=recipe.adapters(config),
            loss=loss,
            rehearsed=recipe.rehearsal_of(config)[0],
        )
        phases.append(phase)
    errors.raise_all()
    return phases


def short_length_of(config: ConfigDict) -> int:
    """Returns the tokens of short captions."""
    return min(SHORT_LENGTH, config.base.architecture.text.context_length)


def flops_of_training(
    config: ClipConfig,
    trains: Mapping[str, bool],
    short_length: int = 0,
    teacher: int | ClipConfig | None = None,
    rehearsed: float = 0.0,
    slots: float = 0,
) -> float:
    """Returns the FLOPs of a pair in a training step, mean over steps.

    trains, slots: as of `flops.forward_backward`. short_length: of short captions, 0 for none. teacher: as of
    `LossConfig`; it encodes the pairs too, but for one that is an expert in the steps that rehearse.
    """
    total = flops.forward_backward(config, trains, slots=slots)
    if short_length:
        total += flops.forward_backward(config, trains, short_length, slots, ["text"])
    if isinstance(teacher, ClipConfig):
        total += flops.forward(teacher)
    elif teacher is not None:
        total += (1 - rehearsed) * flops.forward(dataclasses.replace(config, moe=None))
    return total


def trained_params(config: ClipConfig, adapters: Adapters) -> dict:
    """Returns a model's params while it trains, as ShapeDtypeStructs: with the adapters that it has."""
    params = abstract_params(config)
    if not any(adapters):
        return params
    return jax.eval_shape(lambda tree: add_adapters(tree, jax.random.key(0), adapters), params)


@functools.cache
def placed_params(mesh: Mesh | AbstractMesh, config: ClipConfig, adapters: Adapters = NO_ADAPTERS) -> dict:
    """Returns `trained_params` with the shardings of PARAM_RULES; traced once."""
    params = trained_params(config, adapters)
    return jax.tree.map(
        lambda leaf, placed: leaf.update(sharding=placed), params, sharding.param_shardings(mesh, params)
    )


def _is_trained(config: ConfigDict, recipe: Recipe) -> bool:
    if recipe.group == "base":
        return not config.base.checkpoint and bool(config.data.base)
    return recipe.group != "ensemble"


def check_steps(config: ConfigDict, recipe: Recipe, num_steps: int) -> None:
    """Raises ValueError for a baseline whose length, worked out from other models, is that of its warm-up."""
    if num_steps <= (warmup := recipe.hyperparameters(config).warmup_steps):
        raise ValueError(
            f"baselines: {recipe.name!r} gets {num_steps} steps, and {recipe.fields(config)}.warmup_steps="
            f"{warmup}: leave it out, or train what its length comes from for longer"
        )


def budget(config: ConfigDict, steps: Callable[[str], int], num_pairs: int) -> Budget:
    """Returns what models cost to train on so many training pairs. steps: as in `Budget`."""
    made = recipes.recipes(config)

    @functools.cache  # every row asks for those of the rows before it
    def flops_of_pair(name: str) -> float:
        architecture = architecture_of(config, made[name])
        names = list(trees.flatten(trained_params(architecture, made[name].adapters(config))))
        trains = trees.match_rules(made[name].rules(config), names)
        loss, (rehearsed, _) = loss_config(config, made[name]), made[name].rehearsal_of(config)
        short_length = short_length_of(config) if loss.short_caption_weight else 0
        slots = num_visited_experts(architecture.moe, made[name].router_gradient(config))
        return flops_of_training(architecture, trains, short_length, loss.teacher, rehearsed, slots)

    encoding = num_pairs * flops.forward(configs.architecture(config))
    return Budget(config, steps, flops_of_pair, encoding)


def compute_of(config: ConfigDict, recipe: Recipe, platform: str) -> ComputeConfig:
    """Returns how a recipe's model is computed while it trains."""
    return configs.compute_config(
        config,
        platform,
        training_routers=recipe.is_moe(config),
        router_gradient=recipe.router_gradient(config),
    )


def loss_config(config: ConfigDict, recipe: Recipe) -> LossConfig:
    """Returns the losses that a recipe trains by: the config's, those of routers in an MoE, and its own."""
    section, router, has_routers = recipe.hyperparameters(config), config.router, recipe.is_moe(config)
    losses = LossConfig(
        label_smoothing=section.label_smoothing,
        balance_coefficient=router.balance_coefficient if has_routers else 0.0,
        balance=router.balance,
        z_loss_coefficient=router.z_loss_coefficient if has_routers else 0.0,
        short_caption_weight=0.0 if recipe.group == "base" else config.loss.short_caption_weight,
    )
    if recipe.group == "moe" and router.loss == "features":
        losses = dataclasses.replace(losses, imitates="features", teacher=configs.num_experts(config) - 1)
    if recipe.teacher:
        teacher = architecture_of(config, recipes.recipes(config)[recipe.teacher])
        losses = dataclasses.replace(losses, imitates="features", teacher=teacher, short_caption_weight=0.0)
    return dataclasses.replace(losses, **recipe.losses(config))


def frozen_dtype(config: ConfigDict, compute: ComputeConfig) -> str:
    """Returns the type that frozen matrices are held in."""
    return config.compute.frozen_dtype or compute.dtype


def steps_of_section(section: str, hyperparameters: PhaseConfig, num_pairs: int) -> int:
    """Returns how many steps a section's phase takes on so many pairs.

    Raises ValueError naming the section if its batch is larger than the data, or its warm-up does not fit,
    with flags that do.
    """
    _check_batch(section, hyperparameters, num_pairs)
    try:
        return hyperparameters.length(num_pairs // hyperparameters.batch_size)
    except ValueError as error:
        if hyperparameters.num_steps:  # with which it fits no number of pairs
            raise ValueError(f"{section}: {error}") from error
        fitting = _fitting_flags(section, hyperparameters, num_pairs)
        raise ValueError(f"{section}: {error}, such as {fitting}") from error


def _fitting_flags(section: str, hyperparameters: PhaseConfig, num_pairs: int) -> str:
    """Flags with which a section's phase fits so few pairs.

    An epoch has about as many batches as a batch has pairs, which clusters of few pairs can fill; and a phase
    has an epoch or FEW_STEPS, whichever is longer.
    """
    batch_size = 2 ** (max(num_pairs, 1).bit_length() // 2)
    settings = {"batch_size": batch_size}
    if not section.startswith("baseline_settings."):  # whose length may follow from other models'
        num_steps = max(FEW_STEPS, num_pairs // batch_size)
        settings |= {"num_steps": num_steps, "warmup_steps": FEW_STEPS // 10}
    if batch_size % hyperparameters.accumulation_steps:
        settings["accumulation_steps"] = 1
    return " ".join(f"--config.{section}.{name}={value}" for name, value in settings.items())


def _check_batch(section: str, hyperparameters: PhaseConfig, num_pairs: int) -> None:
    if num_pairs < hyperparameters.batch_size:
        raise ValueError(
            f"{section}.batch_size={hyperparameters.batch_size} is more than the {num_pairs} training pairs: "
            f"take more data, or {_fitting_flags(section, hyperparameters, num_pairs)}"
        )


def check_rehearsal(config: ConfigDict, num_records: Mapping[str, int]) -> None:
    """Raises ValueError naming a section whose batches are larger than what it rehearses.

    num_records: of each data set of the run, by its name.
    """
    errors = Errors()
    for recipe in recipes.recipes(config).values():
        fraction, kind = recipe.rehearsal_of(config)
        batch_size = recipe.hyperparameters(config).batch_size
        for name in ("rehearsal", *(["rehearsal_captions"] if kind == "distill" else [])):
            if fraction and num_records.get(name, batch_size) < batch_size:
                errors.add(
                    f"{recipe.section}.batch_size={batch_size} is more than the {num_records[name]} records "
                    f"of data.{name}: choose a smaller batch or more data"
                )
    errors.raise_all()


def _is_bound(config: ConfigDict, recipe: Recipe) -> bool:
    """Whether small clusters that are dropped may make it shorter than planned."""
    by_stages = recipe.sampler == "clusters" or recipe.num_steps is not None
    return by_stages and config.mcl.small_clusters == "drop" and not config.mcl.num_steps


def check_mesh(mesh: Mesh | AbstractMesh, phases: Iterable[PlannedPhase]) -> None:
    """Raises ValueError naming each phase whose batch or parameters cannot be split over the mesh; of phases
    alike the first."""
    errors, checked = Errors(), set()
    for phase in phases:
        settings, architecture = phase.hyperparameters, phase.architecture
        key = settings.batch_size, settings.accumulation_steps, architecture
        if key in checked:
            continue
        checked.add(key)
        with errors.of(phase.name):
            sharding.check_batch(mesh, settings.batch_size, settings.accumulation_steps)
            if mesh.size > mesh.shape["data"]:  # else every device holds all of them
                sharding.param_shardings(mesh, abstract_params(architecture))
    errors.raise_all()
