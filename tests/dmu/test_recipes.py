"""The recipe table: order, dependencies, steps by hand, and names in one place."""

import pathlib

import pytest

from clipmoe_jax.config import default_config
from clipmoe_jax.dmu import recipes
from clipmoe_jax.dmu.phases import phases_of

PACKAGE = pathlib.Path(recipes.__file__).parents[1]


def config_of(*baselines: str, num_stages: int = 3):
    config = default_config()
    config.mcl.num_stages, config.baselines = num_stages, baselines
    config.data.base = "pairs"
    return config


def test_recipes_come_after_those_they_are_made_from():
    config = config_of(*reversed(recipes.baseline_names()))
    made: set[str] = set()
    for recipe in recipes.recipes(config).values():
        assert set(recipe.experts(config)) <= made, recipe.name
        made.add(recipe.name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora"], "baselines='lora': choose one of direct_ft, "),
        (["base_ft_moe"], "made from 'direct_ft': add"),
    ],
)
def test_baseline_that_cannot_be_made_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        recipes.recipes(config_of(*names))


def test_tables_have_base_baselines_stages_ensemble_and_clip_moe_in_this_order():
    titles = [row.title for row in recipes.table_rows(config_of(*recipes.baseline_names(), num_stages=2))]
    assert titles == [
        "base",
        "direct fine-tuning, one stage's steps",
        "direct fine-tuning, same total pairs",
        "full fine-tuning, one stage's steps",
        "Long-CLIP's recipe",
        "sparse upcycling",
        "Drop-Upcycling",
        "CLIP-UP's recipe",
        "base + FT MoE",
        "stage 1 alone",
        "stage 2 alone",
        "feature ensemble",
        "CLIP-MoE",
    ]


def test_same_pairs_counts_the_pairs_of_all_stages_and_the_routers():
    config = config_of(num_stages=2)
    config.mcl.batch_size, config.router.batch_size = 10, 8
    steps = {"mcl_1": 5, "mcl_2": 7, "router": 4}
    # 5 * 10 + 7 * 10 + 4 * 8 = 152 pairs, 15.2 batches of 10.
    assert recipes.same_pairs(recipes.StepCounts(config, steps.__getitem__)) == 16
    assert recipes.one_stage(recipes.StepCounts(config, steps.__getitem__)) == 5


def test_phases_have_the_steps_of_their_recipes():
    config = config_of(*recipes.baseline_names(), num_stages=2)
    for section in (config.base.train, config.mcl, config.router):
        section.batch_size, section.warmup_steps = 10, 1
    config.router.batch_size, config.base.train.num_steps = 25, 3
    phases = {phase.name: phase for phase in phases_of(config, "cpu", 105)}
    # An epoch of 105 pairs is 10 batches of 10, and 4 of 25; (2 * 10 * 10 + 4 * 25) / 10 = 30.
    expected = {"base": 3, "mcl_1": 10, "mcl_2": 10, "router": 4, "direct_ft": 10, "direct_ft_same_pairs": 30}
    assert {name: phases[name].num_steps for name in expected} == expected
    assert "feature_ensemble" not in phases and not any(phase.is_bound for phase in phases.values())


def test_steps_are_a_bound_where_small_clusters_are_dropped():
    """Which clusters are smaller than a batch is known after clustering alone."""
    config = config_of("direct_ft_same_pairs", "sparse_upcycling")
    config.mcl.small_clusters, config.base.checkpoint = "drop", "clip.pt"
    bounds = [phase.name for phase in phases_of(config, "cpu", 10**6) if phase.is_bound]
    assert bounds == ["mcl_1", "mcl_2", "mcl_3", "direct_ft_same_pairs"]
    config.mcl.num_steps = 500
    assert not any(phase.is_bound for phase in phases_of(config, "cpu", 10**6))


@pytest.mark.parametrize("name", recipes.baseline_names())
def test_names_of_baselines_stand_in_the_recipe_table_alone(name):
    files = [path.name for path in PACKAGE.rglob("*.py") if f'"{name}"' in path.read_text()]
    assert files == ["recipes.py"]


@pytest.mark.parametrize("name", ["base", "mcl_2", "router", "clip_up", "feature_ensemble"])
def test_recipe_is_found_by_the_name_of_its_phase(name):
    recipe = recipes.find_recipe(name)
    assert recipe is not None and recipe.name == name


def test_unknown_phase_has_no_recipe():
    assert recipes.find_recipe("mcl_x") is None and recipes.find_recipe("upcycle") is None
