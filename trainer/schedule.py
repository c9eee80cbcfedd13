"""The learning rate of a step: linear warm-up, then cosine. A pure function, so resuming needs no scheduler state."""

import math

from trainer.config.train import TrainConfig


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Rate for optimizer step `step` (0-based) of `num_steps`.

    Warm-up lasts ceil(warmup_ratio * num_steps) steps and reaches the peak with its last one; the cosine would reach
    `min_learning_rate_ratio` of the peak one step after the last (Loshchilov and Hutter 2017, section 3, no restarts).
    """
    warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
