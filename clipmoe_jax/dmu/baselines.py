"""What CLIP-MoE is compared with, made by the same code from the same base and data.

direct_ft               the base's feed-forward layers fine-tuned on ordinary batches, one stage's steps
direct_ft_same_pairs    the same with as many pairs as all stages and the router training together saw
full_ft                 direct_ft with every parameter trained
long_clip               full_ft with Long-CLIP's second loss, of short captions (arXiv 2403.15378)
base_ft_moe             an MoE of the base and direct_ft, routers trained: upcycling without MCL
sparse_upcycling        an MoE of E copies of the base, routers and experts trained (arXiv 2212.05055)
drop_upcycling          the same, half of each copy's hidden units drawn anew (arXiv 2502.19261)
clip_up                 sparse_upcycling, every parameter trained, with the routers' z-loss (arXiv 2502.00965)

All but base_ft_moe's routers train by `config.mcl`'s hyperparameters. Recipes are those of the papers in what
trains and by which losses, not in data, batch or learning rate; which blocks get experts is
`moe.num_moe_layers` for all. Where every parameter trains, logit_scale does too, as in Long-CLIP's code.
"""

import math
from collections.abc import Mapping

from etils import epath

from clipmoe_jax.core import artifacts, trees
from clipmoe_jax.data import samplers
from clipmoe_jax.dmu import stages
from clipmoe_jax.dmu.recipes import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_MOE, TRAIN_ROUTERS
from clipmoe_jax.dmu.run import Run

Z_LOSS_COEFFICIENT = 1e-3  # ST-MoE's (arXiv 2202.08906); where the config has none


def baseline_path(run: Run, name: str) -> epath.Path:
    """Model folder of a baseline."""
    return run.workdir / "baselines" / name


def make_baselines(run: Run) -> None:
    """All of `config.baselines` that are models of their own."""
    base = artifacts.require(stages.stage_path(run, 0), "base")
    wanted = run.config.baselines
    if "direct_ft" in wanted:
        _direct_ft(run, "direct_ft", base, _stage_steps(run, 1))
    if "direct_ft_same_pairs" in wanted:
        _direct_ft(run, "direct_ft_same_pairs", base, steps_of_same_pairs(run))
    if "full_ft" in wanted:
        _direct_ft(run, "full_ft", base, _stage_steps(run, 1), TRAIN_EVERYTHING)
    if "long_clip" in wanted:
        weight = run.config.loss.short_caption_weight or 1.0
        losses = {"short_caption_weight": weight}
        _direct_ft(run, "long_clip", base, _stage_steps(run, 1), TRAIN_EVERYTHING, losses)
    if "base_ft_moe" in wanted:
        upcycled = baseline_path(run, "base_ft_moe_upcycled")
        models = [base, baseline_path(run, "direct_ft")]
        stages.stack_models(run, upcycled, models, run.fields(*stages.ROUTER_FIELDS))
        out = baseline_path(run, "base_ft_moe")
        stages.train_moe(run, "base_ft_moe", upcycled, out, run.config.router, TRAIN_ROUTERS)
    if "sparse_upcycling" in wanted:
        _sparse_upcycling(run, "sparse_upcycling", base)
    if "drop_upcycling" in wanted:
        _sparse_upcycling(run, "drop_upcycling", base, reinitialize=True)
    if "clip_up" in wanted:
        losses = {"z_loss_coefficient": run.config.router.z_loss_coefficient or Z_LOSS_COEFFICIENT}
        _sparse_upcycling(run, "clip_up", base, TRAIN_EVERYTHING, losses)


def steps_of_same_pairs(run: Run) -> int:
    """Steps of direct fine-tuning that see as many pairs as all stages and the router training saw."""
    config = run.config
    routers = artifacts.require(run.workdir / "moe" / "params", "router")
    pairs = artifacts.measured(routers)["num_steps"] * config.router.batch_size
    for stage in range(1, config.mcl.num_stages + 1):
        pairs += _stage_steps(run, stage) * config.mcl.batch_size
    return math.ceil(pairs / config.mcl.batch_size)


def _stage_steps(run: Run, stage: int) -> int:
    path = artifacts.require(stages.stage_path(run, stage), stages.stage_name(stage))
    return artifacts.measured(path)["num_steps"]


def _direct_ft(
    run: Run,
    name: str,
    base: epath.Path,
    num_steps: int,
    rules: trees.Rules = TRAIN_FFN,
    other_losses: Mapping[str, float] | None = None,
) -> None:
    def build(folder: epath.Path) -> dict:
        config, params = run.load(base)
        section = run.config.mcl
        return run.train(
            name,
            run.model(config),
            params,
            folder,
            rules=rules,
            sampler=samplers.ShuffledSampler(len(run.pairs("train")), section.batch_size, run.seed),
            section=section,
            num_steps=num_steps,
            other_losses=other_losses,
        )

    without = (*stages.STAGE_COUNT, *stages.STAGES_ALONE)
    fields = run.fields(*stages.STAGE_FIELDS, without=without) | {"num_steps": num_steps}
    run.make(baseline_path(run, name), fields, build)


def _sparse_upcycling(
    run: Run,
    name: str,
    base: epath.Path,
    rules: trees.Rules = TRAIN_MOE,
    other_losses: Mapping[str, float] | None = None,
    *,
    reinitialize: bool = False,
) -> None:
    upcycled, out = (baseline_path(run, f"{name}{part}") for part in ("_upcycled", ""))
    copies = [base] * (run.config.mcl.num_stages + 1)
    without = stages.STAGES_ALONE
    fields = run.fields(*stages.ROUTER_FIELDS, without=without)
    stages.stack_models(run, upcycled, copies, fields, reinitialize=reinitialize)
    stages.train_moe(
        run, name, upcycled, out, run.config.mcl, rules, without=without, other_losses=other_losses
    )
