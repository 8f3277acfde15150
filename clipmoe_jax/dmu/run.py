"""What the stages of one run share: its config, folder, mesh, numbers and data."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clipmoe_jax import checkpoints, sharding, trees
from clipmoe_jax import config as configs
from clipmoe_jax.data import loader
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.metrics import Metrics
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.train.loop import fit
from clipmoe_jax.train.step import LossConfig

TRAIN_EVERYTHING = [(r".*", True)]
TRAIN_FFN = [(r"(visual|text)/resblocks_\d+/mlp/.*", True), (r".*", False)]
TRAIN_ROUTERS = [(r".*/moe/router/kernel", True), (r".*", False)]
TRAIN_MOE = [(r".*/moe/.*", True), (r".*", False)]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One seed's run. Hashable by identity, so that its data is opened once."""

    config: ConfigDict
    seed: int
    workdir: epath.Path
    mesh: Mesh
    metrics: Metrics

    def fields(self, *prefixes: str) -> dict[str, Any]:
        """The config fields (by dotted name) under some prefixes, and the seed: what an artifact depends
        on."""
        flat = trees.flatten(self.config.to_dict())
        names = {name.replace("/", "."): value for name, value in flat.items()}
        chosen = {n: v for n, v in names.items() if n.startswith(prefixes)}
        return {"seed": self.seed, **chosen}

    def data_path(self, name: str) -> str:
        """Folder of the prepared data set "train", "test" or "base"."""
        if self.config.data.digit_scenes:
            return str(self.workdir / "data" / name)
        return self.config.data[name]

    @functools.cache  # noqa: B019 (a run lives as long as the program)
    def records(self, name: str) -> Records:
        """The prepared data set itself."""
        split = (
            "train" if self.config.data.digit_scenes or name == "base" else self.config.data[f"{name}_split"]
        )
        return Records(self.data_path(name), split)

    @functools.cache  # noqa: B019
    def pairs(self, name: str) -> loader.StreamedPairs | loader.DecodedPairs:
        """Images and tokens of a data set, at the base's sizes."""
        architecture = configs.architecture(self.config)
        kind = loader.DecodedPairs if self.config.data.in_memory else loader.StreamedPairs
        return kind(self.records(name), self.tokenizer(), architecture.vision.image_size)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer at the base's context length; captions are data and cannot place special tokens."""
        context_length = self.config.base.architecture.text.context_length
        return Tokenizer(context_length, parse_special_tokens=False)

    def model(self, config: ClipConfig, *, training_routers: bool = False) -> Clip:
        """A module for this platform."""
        platform = jax.default_backend()
        run = configs.run_config(self.config, platform, training_routers=training_routers)
        return Clip(config, run)

    def load(self, path: epath.Path) -> tuple[ClipConfig, dict]:
        """A model folder, placed on the mesh."""
        return checkpoints.load_model(path, lambda tree: sharding.param_shardings(self.mesh, tree))

    def train(
        self,
        name: str,
        model: Clip,
        params: trees.Params,
        folder: epath.Path,
        *,
        rules: trees.Rules,
        sampler: loader.Sampler,
        section: ConfigDict,
        data: str = "train",
        balance: bool = False,
        num_steps: int | None = None,
    ) -> dict[str, Any]:
        """Trains what the rules say and writes the model to `folder`, beside its checkpoints while it
        runs."""
        config = self.config
        loss = LossConfig(label_smoothing=section.label_smoothing)
        if balance:
            loss = LossConfig(
                section.label_smoothing, config.router.balance_coefficient, config.router.balance
            )
        params, measured = fit(
            name,
            model,
            params,
            trainable_rules=rules,
            pairs=self.pairs(data),
            sampler=sampler,
            phase=configs.phase_config(section),
            loss=loss,
            seed=self.seed,
            mesh=self.mesh,
            metrics=self.metrics,
            checkpoint_folder=folder / "checkpoints",
            checkpoint_every=config.checkpoint.every_steps,
            max_to_keep=config.checkpoint.max_to_keep,
            log_every=config.log_every,
            num_workers=config.data.num_workers,
            frozen_dtype=config.run.frozen_dtype,
            num_steps=num_steps,
        )
        checkpoints.save_model(folder, model.config, params)
        (folder / "checkpoints").rmtree()
        return measured


def experts_from(run: Run, paths: Sequence[epath.Path]) -> tuple[ClipConfig, list[Mapping[str, Any]]]:
    """The dense models to stack, and their common architecture."""
    loaded = [run.load(path) for path in paths]
    return loaded[0][0], [params for _, params in loaded]
