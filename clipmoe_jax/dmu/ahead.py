"""Begins to compile the steps of later phases, while earlier ones train."""

import jax

from clipmoe_jax.core import artifacts, sharding
from clipmoe_jax.dmu import recipes
from clipmoe_jax.dmu.phases import PlannedPhase, phases_of, placed_params
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.training import settings_of, shuffled
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.train.programs import programs_of_phase


def compile_ahead(run: Run) -> None:
    """Begins to compile what the phases to come will run, as far as it is known when the base is there.

    That leaves out the stages, whose batches depend on clusters. It is also left out on several GPU
    processes, which share the trying out of kernels and so must compile the same at the same time.
    """
    if sharding.platform() not in ("cpu", "tpu") and jax.process_count() > 1:
        return
    made = recipes.recipes(run.config)
    num_base_pairs = len(run.records("base")) if "base" in run.datasets else 0
    planned = phases_of(run.config, sharding.platform(), len(run.records("train")), num_base_pairs)
    for phase in planned:
        recipe = made[phase.name]
        is_known = recipe.group != "base" and recipe.sampler != "clusters"
        if is_known and not artifacts.is_done(run.workdir / recipe.folder):
            _begin(run, phase, recipe)


def _begin(run: Run, phase: PlannedPhase, recipe: recipes.Recipe) -> None:
    settings = settings_of(run, recipe, phase.architecture, shuffled(run, recipe), phase.num_steps)
    teacher = phase.loss.teacher
    programs = programs_of_phase(
        params=placed_params(run.mesh, phase.architecture, phase.adapters),
        frozen_dtype=phase.frozen_dtype,
        teacher=placed_params(run.mesh, teacher) if isinstance(teacher, ClipConfig) else None,
        **settings,
    )
    run.ahead.begin(recipe.name, run.mesh, programs)
