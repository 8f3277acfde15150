"""Hyperparameters that every phase of training has: batch, length, optimizer and schedule."""

import dataclasses
import re

import jax
import numpy as np
import optax

from clipmoe_jax.core import trees

# Weight decay applies to matrices and convolutions, not to norms, biases, positional embeddings or scalars.
DECAY_RULES = (
    (r".*/(kernel|embedding|proj|text_projection|new_columns)", True),
    (r".*", False),
)


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """Hyperparameters of one phase of training.

    batch_size: pairs of a global batch. learning_rate: the peak, reached at the last of `warmup_steps`, from
    which it falls to 0 by a cosine. weight_decay: AdamW's, of matrices alone. num_epochs: the length, where
    `num_steps` is 0. num_steps: the length in steps, all batches counted. warmup_steps: in which the rate
    rises from 1 / `warmup_steps` of the peak. b1: AdamW's decay of the first moment. b2: of the second. eps:
    AdamW's. clip_norm: of the global gradient; 0 is none. label_smoothing: of the contrastive loss.
    accumulation_steps: in how many microbatches a batch is computed; the gradient is that of the whole batch.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float
    num_epochs: int = 1
    num_steps: int = 0
    warmup_steps: int = 20
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    accumulation_steps: int = 1

    def length(self, steps_per_epoch: int) -> int:
        """Returns the number of steps. Raises ValueError if the warm-up does not fit."""
        num_steps = self.num_steps or self.num_epochs * steps_per_epoch
        if num_steps <= self.warmup_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} does not fit into {num_steps} steps of batch_size="
                f"{self.batch_size}: choose a shorter warm-up, smaller batches or more epochs"
            )
        return num_steps

    def learning_rates(self, num_steps: int) -> np.ndarray:
        """Returns the rate of each step, float32 (num_steps,): a linear warm-up, then a cosine to 0.

        The first of W warm-up steps has 1/W of the peak, not 0: no batch is wasted.
        """
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, num_steps, 0.0
        )
        counts = np.arange(num_steps)
        counts[: self.warmup_steps] += 1
        # As one program: operation by operation JAX would compile ten.
        return np.asarray(jax.jit(schedule)(counts), np.float32)

    def without_schedule(self) -> "PhaseConfig":
        """Returns the fields that a step's program depends on; the others have one value for all phases."""
        return dataclasses.replace(
            self,
            batch_size=1,
            learning_rate=0.0,
            num_epochs=1,
            num_steps=0,
            warmup_steps=0,
            label_smoothing=0.0,
        )

    def direction(self) -> optax.GradientTransformation:
        """Returns AdamW without its learning rate.

        The rate is an argument of the step, so all schedules share one compiled program.
        """
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        return optax.chain(
            clip,
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=_decays),
        )


def _decays(params: trees.Params) -> dict:
    def decays(name: str) -> bool:
        return next(value for pattern, value in DECAY_RULES if re.fullmatch(pattern, name))

    return trees.unflatten({name: decays(name) for name in trees.flatten(params)})
