"""Compiles the steps of later phases while earlier ones train."""

import functools

import jax
import numpy as np
from etils import epath

from clipmoe_jax.core import artifacts, sharding
from clipmoe_jax.data.npy import array_shape
from clipmoe_jax.dmu import recipes
from clipmoe_jax.dmu.phases import PlannedPhase, phases_of, placed_params
from clipmoe_jax.dmu.recipe import Recipe
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.training import settings_of, shuffled
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.train.step_programs import programs_of_phase

# A compiler for GPUs tries kernels out on the device, beside the steps of a phase that trains there.
PLATFORMS = ("cpu", "tpu")


def compile_ahead(run: Run) -> None:
    """Begins to compile what the phases to come will run, as far as it is known when the base is there.

    Left out are stages, whose batches depend on clusters; phases with short captions where others have none,
    as their data would be held twice; and runs of a sweep, which may copy each other's models.
    """
    if sharding.platform() not in PLATFORMS or run.siblings:
        return
    made, has_short = recipes.recipes(run.config), run.config.loss.short_caption_weight > 0
    num_base_pairs = len(run.records("base")) if "base" in run.datasets else 0
    planned = phases_of(run.config, sharding.platform(), len(run.records("train")), num_base_pairs)
    for phase in planned:
        recipe = made[phase.name]
        is_known = recipe.group != "base" and recipe.sampler != "clusters"
        if is_known and (phase.loss.short_caption_weight > 0) == has_short:
            if not artifacts.is_done(run.workdir / recipe.folder):
                _begin(run, phase, recipe)


def _begin(run: Run, phase: PlannedPhase, recipe: Recipe) -> None:
    sampler, teacher = shuffled(run, recipe), phase.loss.teacher
    settings = settings_of(run, recipe, phase.architecture, sampler, phase.num_steps, read=_described)
    make_programs = functools.partial(
        programs_of_phase,
        params=placed_params(run.mesh, phase.architecture, phase.adapters),
        frozen_dtype=phase.frozen_dtype,
        teacher=placed_params(run.mesh, teacher) if isinstance(teacher, ClipConfig) else None,
        **settings,
    )
    run.ahead.begin(recipe.name, run.mesh, make_programs)


def _described(targets: epath.Path) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array_shape(targets), np.float32)
