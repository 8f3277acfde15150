"""What the stages of one run share: its config, folder, mesh, numbers and data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import artifacts, distributed, sharding, trees
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data import loader
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import Encoder
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.models.model_folder import load_model, save_model
from clipmoe_jax.train.loop import LoopConfig, fit
from clipmoe_jax.train.step import LossConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed's run. Data is opened once and kept as long as the run. siblings: the folders of this seed's
    runs of other variants of the config."""

    config: ConfigDict
    seed: int
    workdir: epath.Path
    mesh: Mesh
    metrics: Metrics
    siblings: Sequence[epath.Path] = ()
    _opened: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fields(self, *prefixes: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """What an artifact depends on: the seed, the config fields (by dotted name) under some prefixes, and
        where data.train is among them, which data that is. What changes no result (accumulation) is left
        out."""
        flat = trees.flatten(self.config.to_dict())
        names = {name.replace("/", "."): value for name, value in flat.items()}
        left_out = (*without, "mcl.accumulation_steps", "router.accumulation_steps")
        chosen = {n: v for n, v in names.items() if n.startswith(prefixes) and n not in left_out}
        if "data.train" in chosen and not self.config.data.digit_scenes:
            chosen["contents of data.train"] = self.records("train").fingerprint
        return {"seed": self.seed, **chosen}

    def data_path(self, name: str) -> str:
        """Folder of the prepared data set "train", "test" or "base"."""
        if self.config.data.digit_scenes:
            return str(self.workdir / "data" / name)
        return self.config.data[name]

    def records(self, name: str) -> Records:
        """The prepared data set itself."""
        made_here = self.config.data.digit_scenes or name == "base"
        split = "train" if made_here else self.config.data[f"{name}_split"]
        return self.once(f"records {name}", lambda: Records(self.data_path(name), split))

    def make(self, path: epath.Path, inputs: Mapping[str, Any], build: Callable[[epath.Path], dict]) -> None:
        """`artifacts.make`, but for what another variant has made from the same inputs, which is copied."""
        if self.siblings:
            name = path.relative_to(self.workdir)
            if source := artifacts.copy(path, inputs, [folder / name for folder in self.siblings]):
                self.metrics.say(f"{name}: copied from {source}")
            distributed.barrier(f"{path} may be copied")  # no process sees half of it
        artifacts.make(path, inputs, build)

    def pairs(
        self, name: str, *, short_captions: bool | None = None
    ) -> loader.StreamedPairs | loader.DecodedPairs:
        """Images and tokens of a data set, at the base's sizes; with short captions where the config's loss
        takes them, unless told."""
        if short_captions is None:
            short_captions = self.config.loss.short_caption_weight > 0
        kind = loader.DecodedPairs if self.config.data.in_memory else loader.StreamedPairs
        image_size = configs.architecture(self.config).vision.image_size
        # The released code's load balance counts padding, of which there must then be as much as it has.
        released = self.config.router.balance == "released"
        packing_steps = 0 if released else self.config.data.packing_steps
        return self.once(
            f"pairs {name}, short captions {short_captions}",
            lambda: kind(
                self.records(name), self.tokenizer(), image_size, packing_steps, short_captions=short_captions
            ),
        )

    def encode(
        self,
        name: str,
        encoder: Encoder,
        first: int = 0,
        stop: int | None = None,
        towers: Sequence[str] = ("image", "text"),
    ) -> dict[str, np.ndarray]:
        """{tower: (N, embed) float32 unit features} of records `first` to `stop` of a data set, in order."""
        return encoder.pairs(self.pairs(name), first, stop, towers, self.config.data.num_workers)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was called under this key for the first time. Threads must not ask for
        the same key at once."""
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer at the base's context length, or data.max_caption_tokens where that is less; captions
        are data and cannot place special tokens."""
        context_length = self.config.base.architecture.text.context_length
        most = self.config.data.max_caption_tokens or context_length
        return Tokenizer(min(most, context_length), parse_special_tokens=False)

    def model(self, config: ClipConfig, *, training_routers: bool = False) -> Clip:
        """A module for this platform."""
        run = configs.compute_config(self.config, sharding.platform(), training_routers=training_routers)
        return Clip(config, run)

    def load(self, path: epath.Path) -> tuple[ClipConfig, dict]:
        """A model folder, placed on the mesh."""
        return load_model(path, lambda tree: sharding.param_shardings(self.mesh, tree))

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
        other_losses: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Trains what the rules say and writes the model to `folder`, beside its checkpoints while it
        runs. balance: whether the losses of routers are added. other_losses: fields of LossConfig that
        differ from the config's."""
        config = self.config
        loss = LossConfig(
            label_smoothing=section.label_smoothing,
            balance_coefficient=config.router.balance_coefficient if balance else 0.0,
            balance=config.router.balance,
            z_loss_coefficient=config.router.z_loss_coefficient if balance else 0.0,
            short_caption_weight=0.0 if name == "base" else config.loss.short_caption_weight,
        )
        loss = dataclasses.replace(loss, **(other_losses or {}))
        phase = configs.phase_config(section)
        if num_steps is not None:
            phase = dataclasses.replace(phase, num_steps=num_steps)
        params, measured = fit(
            name,
            model,
            params,
            trainable_rules=rules,
            pairs=self.pairs(data, short_captions=loss.short_caption_weight > 0),
            sampler=sampler,
            phase=phase,
            loss=loss,
            seed=self.seed,
            mesh=self.mesh,
            metrics=self.metrics,
            loop=LoopConfig(
                checkpoints=folder / artifacts.CHECKPOINTS,
                checkpoint_every=config.checkpoint.every_steps,
                max_to_keep=config.checkpoint.max_to_keep,
                log_every=config.log_every,
                num_workers=config.data.num_workers,
                frozen_dtype=config.compute.frozen_dtype or model.compute.dtype,
            ),
        )
        save_model(folder, model.config, params)
        return measured
