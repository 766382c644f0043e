"""What one worker does: train a network or take it from disk, and judge each of the rows that need it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from experiments.paper import linear
from experiments.paper.errors import (
    ImageOptions,
    build_world,
    choose,
    dimension,
    few_step,
    floor_of,
    free_choices,
    ideal,
    jacobian,
    judge,
    predicted_variance,
    training_for,
    training_set,
)
from experiments.paper.toy_grid import Row, Training, training_data
from experiments.paper.toy_training import (
    Denoiser,
    Stopped,
    draw,
    load,
    save,
    schedule_for,
    settings_of,
    train,
)
from experiments.paper.worlds import LinearGaussian, Plane, World
from robustdiff.utils.random import draw_normal
from robustdiff.utils.seeds import derive_seed

CURVES = ("ideal", "plain", "adversarial-shift", "gated-low", "gated-mid", "label-floor", "clean-subset")
"""Rows whose error is also measured against the number of network calls, with their Jacobians (first seed)."""


GAIN_LEVEL = 10.0
"""Noise level sigma/alpha at which the reported noise of the experiment ``invariance`` is compared with theory."""


@dataclass(frozen=True)
class Task:
    """One network with one seed, and the rows that need it."""

    rows: tuple[Row, ...]
    seed: int
    quick: bool
    images: ImageOptions
    folder: Path

    @property
    def name(self) -> str:
        """Name of the network's file."""
        row = self.rows[0]
        return f"{row.world}-{row.dirt}-{row.trained}-seed{self.seed}"


def row_settings(row: Row, quick: bool, images: ImageOptions) -> dict[str, Any]:
    """Everything that a row's numbers depend on beside seed and versions."""
    training = training_for(build_world(row.world, images), quick)
    prediction = row.what.prediction
    found: dict[str, Any] = json.loads(json.dumps({**settings_of(training, prediction), **row.what.settings}))
    return found


_stop: Any = None


def begin(event: Any) -> None:  # noqa: ANN401 - multiprocessing's events have no public type
    """Prepare a worker: one thread, and the parent alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # killed outright, it could not say so: its workers would wait for work for ever

    threading.Thread(target=follow, daemon=True).start()
    global _stop
    _stop = event


def work(task: Task) -> list[dict[str, Any]] | None:
    """Train the task's network, or take it from disk, and judge each of its rows."""
    first = task.rows[0]
    world = build_world(first.world, task.images)
    training = training_for(world, task.quick)
    network = trained_network(first, task.seed, task.quick, task.images, task.folder, stop=True)
    if network is None:
        return None
    results = []
    for row in task.rows:
        started = time.perf_counter()
        asked, change, chosen = network, None, {}
        if row.what.free:
            setting = choose(row.world, world, row.what.free, network, training, task.seed)
            asked, change = free_choices(row.what.free, network)[setting]
            chosen = {"chosen": setting}
        values = judge(world, asked, training, task.seed, *([change] if change else []))
        if row.experiment == "invariance":
            values.update(_predictions(row, world, training, asked, task.seed))
        curves: dict[str, Any] = {}
        if row.method in CURVES and task.seed == 0 and not task.quick and row.experiment != "invariance":
            curves = few_step(row.world, world, asked, training, task.seed)
            curves |= jacobian(world, asked, training, task.seed)
        results.append(
            {
                "values": values,
                "floor": floor_of(world, training, task.seed),
                "curves": curves,
                "seconds": round(time.perf_counter() - started + (0 if row.what.free else network.seconds), 2),
                **chosen,
            }
        )
    return results


def trained_network(
    row: Row, seed: int, quick: bool, images: ImageOptions, folder: Path, *, stop: bool = False
) -> Denoiser | None:
    """The row's network from disk, or trained and kept there; None if it was told to stop while training.

    Args:
        row: What to train.
        seed: Rules training set, dirt, weights and batches.
        quick: Short training.
        images: Of the image world.
        folder: Of the experiment.
        stop: Whether this is a worker, which its parent may stop.
    """
    world = build_world(row.world, images)
    training = training_for(world, quick)
    asked = replace(row, method=row.trained)  # a free row asks another's network, of the same experiment
    method = asked.what
    schedule = schedule_for(method.prediction)
    if method.exact:
        return ideal(world, schedule)
    x0, hit = training_set(world, row.dirt, training, seed)
    about = [row_settings(asked, quick, images), row.dirt, seed, tuple(x0.shape)]
    path = folder / "networks" / f"{row.world}-{row.dirt}-{row.trained}-seed{seed}.safetensors"
    found = load(path, x0.shape[1], training, about)
    if found is None:
        data = training_data(method, x0, hit)
        started = time.perf_counter()
        try:
            model = train(method.objective(schedule), data, training, seed, _stop.is_set if stop and _stop else bool)
        except Stopped:
            return None
        found = model, time.perf_counter() - started
        save(model, path, about, found[1])
    return Denoiser(found[0], schedule, found[1])


def _predictions(row: Row, world: World, training: Training, denoiser: Denoiser, seed: int) -> dict[str, float]:
    """What T3 and T5 say of the network and of its draws, beside what they are.

    * The standard deviation along the largest and the smallest direction: true, generated, predicted.
    * The noise gain: of the noise in a training state of level ``GAIN_LEVEL``, how much the network reports along the
      largest direction (regression of sigma eps_hat on x_t); ``sigma w`` of docs/explanation/theory.md.

    The closed form is that of a Gaussian of the world's covariance.
    """
    x = draw(denoiser, training.samples, dimension(world), training.calls, seed)
    if isinstance(world, Plane):
        true = torch.tensor([world.half_width**2 / 3] * 2 + [0.0], dtype=torch.float64)
        found = world.coordinates(x.double()).var(0)
    else:
        assert isinstance(world, LinearGaussian)
        true, found = world.variances, world.coordinates(x).var(0)
    kind, m = row.method.split("-")[0], row.what.settings.get("m", 0.0)
    schedule = denoiser.schedule
    expected = predicted_variance(true, kind, m, schedule, training.calls)
    t = schedule.timestep_at(torch.tensor([GAIN_LEVEL]))[0]
    generator = torch.Generator().manual_seed(derive_seed("gain", seed))
    x0 = world.sample(20_000, generator)
    x_t = schedule.add_noise(x0, draw_normal(x0, generator), t)
    state, reported = (world.coordinates(y.double())[:, 0] for y in (x_t, denoiser.eps_hat(x_t, t)))
    alpha_bar = float(schedule.alphas_cumprod.double()[t])
    w = (linear.invariance_optimum if kind == "invariance" else linear.optimum)(alpha_bar, true, m)[0]
    return {
        "sd_large_true": float(true[0].sqrt()),
        "sd_large": float(found[0].sqrt()),
        "sd_large_predicted": float(expected[0].sqrt()),
        "sd_small_true": float(true[-1].sqrt()),
        "sd_small": float(found[-1].sqrt()),
        "sd_small_predicted": float(expected[-1].sqrt()),
        "noise_gain": float(schedule.sigma(t) * (state * reported).sum() / state.square().sum()),
        "noise_gain_predicted": float((1 - alpha_bar) ** 0.5 * w),
    }
