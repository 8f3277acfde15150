"""The recipe table: order, dependencies, steps by hand, and names in one place."""

import dataclasses
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.config import default_config
from clipmoe_jax.config_checks import validate
from clipmoe_jax.core import trees
from clipmoe_jax.dmu import phases, recipes
from clipmoe_jax.dmu.phases import check_rehearsal, phases_of
from clipmoe_jax.dmu.recipe import Budget
from clipmoe_jax.dmu.stages import stages_of
from clipmoe_jax.models.flops import forward

PACKAGE = pathlib.Path(recipes.__file__).parents[1]
NAMES = [row.name for row in recipes.BASELINES]


def config_of(*baselines: str, num_stages: int = 3):
    config = default_config()
    config.mcl.num_stages, config.baselines = num_stages, baselines
    config.data.base = "pairs"
    return config


def keeping_config(*baselines: str, num_stages: int = 3):
    """With what controls need: consolidation and rehearsal."""
    config = config_of(*baselines, num_stages=num_stages)
    config.consolidation.num_epochs, config.router.rehearsal_fraction = 1, 0.25
    return config


def test_recipes_come_after_those_they_are_made_from():
    config = keeping_config(*reversed(NAMES))
    made: set[str] = set()
    for recipe in recipes.recipes(config).values():
        assert set(recipe.experts(config)) <= made, recipe.name
        made.add(recipe.name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ia3"], "baselines='ia3': choose one of direct_ft, "),
        (["base_ft_moe"], "made from 'direct_ft': add"),
        (["base_curriculum_ensemble"], "needs consolidation: set consolidation.num_epochs or .num_steps"),
        (["curriculum_same_flops"], "needs consolidation: set consolidation.num_epochs or .num_steps"),
        (["full_ft_rehearsed_same_pairs"], "as often as the routers do: set router.rehearsal_fraction"),
    ],
)
def test_baseline_that_cannot_be_made_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        recipes.recipes(config_of(*names))


def test_tables_have_base_baselines_stages_ensemble_and_clip_moe_in_this_order():
    names = ("clip_up", "direct_ft", "curriculum_rehearsed_throughout_same_pairs", "feature_ensemble")
    titles = [row.title for row in recipes.table_rows(keeping_config(*names, num_stages=2))]
    assert titles == [
        "base",
        "direct fine-tuning, one stage's steps",
        "dense curriculum, rehearsed throughout, same total pairs",
        "CLIP-UP's recipe",
        "stage 1 alone",
        "stage 2 alone",
        "dense curriculum",
        "feature ensemble",
        "CLIP-MoE",
    ]


# What a pair of 1 FLOP encoded, an MCL or consolidation pair of 3, and a router pair of 5 would cost, with
# batches of 10 and 8 and 100 training pairs.
def budget_by_hand(config):
    config.mcl.batch_size = config.consolidation.batch_size = 10
    config.router.batch_size = 8
    steps = {"mcl_1": 5, "mcl_2": 7, "consolidation": 6, "router": 4}
    flops = {"router": 5.0}
    return Budget(config, steps.__getitem__, lambda name: flops.get(name, 3.0), 100.0)


def rows_by_name():
    return {row.name: row for row in recipes.BASELINES}


def test_a_stage_costs_the_one_whose_features_it_clusters_too():
    config = config_of(num_stages=2)
    assert config.mcl.init_from == "base"
    assert recipes.cost_of(budget_by_hand(config), ["mcl_2"]) == (120, 200 + 360)


def test_cost_counts_each_model_that_another_is_made_from_once():
    config = config_of("feature_ensemble", num_stages=2)
    config.mcl.init_from = "previous"
    budget = budget_by_hand(config)
    assert recipes.cost_of(budget, ["base"]) == (0, 0)
    # A stage encodes all pairs once and trains on its batches.
    assert recipes.cost_of(budget, ["mcl_1"]) == (50, 100 + 150)
    assert recipes.cost_of(budget, ["mcl_2"]) == (120, 200 + 360)
    assert recipes.cost_of(budget, ["feature_ensemble"]) == recipes.cost_of(budget, ["mcl_2"])
    assert recipes.cost_of(budget, ["router"]) == (120 + 32, 560 + 160)


