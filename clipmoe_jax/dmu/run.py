"""One seed's run: its config, folder, mesh, numbers and data, as all of its stages share them."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import artifacts, distributed, sharding, stamps, trees
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data import loader
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.dmu.datasets import Dataset
from clipmoe_jax.dmu.recipe import Recipe
from clipmoe_jax.evaluation.captions import Captions, read_captions
from clipmoe_jax.evaluation.encoder import Encoder
from clipmoe_jax.evaluation.subject import ModelSubject, Subject
from clipmoe_jax.interop import hub
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.models.model_folder import load_model
from clipmoe_jax.train.step_programs import CompiledAhead


@dataclasses.dataclass(frozen=True)
class Run:
    """The things that the stages of one seed's run share. Data is opened once and kept as long as the run.

    Attributes:
        datasets: the prepared data sets that the config names, by their fields of `config.data`.
        siblings: the folders of this seed's runs of other variants of the config.
        after_model: called with the run, the recipe of each model, and whether it was made now.
        ahead: compiles the steps of later phases.
    """

    config: ConfigDict
    seed: int
    workdir: epath.Path
    mesh: Mesh
    metrics: Metrics
    datasets: Mapping[str, Dataset]
    siblings: Sequence[epath.Path] = ()
    after_model: Callable[["Run", Recipe, bool], None] = lambda run, recipe, is_new: None
    ahead: CompiledAhead = dataclasses.field(default_factory=CompiledAhead)
    _opened: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fields(self, *prefixes: str, without: Sequence[str] = ()) -> dict[str, Any]:
        """Returns what an artifact depends on: the seed, config fields by dotted name, and the data's
        contents.

        prefixes: of the fields' names; data.train and data.base among them bring a hash of the records, and
        base.checkpoint one of its files.
        """
        if "base." in prefixes and not self.config.base.checkpoint:
            prefixes = (*prefixes, "data.base")  # the pairs that the base is trained on
        flat = trees.flatten(self.config.to_dict())
        values = {name.replace("/", "."): value for name, value in flat.items()}
        chosen = {n: v for n, v in values.items() if n.startswith(prefixes) and n not in without}
        chosen = configs.without_effectless(chosen)
        for field, (neutral, dependent) in configs.NEUTRAL.items():
            if values[field] == neutral:
                chosen = {n: v for n, v in chosen.items() if n not in (field, *dependent)}
        if any(name.endswith(".rehearsal_fraction") for name in chosen):
            names = ("data.rehearsal", "data.rehearsal_captions")
            chosen |= {name: values[name] for name in names if values[name]}
        if "validation.keep_best" in chosen:
            chosen["data.validation"] = values["data.validation"]
        for name in ("train", "validation", "base", "rehearsal", "rehearsal_captions"):
            if chosen.get(f"data.{name}"):
                chosen[f"{artifacts.CONTENTS}data.{name}"] = self.records(name).fingerprint
        if chosen.get("base.checkpoint"):
            chosen[f"{artifacts.CONTENTS}base.checkpoint"] = self.once(
                "digest of base.checkpoint",
                # Process 0 alone compares inputs.
                lambda: _digest_of_base(self.config) if distributed.is_main() else "",
            )
        return {"seed": self.seed, **chosen}

    def records(self, name: str) -> Records:
        """Returns the records of a data set of the run."""
        return self.once(f"records {name}", self.datasets[name].open)

    def make(self, path: epath.Path, inputs: Mapping[str, Any], build: Callable[[epath.Path], dict]) -> bool:
        """Makes an artifact, or copies the one that another variant made from equal inputs.

        Returns whether it was built now.
        """
        if self.siblings:
            name = path.relative_to(self.workdir)
            others = [folder / name for folder in self.siblings]

            def copy() -> str | None:
                source = artifacts.copy(path, inputs, others, upgrade=configs.upgrade_inputs)
                return source and str(source)

            if source := distributed.on_main(f"{path} may be copied", copy):
                self.metrics.say(f"{name}: copied from {source}")
        return artifacts.make(path, inputs, build, upgrade=configs.upgrade_inputs)

    def pairs(self, name: str, *, short_captions: bool | None = None) -> loader.Pairs:
        """Returns images and tokens of a data set at the base's sizes.

        short_captions: whether first sentences come too; None is where the config's loss takes them.
        """
        by_config = self.config.loss.short_caption_weight > 0
        with_short = by_config if short_captions is None else short_captions
        kind = loader.DecodedPairs if self.config.data.in_memory else loader.StreamedPairs
        image_size = configs.architecture(self.config).vision.image_size
        # The released code's load balance counts padding, of which there must then be as much as it has.
        packs = self.config.router.balance != "released"
        return self.once(
            f"pairs {name}, short captions {with_short}",
            lambda: kind(self.records(name), self.tokenizer(), image_size, packs, short_captions=with_short),
        )

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns what `make` returned when it was called under this key for the first time.

        Threads must not ask for the same key at once.
        """
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer at the base's context length, or data.max_caption_tokens where that is less.

        Captions are data and cannot place special tokens.
        """
        context_length = self.config.base.architecture.text.context_length
        most = self.config.data.max_caption_tokens or context_length
        return Tokenizer(min(most, context_length), parse_special_tokens=False)

    def model(self, architecture: ClipConfig) -> Clip:
        """Returns a module that computes in this platform's way (`configs.compute_config`)."""
        return Clip(architecture, configs.compute_config(self.config, sharding.platform()))

    def load(self, path: epath.Path) -> tuple[ClipConfig, dict]:
        """Returns architecture and params of a model folder, placed on the mesh."""
        return load_model(path, lambda tree: sharding.param_shardings(self.mesh, tree))

    def load_dense(self, path: epath.Path) -> tuple[ClipConfig, dict]:
        """Returns a model as `load` does; of an MoE `config.base.expert`, as the dense model it came from."""
        architecture, params = self.load(path)
        if architecture.moe:
            architecture, params = expert_as_dense(params, architecture, self.config.base.expert)
        return architecture, params

    def encoder(self, path: epath.Path) -> Encoder:
        """Returns an encoder of the model in a folder."""
        return self.encoder_of(*self.load(path))

    def encoder_of(self, architecture: ClipConfig, params: dict) -> Encoder:
        """Returns an encoder of a model whose params are placed on the mesh."""
        return Encoder(self.model(architecture), params, self.mesh, self.config.embed.batch_size)

    def subject(self, encoder: Encoder) -> Subject:
        """Returns a model as evaluations see it. With data.in_memory all models share the decoded data
        sets."""
        tokenizer, image_size = self.tokenizer(), self.config.base.architecture.vision.image_size

        def decoded(records: Records) -> loader.DecodedPairs:
            key = f"decoded {records.path}, {records.split}"
            return self.once(key, lambda: loader.DecodedPairs(records, tokenizer, image_size))

        open_pairs = decoded if self.config.data.in_memory else None
        return ModelSubject(encoder, tokenizer, image_size, self.config.data.num_workers, open_pairs)

    def captions(self, name: str) -> Captions:
        """Returns the captions of a data set of the run."""
        return self.once(f"captions of data.{name}", lambda: read_captions(self.records(name)))


def _digest_of_base(config: ConfigDict) -> str:
    """A hash of what base.checkpoint names; of a repository of the hub its commit, as the cache may come to
    hold more of its files."""
    path = configs.base_checkpoint(config)
    is_repository = hub.is_name(config.base.checkpoint) and os.path.isdir(path)
    return os.path.basename(path) if is_repository else stamps.digest(path)
