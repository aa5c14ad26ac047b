"""The training step in PyTorch, as released and modernised. Needs torch.

    step = make_step(model, config, "modernised", compile=True)
    for batch in pipeline:
        losses = step(to_torch(batch, device, "modernised"))

Axis letters: B batch, S tokens, R scored tokens.
"""

from typing import Literal

import numpy as np
import torch

from benchmarks.torch_model import IGNORED, TorchMiracle
from miracle_jax.config import Config, Train

Style = Literal["released", "modernised"]
FIELDS = ("context", "context_length", "joint", "joint_length", "reply", "reply_length", "labels")
SCORED_MULTIPLE = 128
"""Scored tokens are filled up to a multiple of this many, so that few shapes are compiled."""


def to_torch(batch: dict[str, np.ndarray], device: torch.device | str, style: Style) -> dict[str, torch.Tensor]:
    """A pipeline's batch, one micro-batch without its axis (B, ...), on a device.

    Modernised batches also say which of the reply's places are scored, `scored` (R,) among (B * S), and with which
    `target` (R,): the head is spared the padding, and the device need not be asked how much there is of it.
    """
    arrays = {name: np.asarray(batch[name]) for name in FIELDS}
    if style == "modernised":
        reply, length = arrays["reply"], arrays["reply_length"]
        places = np.flatnonzero(np.arange(reply.shape[1]) < length[:, None] - 1)
        filling = (0, -len(places) % SCORED_MULTIPLE)
        arrays["target"] = np.pad(reply.ravel()[places + 1].astype(np.int64), filling, constant_values=IGNORED)
        arrays["scored"] = np.pad(places, filling)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if torch.device(device).type == "cuda":  # pinned, so that copying does not wait for the device
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def learning_rate_factor(settings: Train, steps: int):
    """Step (from 0) -> share of the learning rate: up for `warmup` of the steps, then down to 0 after the last."""
    warm = max(int(settings.warmup * steps), 1)
    return lambda step: max(min((step + 1) / warm, (steps - step) / (steps - warm + 1)), 0.0)


def make_step(
    model: TorchMiracle,
    config: Config,
    style: Style,
    compile: bool = False,
    steps: int = 1000,
    log: bool = False,
    mode: str = "default",
) -> "Step":
    """The training step of a model on its device: batch (see `to_torch`) -> losses by name, as tensors.

    Args:
      style: "released": AdamW as torch gives it. "modernised": its fused form, which updates all parameters at once.
        The model decides the attention ("eager" as released, "sdpa" modernised) and the batch which tokens are scored.
      compile: the forward and backward pass by torch.compile.
      steps: length of the run, which shapes the learning rate only.
      log: reads every loss with .item() after each step, as the paper's code does; they are kept in `step.logged`.
      mode: torch.compile's.
    """
    return Step(model, config, style, compile, steps, log, mode)


class Step:
    """See `make_step`."""

    def __init__(self, model, config, style, compile, steps, log, mode):
        self.model, self.loss, self.clip = model.train(), config.loss, config.train.clip
        self.device = next(model.parameters()).device
        self.parameters = list(model.parameters())
        self.objective = torch.compile(model.objective, mode=mode) if compile else model.objective
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.train.learning_rate, betas=(0.9, config.train.beta2), eps=1e-8,
            weight_decay=config.train.weight_decay, fused=True if style == "modernised" else None,
        )  # fmt: skip
        factor = learning_rate_factor(config.train, steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.number, self.log, self.logged = 0, log, []

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        cycle = float(self.number % self.loss.kl_period >= self.loss.kl_zero * self.loss.kl_period)
        cycle = torch.full((), cycle, device=self.device)  # a tensor: torch.compile would compile each number anew
        # The released code trained in float16 with a scaled loss; bfloat16 needs no scaling and is no slower. On CPUs
        # we compare in float32.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            total, named = self.objective(batch, cycle, cycle)
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.number += 1
        named = {name: value.detach() for name, value in (named | {"gradient_norm": norm}).items()}
        if self.log:
            self.logged.append({name: value.item() for name, value in named.items()})
        return named
