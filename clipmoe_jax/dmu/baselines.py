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
from clipmoe_jax.dmu.run import TRAIN_FFN, TRAIN_MOE, TRAIN_ROUTERS, Run


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
        models = [base, baseline_path(run, "direct_ft")]
        stages.stack_models(run, upcycled, models, run.fields(*stages.ROUTER_FIELDS))
        out = baseline_path(run, "base_ft_moe")
        stages.train_moe(run, "base_ft_moe", upcycled, out, run.config.router, TRAIN_ROUTERS)
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
    upcycled, out = (baseline_path(run, f"sparse_upcycling{part}") for part in ("_upcycled", ""))
    copies = [base] * (run.config.mcl.num_stages + 1)
    stages.stack_models(run, upcycled, copies, run.fields(*stages.ROUTER_FIELDS))
    stages.train_moe(run, "sparse_upcycling", upcycled, out, run.config.mcl, TRAIN_MOE)