def test_steps_of_the_same_pairs_and_the_same_flops_by_hand():
    config, rows = config_of(num_stages=2), rows_by_name()
    config.mcl.init_from = "previous"
    budget = budget_by_hand(config)
    assert recipes.one_stage(budget, rows["direct_ft"]) == 5
    # 5 * 10 + 7 * 10 + 4 * 8 = 152 pairs, 15.2 batches of 10; 720 FLOPs are 24 batches of 30.
    assert recipes.same_pairs(budget, rows["direct_ft_same_pairs"]) == 16
    assert recipes.same_flops(budget, rows["direct_ft_same_flops"]) == 24


def test_a_curriculum_has_what_its_stages_leave_of_the_budget():
    config, rows = keeping_config(num_stages=2), rows_by_name()
    config.mcl.init_from, config.moe.experts = "previous", ("base", "consolidation")
    budget = budget_by_hand(config)
    assert recipes.cost_of(budget, ["router"]) == (120 + 60 + 32, 560 + 180 + 160)
    # The stages took 120 of 212 pairs, 9.2 batches, and 560 of 900 FLOPs, 11.3 batches of 30.
    assert recipes.same_pairs(budget, rows["curriculum_same_pairs"]) == 10
    assert recipes.same_flops(budget, rows["curriculum_same_flops"]) == 11


def test_stages_with_rehearsal_are_made_for_the_row_that_wants_them():
    config = keeping_config("curriculum_rehearsed_throughout_same_flops", num_stages=2)
    config.mcl.init_from = "previous"
    made = recipes.recipes(config)
    parts = [row for row in made.values() if row.group == "part"]
    assert [(row.name, row.experts(config), row.number) for row in parts] == [
        ("rehearsed_1", ("base",), 1),
        ("rehearsed_2", ("rehearsed_1",), 2),
    ]
    row = made["curriculum_rehearsed_throughout_same_flops"]
    assert row.experts(config) == ("rehearsed_2",)
    steps = {"rehearsed_1": 5, "rehearsed_2": 7}
    budget = budget_by_hand(config)._replace(steps=steps.__getitem__)
    assert recipes.cost_of(budget, row.experts(config)) == (120, 200 + 360)  # as the stages themselves
    assert all(row.rehearsal_of(config) == (0.25, "pairs") for row in parts)
    assert not {"rehearsed_1", "rehearsed_2"} & recipes.recipes(keeping_config()).keys()


def test_a_distilled_model_costs_what_its_teacher_does_and_its_own_training():
    config = config_of("distilled", num_stages=2)
    config.mcl.init_from = "previous"
    budget = budget_by_hand(config)
    steps = {"mcl_1": 5, "mcl_2": 7, "router": 4, "distilled": 9}
    mixture = recipes.cost_of(budget, ["router"])
    found = recipes.cost_of(budget._replace(steps=steps.__getitem__), ["distilled"])
    assert found == (mixture.pairs + 90, mixture.flops + 270)


def test_a_mixture_that_teaches_a_dense_model_encodes_every_pair():
    config = config_of("distilled", "full_ft", num_stages=2)
    config.data.rehearsal, config.router.rehearsal_fraction = "x", 0.25
    of_pair = phases.budget(config, lambda name: 1, 100).flops_of_pair
    phase = {phase.name: phase for phase in phases_of(config, "cpu", 10**6)}["distilled"]
    _, mixture = phases.architectures_of(config)
    assert phase.loss.teacher == mixture and phase.architecture.moe is None and phase.rehearsed == 0.5
    # Everything trains but logit_scale, which is no product.
    assert of_pair("distilled") == of_pair("full_ft") + forward(mixture)


