"""The training loop: steps, logs, validations and checkpoints; what happens when it is stopped or a loss goes wrong.

What it computes is decided by train.py and baseline.py.
"""

import contextlib
import faulthandler
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from miracle_jax import cluster, goodput, mesh, preemption
from miracle_jax.checkpoint import Checkpoints
from miracle_jax.config import Train
from miracle_jax.errors import UserError
from miracle_jax.examples import FIELDS
from miracle_jax.losses import LARGEST
from miracle_jax.preemption import Preempted
from miracle_jax.report import Report

GIVE_UP = 10
"""Bad steps in a row (train.on_nan skip), or returns to one checkpoint (restore), after which the run stops."""
SILENCE = 20
"""The watchdog speaks when no step has ended for so many times the median log interval."""
SHORTEST_SILENCE = 60.0
"""Seconds that it waits at least."""
FIRST_SILENCE = 1800.0
"""Seconds that it waits for the first log interval, which compiles."""


class Diverged(UserError):
    """A loss or a gradient is no longer a number, or beyond LARGEST."""

    def __init__(self, named: str, step: int):
        """named: the value by name, "kl became nan"."""
        super().__init__(
            f"{named} at step {step}; the last checkpoint is intact. Lower --train.learning-rate, look for unusual "
            "lines in the data, or leave such steps out with --train.on-nan skip or restore"
        )
        self.named, self.step = named, step


def unsound(values: dict[str, float]) -> str:
    """The first value that is NaN, infinite or beyond LARGEST, as "kl became nan"; empty if there is none."""
    return next((f"{name} became {value:.4g}" for name, value in values.items() if not abs(value) <= LARGEST), "")


def finite(values: dict[str, float], step: int) -> dict[str, float]:
    """values. Raises Diverged, with the name and the step, if one is NaN, infinite or beyond LARGEST."""
    if named := unsound(values):
        raise Diverged(named, step)
    return values


def of_batches(function: Callable, batches: Iterable) -> list:
    """function(batch) of every batch, fetched; at most two are being computed, so that a stop is seen soon.

    Raises Preempted.
    """
    results = []
    for batch in batches:
        results.append(function(batch))
        jax.block_until_ready(results[-2:][0])
        preemption.check()
    return mesh.fetch(results)


def take_steps(
    settings: Train, state: dict, stream: Callable[[int], Iterator], train_step: Callable, schedule: Callable,
    validate: Callable, checkpoints: Checkpoints, report: Report, ledger: goodput.Ledger,
) -> dict:  # fmt: skip
    """Takes the steps that are left until report.total.

    Args:
      state: as `train.starting_point` gives it.
      stream: step -> an iterator of the batches from that step on, on their devices.
      train_step: (state, batch) -> (state, losses).
      schedule: step -> learning rate.
      validate: state's parameters -> named values, by `of_batches`; the best checkpoint is that of the lowest `score`.

    Returns:
      The state after the last step.

    Raises:
      Preempted: SIGTERM came; the state is saved.
      UserError: a loss went wrong, or a checkpoint could not be written.
    """
    pending, took = [], []
    skipped = returns = 0

    def log(step):
        """The only place where training losses leave the device."""
        nonlocal skipped
        if not pending:
            return
        fetched = []
        first, values_of = step - len(pending) + 1, jax.device_get(pending)
        pending.clear()
        for number, values in enumerate(values_of, first):
            skipped = skipped + 1 if values.pop("skipped", False) else 0
            if not skipped:
                fetched.append(finite(values, number))
                continue
            report.say(f"{unsound(values)} at step {number}, which changes nothing")
            if skipped == GIVE_UP:
                raise Diverged(f"{unsound(values)}, as in the {GIVE_UP - 1} steps before,", number)
        if fetched:
            mean = {name: float(np.mean([values[name] for values in fetched])) for name in fetched[0]}
            took.append(report.training(step, mean | {"learning_rate": float(schedule(step - 1))}))
        if took:
            silence = max(SILENCE * statistics.median(took), SHORTEST_SILENCE)
            faulthandler.dump_traceback_later(silence, file=sys.__stderr__)  # until it is called again or cancelled
        report.write(goodput.SPLIT, step, ledger.take())

    def validation(step):
        with ledger.of("validation"):
            values = validate(state["params"])
            score = finite(values, step)["score"]
        report.write("validation", step, values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        report.say(f"validation at step {step}  {shown}")
        return score

    def back(state, bad):
        """The state of the last checkpoint, as one that has done the bad step, which is left out in this way."""
        checkpoints.finish()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        with ledger.of("restore"):
            if returns == GIVE_UP or (newest := checkpoints.newest()) is None:
                raise bad
            state = checkpoints.restore(newest, shapes)
        report.say(f"{bad.named} at step {bad.step}: back to checkpoint {newest}, and on with step {bad.step + 1}")
        return state | {"step": jax.device_put(np.int32(bad.step), shapes["step"].sharding)}

    ledger.open("steps")
    faulthandler.dump_traceback_later(FIRST_SILENCE, file=sys.__stderr__)
    try:
        with preemption.deferred():
            step = int(state["step"])
            if step and (step % settings.eval_every == 0 or step == report.total) and checkpoints.score(step) is None:
                checkpoints.set_score(step, validation(step))  # it was stopped before or in its validation
            start, batches, saved_at = step, stream(step), time.monotonic()
            batch = next(batches) if step < report.total else None
            while step < report.total:
                shape = tuple(batch[name].shape[-1] for name in FIELDS if name in batch)
                with preemption.nothing_to_save() if step == start else contextlib.nullcontext():
                    state, named = train_step(state, batch)
                step += 1
                with ledger.of("data"):
                    batch = next(batches)  # goes to its devices while they compute the step
                    if not named["gradient_norm"].is_ready():
                        ledger.account = "steps"  # nothing was waited for
                pending.append(named)
                report.compiled(shape)
                report.progress(step)
                # The first process's clock decides when all save.
                old = cluster.first() and 0 < settings.save_minutes * 60 <= time.monotonic() - saved_at
                saved_at = time.monotonic() if old else saved_at
                stop, old = preemption.agreed(old)
                last = step == report.total
                validated = step % settings.eval_every == 0 or last
                saved = validated or stop or old or step % settings.save_every == 0
                try:
                    if saved or step % settings.log_every == 0:
                        log(step)
                    paused, score = report.pause(), None
                    if validated and not stop:
                        try:
                            score = validation(step)
                        except Preempted:  # which is made up for after resuming
                            stop = True
                        report.compiled(shape)
                except Diverged as bad:
                    if settings.on_nan != "restore":
                        raise
                    state, returns = back(state, bad), returns + 1
                    pending.clear()
                    step = bad.step
                    batches = stream(step)
                    batch = next(batches)
                    continue
                if saved:
                    with ledger.of("save"):
                        checkpoints.save(step, state, score)
                    saved_at, returns = time.monotonic(), 0
                report.resume(paused)
                if stop:
                    raise Preempted(f"stopped by SIGTERM at step {step} of {report.total}, which is saved")
    finally:
        faulthandler.cancel_dump_traceback_later()
        with ledger.of("save"):
            checkpoints.finish()  # also when a loss went wrong: the checkpoint under way is still a good one
        report.write(goodput.SPLIT, report.last_progress, ledger.take())
        report.close()
    return state
