"""Finds what a run made with other settings or from other data, before it begins."""

import itertools
from collections.abc import Collection, Iterator

from etils import epath

from clipmoe_jax import config as configs
from clipmoe_jax.core import artifacts, distributed
from clipmoe_jax.dmu import recipes
from clipmoe_jax.dmu.recipe import REHEARSAL_FOLDER, ROUTER_NAME
from clipmoe_jax.dmu.results import evaluation_folder, inputs_of_ensemble
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.stages import inputs_of_clusters, inputs_of_features, inputs_of_rehearsal
from clipmoe_jax.dmu.training import inputs_of, inputs_of_upcycling


def check_unchanged(run: Run) -> None:
    """Raises ValueError naming what differs, and every artifact of the run that was made otherwise.

    A stage would refuse its own artifact alone, and only when its turn comes.
    """

    def check() -> None:
        if changed := dict(_changed(run)):
            first, how = next(iter(changed.items()))
            raise ValueError(
                f"{first} {how}, choose another workdir, or delete what was made otherwise: "
                f"{' '.join(_whole_folders(changed))}"
            )

    distributed.on_main("artifacts are compared", check)


def _changed(run: Run) -> Iterator[tuple[epath.Path, str]]:
    """Artifacts that were made otherwise, and how; those that others are made from come first."""
    for path, inputs, partial in itertools.chain(_models(run), _evaluations(run)):
        if found := artifacts.difference(path, inputs, configs.upgrade_inputs, partial=partial):
            yield found


def _whole_folders(paths: Collection[epath.Path]) -> dict[str, None]:
    """The paths as texts, and a folder instead of all that is in it."""
    wholes = (path.parent if all(one in paths for one in path.parent.iterdir()) else path for path in paths)
    return dict.fromkeys(map(str, wholes))


def _models(run: Run) -> Iterator[tuple[epath.Path, dict, bool]]:
    """(Folder, inputs, whether it has others too) of each model and of what it is made from."""
    for recipe in recipes.recipes(run.config).values():
        if recipe.group == "ensemble":
            continue
        if recipe.sampler == "clusters":
            folder = run.workdir / f"stage_{recipe.number}"
            yield folder / "features", inputs_of_features(run, recipe.number), False
            yield folder / "clusters", inputs_of_clusters(run, recipe.number), False
        if recipe.is_moe(run.config):
            yield run.workdir / recipe.upcycled_folder, inputs_of_upcycling(run, recipe), False
        # A budget's steps are an input too.
        yield run.workdir / recipe.folder, inputs_of(run, recipe), recipe.num_steps is not None
        if recipe.group == "base" and recipes.imitates_base(run.config):
            yield run.workdir / REHEARSAL_FOLDER, inputs_of_rehearsal(run), False


def _evaluations(run: Run) -> Iterator[tuple[epath.Path, dict, bool]]:
    """The same of each model's numbers, which have what they are measured on for an input, too."""
    made = recipes.recipes(run.config)
    for recipe in recipes.table_rows(run.config):
        if recipe.group == "ensemble":
            members = recipe.experts(run.config)
            inputs = inputs_of_ensemble({name: inputs_of(run, made[name]) for name in members})
        else:
            inputs = inputs_of(run, recipe)
        if (folder := evaluation_folder(run, recipe)).exists():
            for path in sorted(folder.iterdir()):
                yield path, inputs, True
    yield run.workdir / "eval", inputs_of(run, made[ROUTER_NAME]), True