def test_rows_rehearse_as_they_say_and_others_as_their_section():
    config = keeping_config("published_moe", "direct_ft", "curriculum_distilled_same_pairs", "distilled")
    config.router.rehearsal, config.mcl.rehearsal_fraction = "distill", 0.5
    assert recipes.imitates_base(config)
    made = recipes.recipes(config)
    assert made["router"].rehearsal_of(config) == (0.25, "distill")
    assert made["published_moe"].rehearsal_of(config)[0] == 0
    assert made["direct_ft"].rehearsal_of(config) == (0.5, "pairs")
    assert made["curriculum_distilled_same_pairs"].rehearsal_of(config) == (0.25, "distill")
    assert made["distilled"].rehearsal_of(config) == (0.5, "distill")
    assert made["base"].rehearsal_of(config)[0] == 0
    config = config_of("distilled")
    assert recipes.recipes(config)["distilled"].rehearsal_of(config)[0] == 0


def test_batches_larger_than_what_is_rehearsed_are_refused_before_anything_runs():
    config = keeping_config()
    config.router.rehearsal = "distill"
    check_rehearsal(config, {"rehearsal": 800, "rehearsal_captions": 800})
    with pytest.raises(ValueError, match="router.batch_size=800 is more than the 799 records"):
        check_rehearsal(config, {"rehearsal": 799})
    with pytest.raises(ValueError, match="than the 500 records of data.rehearsal_captions: choose"):
        check_rehearsal(config, {"rehearsal": 800, "rehearsal_captions": 500})
    config.router.rehearsal = "pairs"
    check_rehearsal(config, {"rehearsal": 800, "rehearsal_captions": 500})


@pytest.mark.parametrize("num_pairs", [48, 500, 10_000, 100_000])
def test_settings_proposed_for_few_pairs_work_as_flags(num_pairs):
    """With the paper's batches of 800, in eight parts of an accelerator's, and 200 steps of warm-up."""
    config = config_of("direct_ft_same_pairs")
    config.mcl.accumulation_steps = 8
    with pytest.raises(ValueError) as refused:
        phases_of(config, "cpu", num_pairs, 10**6)
    proposed = re.findall(r"--config\.([\w.]+)=(\d+)", str(refused.value))
    config.update_from_flattened_dict({field: int(value) for field, value in proposed})
    validate(config, paths=False)
    planned = {phase.name: phase for phase in phases_of(config, "cpu", num_pairs, 10**6)}
    assert planned["mcl_1"].num_steps == planned["router"].num_steps >= 200
    settings = planned["mcl_1"].hyperparameters
    assert settings.batch_size % settings.accumulation_steps == 0


@pytest.mark.parametrize("name", ["router", "base", "feature_ensemble", "nothing"])
def test_only_dense_models_of_the_run_are_blended(name):
    config = config_of("feature_ensemble", "direct_ft")
    config.blends = ("mcl_1", "direct_ft")
    recipes.recipes(config)
    config.blends = (name,)
    with pytest.raises(
        ValueError, match=f"blends: '{name}' is no dense model of this run: choose among mcl_1"
    ):
        recipes.recipes(config)


def test_phases_have_the_steps_of_their_recipes():
    config = config_of("direct_ft", "direct_ft_same_pairs", "feature_ensemble", num_stages=2)
    for section in (config.base.train, config.mcl, config.router):
        section.batch_size, section.warmup_steps = 10, 1
    config.router.batch_size, config.base.train.num_steps = 25, 3
    phases = {phase.name: phase for phase in phases_of(config, "cpu", 105)}
    # An epoch of 105 pairs is 10 batches of 10, and 4 of 25; (2 * 10 * 10 + 4 * 25) / 10 = 30.
    expected = {"base": 3, "mcl_1": 10, "mcl_2": 10, "router": 4, "direct_ft": 10, "direct_ft_same_pairs": 30}
    assert {name: phases[name].num_steps for name in expected} == expected
    assert "feature_ensemble" not in phases and not any(phase.is_bound for phase in phases.values())


def test_routers_of_baselines_begin_at_random_whatever_those_of_the_clip_moe_do():
    config = config_of("sparse_upcycling")
    config.moe.router_stddev = 0.0
    made = recipes.recipes(config)
    assert made["router"].router_stddev(config) == 0
    assert made["sparse_upcycling"].router_stddev(config) == 0.02


