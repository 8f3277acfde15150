"""What CLIP-MoE is compared with, made by the same code from the same base and data.

direct_ft               the base's feed-forward layers fine-tuned on ordinary batches, one stage's steps
direct_ft_same_pairs    the same with as many pairs as all stages and the router training together saw
base_ft_moe             an MoE of the base and direct_ft, routers trained: upcycling without MCL
sparse_upcycling        an MoE of E copies of the base, routers and experts trained (arXiv 2212.05055)
"""

import math

from etils import epath

from clipmoe_jax import artifacts
from clipmoe_jax.data import samplers
from clipmoe_jax.dmu import stages
from clipmoe_jax.dmu.run import TRAIN_FFN, TRAIN_MOE, Run


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
    if "base_ft_moe" in wanted:
        upcycled = baseline_path(run, "base_ft_moe_upcycled")
        fields = run.fields(*stages.ROUTER_FIELDS)
        stages.stack_models(run, upcycled, [base, baseline_path(run, "direct_ft")], fields)
        stages.train_routers(run, "base_ft_moe", upcycled, baseline_path(run, "base_ft_moe"), fields)
    if "sparse_upcycling" in wanted:
        _sparse_upcycling(run, base)


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


def _direct_ft(run: Run, name: str, base: epath.Path, num_steps: int) -> None:
    def build(folder: epath.Path) -> dict:
        config, params = run.load(base)
        section = run.config.mcl
        return run.train(
            name,
            run.model(config),
            params,
            folder,
            rules=TRAIN_FFN,
            sampler=samplers.ShuffledSampler(len(run.pairs("train")), section.batch_size, run.seed),
            section=section,
            num_steps=num_steps,
        )

    fields = run.fields(*stages.STAGE_FIELDS, without=stages.STAGE_COUNT) | {"num_steps": num_steps}
    artifacts.make(baseline_path(run, name), fields, build)


def _sparse_upcycling(run: Run, base: epath.Path) -> None:
    fields = run.fields(*stages.ROUTER_FIELDS)
    upcycled = baseline_path(run, "sparse_upcycling_upcycled")
    stages.stack_models(run, upcycled, [base] * (run.config.mcl.num_stages + 1), fields)

    def build(folder: epath.Path) -> dict:
        config, params = run.load(upcycled)
        section = run.config.mcl
        return run.train(
            "sparse_upcycling",
            run.model(config, training_routers=True),
            params,
            folder,
            rules=TRAIN_MOE,
            sampler=samplers.ShuffledSampler(len(run.pairs("train")), section.batch_size, run.seed),
            section=section,
            balance=True,
        )

    artifacts.make(baseline_path(run, "sparse_upcycling"), fields, build)