def test_a_gradient_of_all_experts_is_the_clip_moes_alone_and_counts():
    config = config_of("direct_ft", "base_ft_moe", num_stages=2)
    made = recipes.recipes(config)

    def flops():
        of_pair = phases.budget(config, lambda name: 1, 100).flops_of_pair
        return {name: of_pair(name) for name in ("router", "base_ft_moe")}

    before = flops()
    config.router.gradient = "all"
    after = flops()
    assert after["base_ft_moe"] == before["base_ft_moe"]
    # Three experts of which a token chooses two; most of a pair's FLOPs are theirs.
    assert 1.15 * before["router"] < after["router"] < 1.5 * before["router"]
    computed = {name: phases.compute_of(config, made[name], "cpu") for name in ("router", "base_ft_moe")}
    assert computed["router"].router_gradient == "all"
    assert computed["router"].dispatch == "dense"  # no tokens to sort, as each visits every expert
    assert computed["base_ft_moe"].router_gradient == "chosen"


def test_what_becomes_experts_is_what_stages_and_their_controls_train():
    config = keeping_config("direct_ft", "curriculum_same_pairs", "lora_same_pairs", "full_ft")
    published = {name: row.rules(config) for name, row in recipes.recipes(config).items()}
    config.moe.expert_layers = "attention_and_feed_forward"
    found = {name: row.rules(config) for name, row in recipes.recipes(config).items()}
    changed = {name for name, rules in found.items() if rules != published[name]}
    stages = {f"mcl_{n}" for n in range(1, config.mcl.num_stages + 1)}
    assert changed == {*stages, "consolidation", "direct_ft", "curriculum_same_pairs"}
    names = ["visual/resblocks_0/attn/in_proj/kernel", "text/resblocks_1/mlp/c_fc/bias", "visual/ln_pre/bias"]
    for name in changed:
        assert [*trees.match_rules(found[name], names).values()] == [True, True, False]


def test_the_published_clip_moe_is_of_feed_forward_layers():
    config = keeping_config("published_moe")
    config.moe.expert_layers = "attention_and_feed_forward"
    with pytest.raises(ValueError, match="'published_moe' is of feed-forward layers: set moe.expert_layers="):
        recipes.recipes(config)


def test_settings_of_a_baseline_replace_those_of_its_section():
    config = config_of("direct_ft", "direct_ft_same_pairs", num_stages=1)
    for section in (config.base.train, config.mcl, config.router):
        section.batch_size, section.warmup_steps, section.num_steps = 10, 1, 6
    config.baseline_settings = ConfigDict({"direct_ft_same_pairs": {"batch_size": 5, "learning_rate": 3e-3}})
    validate(config, paths=False)
    phases = {phase.name: phase for phase in phases_of(config, "cpu", 100)}
    assert phases["direct_ft"].hyperparameters == configs.phase_config(config.mcl)
    found = phases["direct_ft_same_pairs"]
    assert found.num_steps == 24  # (6 * 10 + 6 * 10) / 5
    assert found.hyperparameters == dataclasses.replace(
        configs.phase_config(config.mcl), batch_size=5, learning_rate=3e-3
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direct_fit": {"batch_size": 5}}, "settings.direct_fit: no baseline 'direct_fit' trains: choose"),
        ({"feature_ensemble": {"batch_size": 5}}, "no baseline 'feature_ensemble' trains: choose one of dir"),
        ({"direct_ft_same_pairs": {"num_steps": 5}}, "same_pairs.num_steps: the length follows from"),
        ({"direct_ft": {"batchsize": 5}}, r"direct_ft.batchsize does not exist; there are \['accum"),
        ({"direct_ft": {"batch_size": "5"}}, "direct_ft.batch_size='5' must be of type int"),
        ({"direct_ft": {"learning_rate": -1}}, "direct_ft.learning_rate=-1 must lie between 0.0 and"),
        ({"direct_ft": {"batch_size": 101}}, "baseline_settings.direct_ft"),
    ],
    ids=lambda settings: str(settings),
)
def test_settings_of_a_baseline_that_cannot_work_are_refused(settings, message):
    config = config_of("direct_ft", "direct_ft_same_pairs", "feature_ensemble")
    for section in (config.base.train, config.mcl, config.router):
        section.batch_size, section.warmup_steps, section.num_steps = 10, 1, 6
    config.baseline_settings = ConfigDict(settings)
    with pytest.raises(ValueError, match=message):
        validate(config, paths=False)
        phases_of(config, "cpu", 100)


def test_settings_of_a_baseline_that_is_left_out_are_none_of_the_run():
    """A config file has them, and the command line leaves its baselines out."""
    config = config_of()
    config.baseline_settings = ConfigDict({"full_ft": {"batch_size": 5}})
    for section in (config.base.train, config.mcl, config.router):
        section.batch_size, section.warmup_steps, section.num_steps = 10, 1, 6
    validate(config, paths=False)
    assert "full_ft" not in {phase.name for phase in phases_of(config, "cpu", 100)}


def test_settings_of_an_unknown_baseline_hide_no_other_error():
    config = config_of("ia3")
    config.baseline_settings = ConfigDict({"ia3": {"batch_size": 5}})
    with pytest.raises(ValueError, match="baselines='ia3': choose one of direct_ft, "):
        recipes.recipes(config)


def test_baseline_that_a_budget_leaves_too_few_steps_is_refused():
    """The mixture is made without consolidation: routers alone leave the curriculum pairs."""
    config = keeping_config("curriculum_same_pairs", num_stages=1)
    config.base.checkpoint, config.moe.experts = "clip.pt", ("base", "last_stage")
    for section in (config.mcl, config.consolidation, config.router):
        section.batch_size, section.warmup_steps, section.num_steps = 10, 5, 6
    assert phases_of(config, "cpu", 100)[-1].num_steps == 6
    config.router.batch_size = 8  # 48 pairs, 4.8 batches
    with pytest.raises(
        ValueError, match="'curriculum_same_pairs' gets 5 steps, and consolidation.warmup_steps=5"
    ):
        phases_of(config, "cpu", 100)


def test_steps_are_a_bound_where_small_clusters_are_dropped():
    """Which clusters are smaller than a batch is known after clustering alone."""
    config = config_of("direct_ft_same_pairs", "sparse_upcycling")
    config.mcl.small_clusters, config.base.checkpoint = "drop", "clip.pt"
    bounds = [phase.name for phase in phases_of(config, "cpu", 10**6) if phase.is_bound]
    assert bounds == ["mcl_1", "mcl_2", "mcl_3", "direct_ft_same_pairs"]
    config.mcl.num_steps = 500
    assert not any(phase.is_bound for phase in phases_of(config, "cpu", 10**6))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_baselines_stand_in_the_recipe_table_alone(name):
    files = [path.name for path in PACKAGE.rglob("*.py") if f'"{name}"' in path.read_text()]
    assert set(files) <= {"recipes.py"}  # those of controls are put together


@pytest.mark.parametrize("name", ["base", "mcl_2", "router", "clip_up", "feature_ensemble"])
def test_recipe_is_found_by_the_name_of_its_phase(name):
    recipe = recipes.find_recipe(name)
    assert recipe is not None and recipe.name == name


def test_unknown_phase_has_no_recipe():
    assert recipes.find_recipe("mcl_x") is None and recipes.find_recipe("upcycle") is None


def test_rehearsal_is_encoded_where_its_features_are_learned():
    config = keeping_config("direct_ft_rehearsed_same_pairs")  # routers rehearse pairs, and so does the row
    assert "rehearsal" not in stages_of(config)
    config.baselines = ("curriculum_distilled_same_pairs",)
    assert "rehearsal" in stages_of(config)
    config.baselines = ("distilled",)  # whose teacher is the CLIP-MoE
    assert "rehearsal" not in stages_of(config)
