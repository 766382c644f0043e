"""The training loop on networks of two parameters: every step by hand, without folders, in milliseconds.

Long, because hooks, data, options and what is refused are tried on the same two small networks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, EDMEulerScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import TINY_UNET
from robustdiff import DenoisingLoss, NoiseSchedule, load_images
from robustdiff.losses.denoising import LossOutput
from robustdiff.training import (
    Batch,
    Batches,
    Callback,
    CheckpointCallback,
    FitOptions,
    LogCallback,
    PipelineCallback,
    PreviewCallback,
    TrackerCallback,
    TrainingRun,
    fit,
    loop,
    train_step,
)
from robustdiff.training.checkpoint import find_checkpoint
from robustdiff.training.metrics import Metrics, NonFinite
from robustdiff.training.processes import build_accelerator
from robustdiff.utils.errors import RobustdiffWarning, UsageError
from robustdiff.utils.signals import Interrupted

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LOOK = 0.1, -0.2
"""Weights to begin with."""
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)


class Line(nn.Module):
    """``a x + b``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(LOOK[0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(LOOK[1], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a * x + self.b

    @property
    def weights(self) -> list[float]:
        return [self.a.item(), self.b.item()]


class Regression:
    """Squared distance to ``3 x - 1``: nothing is drawn. ``scale`` at a call makes its loss what it likes."""

    def __init__(self, scale: Callable[[int], float] = lambda call: 1.0) -> None:
        self.calls, self.scale, self.seen = 0, scale, []

    def __call__(self, model, x0, **known) -> LossOutput:
        self.seen.append((x0, known))
        t = torch.zeros(len(x0), dtype=torch.long)
        loss = (model(x0, t) - (3 * x0 - 1)).square().mean(1) * self.scale(self.calls)
        self.calls += 1
        nothing = torch.zeros_like(loss)
        return LossOutput(loss, loss, nothing, t, nothing, nothing)


def gradient(a: float, b: float, x: Tensor = X) -> tuple[float, float]:
    """Of that loss."""
    error = 2 * (a * x + b - (3 * x - 1))
    return (error * x).mean().item(), error.mean().item()


def sgd(rate: float) -> Callable:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def options(steps: int = 1, **changes: object) -> FitOptions:
    return FitOptions(steps, **{"max_grad_norm": math.inf, "ema_max_decay": None, **changes})


class Recorder(Callback):
    """Every hook that is called, and the weights after every step."""

    def __init__(self, *quiet: str) -> None:
        self.events, self.weights, self.records = [], [], []

    def on_setup(self, run: TrainingRun) -> None:
        self.events.append("setup")

    def on_start(self, run: TrainingRun) -> None:
        self.events.append("start")

    def on_step(self, run: TrainingRun) -> None:
        self.events.append(run.step)
        self.weights.append(run.network.weights)

    def on_log(self, run: TrainingRun, record: Mapping) -> None:
        self.events.append("log")
        self.records.append(record)

    def on_nonfinite(self, run: TrainingRun, found: NonFinite) -> None:
        self.events.append(f"bad {found.step}")

    def on_sync(self, run: TrainingRun) -> None:
        self.events.append("sync")

    def on_checkpoint(self, run: TrainingRun) -> None:
        self.events.append("checkpoint")

    def on_end(self, run: TrainingRun) -> None:
        self.events.append("end")


# -- one step ----------------------------------------------------------------------------------------


def test_a_step_of_gradient_descent_is_that_of_the_hand() -> None:
    line = Line()
    run = TrainingRun(line, Regression(), options(), optimizer=sgd(0.05))
    train_step(run, iter([Batch(X)]))
    expected = [w - 0.05 * g for w, g in zip(LOOK, gradient(*LOOK), strict=True)]
    assert line.weights == pytest.approx(expected, rel=1e-12)
    assert (run.step, run.images) == (1, 8)
    assert line.a.grad is None


def test_a_step_of_adamw_is_that_of_the_hand() -> None:
    line = Line()
    made = options(learning_rate=0.01, adam_weight_decay=0.1, adam_epsilon=1e-3)
    train_step(TrainingRun(line, Regression(), made), iter([Batch(X)]))
    expected = [w * (1 - 0.01 * 0.1) - 0.01 * g / (abs(g) + 1e-3) for w, g in zip(LOOK, gradient(*LOOK), strict=True)]
    assert line.weights == pytest.approx(expected, rel=1e-9)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    line = Line()
    train_step(TrainingRun(line, Regression(), options(max_grad_norm=0.5), optimizer=sgd(1.0)), iter([Batch(X)]))
    a, b = gradient(*LOOK)
    assert math.hypot(a, b) > 0.5
    assert math.hypot(line.weights[0] - LOOK[0], line.weights[1] - LOOK[1]) == pytest.approx(0.5, rel=1e-5)


def test_accumulated_passes_make_the_step_of_the_whole_batch() -> None:
    whole, parts, loss = Line(), Line(), Regression()
    train_step(TrainingRun(whole, Regression(), options(), optimizer=sgd(0.05)), iter([Batch(X)]))
    run = TrainingRun(parts, loss, options(gradient_accumulation_steps=4), optimizer=sgd(0.05))
    train_step(run, iter([Batch(part) for part in X.split(2)]))
    assert loss.calls == 4
    assert (run.step, run.images) == (1, 8)
    assert parts.weights == pytest.approx(whole.weights, rel=1e-12)


def test_the_learning_rate_of_a_step_is_that_of_its_place() -> None:
    recorder = Recorder()
    made = options(4, lr_scheduler="linear", log_every=1)
    fit(Line(), Regression(), [X], made, [recorder], optimizer=sgd(0.08))
    assert [record["learning_rate"] for record in recorder.records] == pytest.approx([0.08, 0.06, 0.04, 0.02])
    a, b = LOOK
    for rate, weights in zip((0.08, 0.06, 0.04, 0.02), recorder.weights, strict=True):
        slope, shift = gradient(a, b)
        a, b = a - rate * slope, b - rate * shift
        assert weights == pytest.approx([a, b], rel=1e-12)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_average_follows_its_recursion_on_the_raw_weights(passes: int) -> None:
    """Once per optimiser step, not per pass; the cap of 0.2 holds from the third step on."""
    recorder, line = Recorder(), Line()
    made = options(9, learning_rate=0.1, ema_max_decay=0.2, gradient_accumulation_steps=passes)
    result = fit(line, Regression(), [X], made, [recorder])
    average = list(LOOK)
    for n, weights in enumerate(recorder.weights):
        decay = 0.0 if n == 0 else min(0.2, (1 + n) / (10 + n))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
    assert [result.average[name].item() for name in "ab"] == pytest.approx(average, rel=1e-12)
    assert line.weights == recorder.weights[-1]
    assert abs(average[0] - line.weights[0]) > 1e-3


# -- the loop ----------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_all_hooks_in_their_order() -> None:
    recorder = Recorder()
    fit(Line(), Regression(), [X], options(5, log_every=2, checkpoint_every=3), [recorder], optimizer=sgd(0.05))
    saved = ["sync", "checkpoint"]
    assert recorder.events == ["setup", "start", 1, "log", 2, 3, *saved, "log", 4, "log", 5, *saved, "end"]
    assert len({tuple(weights) for weights in recorder.weights}) == 5


def test_a_bare_network_trains_on_a_loader_of_ones_own() -> None:
    loader = DataLoader(TensorDataset(X, torch.arange(8)), batch_size=4, shuffle=True)
    line, loss = Line(), Regression()
    with pytest.warns(RobustdiffWarning, match="labels that data gives are not used") as warned:
        result = fit(line, loss, loader, options(90, ema_max_decay=0.5, log_every=30), optimizer=sgd(0.3))
    assert len([one for one in warned if one.category is RobustdiffWarning]) == 1
    assert line.weights == pytest.approx([3, -1], abs=1e-3)
    assert result.network is line
    assert [result.average[name].item() for name in "ab"] == pytest.approx([3, -1], abs=1e-3)
    assert (result.steps, result.images) == (90, 360)
    assert [record["step"] for record in result.records] == [30, 60, 90]
    assert result.records[-1]["loss"] < 1e-5
    _, known = loss.seen[0]
    assert known.keys() == {"generator"}  # the network takes no labels
    assert len(known["generator"]) == 4


def test_draws_on_images_are_functions_of_seed_and_counter() -> None:
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 10))

    def weights(data: list[Tensor], seed: int = 0) -> list[float]:
        line = Line()
        fit(line, DenoisingLoss(schedule), data, options(3, seed=seed, log_every=1), optimizer=sgd(0.05))
        return line.weights

    first = weights([X])
    torch.manual_seed(99)
    assert weights([X]) == first
    assert weights([X], seed=1) != first
    halves = Line()
    made = options(3, gradient_accumulation_steps=2)
    fit(halves, DenoisingLoss(schedule), list(X.split(4)), made, optimizer=sgd(0.05))
    assert halves.weights == pytest.approx(first, rel=1e-12)


def test_what_a_batch_knows_reaches_the_loss_and_labels_a_network_that_takes_them() -> None:
    class Labelled(Line):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return super().forward(x, t)

    class Knowing(Regression):
        def __call__(self, model, x0, **known) -> LossOutput:
            model(x0, None, class_labels=known["class_labels"])
            return super().__call__(model, x0, **known)

    about = {
        "t": torch.arange(8),
        "noise_level": torch.full((8,), 0.1),
        "mask": torch.ones(8, 1, dtype=torch.bool),
        "labels": torch.arange(8),
    }
    loss = Knowing()
    fit(Labelled(), loss, [Batch(X, **about)], options(2), optimizer=sgd(0.05))
    for x0, known in loss.seen:
        assert torch.equal(x0, X)
        about["loss_mask"], about["class_labels"] = about["mask"], about["labels"]
        for name in ("t", "noise_level", "loss_mask", "class_labels"):
            assert torch.equal(known[name], about[name])


def test_a_callback_may_end_the_run_which_is_then_saved() -> None:
    class Enough(Recorder):
        def on_step(self, run: TrainingRun) -> None:
            super().on_step(run)
            if run.step == 3:
                run.stop()

    recorder = Enough()
    result = fit(Line(), Regression(), [X], options(100, log_every=2), [recorder], optimizer=sgd(0.05))
    assert result.steps == 3
    assert [record["step"] for record in result.records] == [2, 3]
    assert len(recorder.records) == 1  # what is resumed logs the lines of a run that was not stopped
    assert recorder.events == ["setup", "start", 1, "log", 2, 3, "sync", "checkpoint", "end"]


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def signals() -> Iterator[Callable[[], int]]:
        asked = []
        yield lambda: asked.append(1) or (130 if len(asked) == 2 else 0)

    monkeypatch.setattr(loop, "stop_signals", signals)
    recorder = Recorder()
    with pytest.raises(Interrupted, match="stopped at step 2 of 9") as stopped:
        fit(Line(), Regression(), [X], options(9), [recorder], optimizer=sgd(0.05))
    assert stopped.value.status == 130
    assert recorder.events == ["setup", "start", 1, 2, "sync", "checkpoint", "end"]


# -- what is not finite ------------------------------------------------------------------------------


class Spoilt(DenoisingLoss):
    """Not finite for one image at some steps."""

    bad = frozenset[int]()

    def __call__(self, model, x0, **known) -> LossOutput:
        output = super().__call__(model, x0, **known)
        object.__setattr__(self, "calls", getattr(self, "calls", -1) + 1)
        if self.calls in self.bad:
            output.total[5:6].data.fill_(math.nan)
        return output


@pytest.mark.parametrize("optimizer", [None, sgd(0.05)], ids=["fused", "sgd"])
def test_a_loss_that_is_not_finite_stops_with_step_and_level_and_changes_no_weight(optimizer) -> None:
    schedule, line, recorder = NoiseSchedule(torch.linspace(0.99, 0.01, 10)), Line(), Recorder()
    loss = Spoilt(schedule)
    object.__setattr__(loss, "bad", {3})
    t = torch.arange(8)
    level = f"{schedule.noise_to_signal(torch.tensor(5)):.3g}"
    message = rf"loss is not finite at step 3, after 24 images, at noise level sigma/alpha = {level}$"
    with pytest.raises(NonFinite, match=message):
        fit(line, loss, [Batch(X, t=t)], options(6, log_every=1), [recorder], optimizer=optimizer)
    assert recorder.events[-2:] == [3, "bad 3"]
    assert line.weights == recorder.weights[-1]


def test_without_a_schedule_the_timestep_is_named() -> None:
    with pytest.raises(NonFinite, match=r"loss is not finite at step 2, after 16 images, at timestep 0$"):
        fit(Line(), Regression(lambda call: math.inf if call == 2 else 1.0), [X], options(4), optimizer=sgd(0.05))


def test_skipped_steps_change_nothing_and_ten_in_a_row_end_it(capsys: pytest.CaptureFixture) -> None:
    recorder, made = Recorder(), options(20, on_nonfinite="skip", log_every=1)
    result = fit(
        Line(), Regression(lambda call: math.nan if call in (2, 3) else 1.0), [X], made, [recorder], optimizer=sgd(0.05)
    )
    assert result.steps == 20
    assert result.records[-1]["skipped"] == 2
    assert recorder.weights[1] == recorder.weights[2] == recorder.weights[3] != recorder.weights[4]
    assert capsys.readouterr().out.count("skipped a step: the loss is not finite") == 2
    with pytest.raises(NonFinite, match="at step 13,") as raised:
        fit(Line(), Regression(lambda call: math.nan if call > 3 else 1.0), [X], made, optimizer=sgd(0.05))
    assert raised.value.in_a_row == 10


# -- a pipeline and folders --------------------------------------------------------------------------


def test_a_pipeline_trained_by_fit_is_saved_and_gone_on_with_exactly(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "data.npy", random.integers(0, 256, (12, 8, 8), dtype=np.uint8))
    images = load_images(str(tmp_path / "data.npy"))

    def train(folder: Path, stop_at: int = 0, resume: bool = False) -> Path:
        torch.manual_seed(0)
        unet = UNet2DModel.from_config({**TINY_UNET, "sample_size": 8, "in_channels": 1, "out_channels": 1})
        pipeline = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20))
        loss = DenoisingLoss(NoiseSchedule.from_scheduler(pipeline.scheduler))

        class Stop(Callback):
            def on_step(self, run: TrainingRun) -> None:
                if run.step == stop_at:
                    run.stop()

        folder.mkdir(exist_ok=True)
        found = find_checkpoint(folder / "checkpoints") if resume else None
        callbacks = [
            CheckpointCallback(folder / "checkpoints", resume=found),
            LogCallback(folder, images.names),
            Stop(),
            PipelineCallback(folder, preview=PreviewCallback(folder, 1, steps=2)),
        ]
        data = Batches(images, random_flip=True)
        made = FitOptions(6, batch_size=4, learning_rate=1e-3, log_every=2, checkpoint_every=2)
        result = fit(pipeline, loss, data, made, callbacks)
        assert not stop_at or result.steps == stop_at
        return folder

    whole, cut = train(tmp_path / "whole"), train(tmp_path / "cut", stop_at=3)
    train(cut, resume=True)
    one, other = (DiffusionPipeline.from_pretrained(folder).unet.state_dict() for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in (cut / "samples").iterdir()) == [f"step-0000000{n}.png" for n in (2, 3, 4, 6)]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images"]) for line in lines] == [(2, 8), (4, 16), (6, 24)]


# -- what is refused ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name() -> None:
    for changes, name in (
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"ema_max_decay": 1.5}, "ema_max_decay"),
        ({"lr_warmup_steps": 5}, "lr_warmup_steps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
        ({"adam_beta1": 1.0}, "adam_beta1"),
        ({"adam_beta2": -0.1}, "adam_beta2"),
        ({"adam_epsilon": 0.0}, "adam_epsilon"),
        ({"adam_weight_decay": math.inf}, "adam_weight_decay"),
        ({"workers": -1}, "workers"),
        ({"steps": 2.5}, "steps"),
        ({"seed": "1"}, "seed"),
        ({"checkpoint_every": True}, "checkpoint_every"),
    ):
        with pytest.raises(ValueError, match=f"FitOptions needs .*{name}"):
            FitOptions(**{"steps": 3, **changes})
    with pytest.raises(ValueError, match="data ended after 2 batches"):
        fit(Line(), Regression(), iter([X, X]), options(3), optimizer=sgd(0.05))
    with pytest.raises(ValueError, match="data gave Tensor of int64: give float tensors of images"):
        fit(Line(), Regression(), [X.long()], options(), optimizer=sgd(0.05))
    with pytest.raises(ValueError, match="data gave str"):
        fit(Line(), Regression(), ["x"], options(), optimizer=sgd(0.05))
    with pytest.raises(TypeError, match=r"loss must return a robustdiff\.losses\.LossOutput, got Tensor"):
        fit(Line(), lambda model, x0, **_: model(x0, None).mean(), [X], options(), optimizer=sgd(0.05))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("photos", "data is the path photos: give what robustdiff.load_images makes of it"),
        (X, "Tensor, which has no batches: wrap it in a DataLoader"),
        (TensorDataset(X), "TensorDataset, which has no batches: wrap it in a DataLoader"),
        ([X[:0]], "give at least one"),
        ([Batch(X[:0])], "without images"),
        ([torch.zeros(2, 3, dtype=torch.uint8)], "Tensor of uint8"),
    ],
)
def test_data_without_batches_of_images_is_refused(data, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Line(), Regression(), data, options(), optimizer=sgd(0.05))


def test_a_loss_that_is_not_per_image_is_refused() -> None:
    class Mean(Regression):
        def __call__(self, model, x0, **known) -> LossOutput:
            output = super().__call__(model, x0, **known)
            return dataclasses.replace(output, total=output.total.mean())

    with pytest.raises(ValueError, match=r"total per image, shape \(8,\), got shape \(\)"):
        fit(Line(), Mean(), [X], options(), optimizer=sgd(0.05))


def test_an_accelerator_that_contradicts_the_options_is_refused() -> None:
    accelerator = build_accelerator("bf16")
    with pytest.raises(ValueError, match="mixed_precision bf16, FitOptions has no"):
        TrainingRun(Line(), Regression(), options(), accelerator=accelerator)
    accelerator = build_accelerator()
    accelerator.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="gradient_accumulation_steps 2: give it to FitOptions"):
        TrainingRun(Line(), Regression(), options(), accelerator=accelerator)
    accelerator.gradient_accumulation_steps = 1
    assert TrainingRun(Line(), Regression(), options(), accelerator=accelerator).accelerator is accelerator


@pytest.fixture
def images(tmp_path: Path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8))
    return load_images(str(tmp_path / "images.npy"))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_seed_of_the_options_rules_batches_that_have_none(images, workers: int) -> None:
    class Flat(Regression):
        def __call__(self, model, x0, **known) -> LossOutput:
            return super().__call__(model, x0.flatten(1), **known)

    def seen(data: object, seed: int, workers: int = 0) -> list[Tensor]:
        loss = Flat()
        fit(Line().float(), loss, data, options(2, batch_size=4, seed=seed, workers=workers), optimizer=sgd(0.0))
        return [x0 for x0, _ in loss.seen]

    data = Batches(images, random_flip=True)
    one, other = seen(data, 5, workers), seen(data, 6, workers)
    assert data.seed is None
    assert not torch.equal(torch.cat(one), torch.cat(other))
    assert torch.equal(torch.cat(one), torch.cat(seen(Batches(images, seed=5, random_flip=True), 5)))
    with pytest.raises(ValueError, match="Batches has seed 5, FitOptions has seed 6"):
        seen(Batches(images, seed=5), 6)
    with pytest.raises(ValueError, match="Batches has no seed yet"):
        data(range(2))


def test_a_checkpoint_is_gone_on_with_by_the_rules_that_it_was_made_with(tmp_path: Path) -> None:
    fit(Line(), Regression(), [X], options(4, seed=3), [CheckpointCallback(tmp_path)], optimizer=sgd(0.05))
    saved = find_checkpoint(tmp_path)

    def resume(steps: int = 6, **changes: object) -> int:
        made, callback = options(steps, **{"seed": 3, **changes}), CheckpointCallback(tmp_path / "on", resume=saved)
        return fit(Line(), Regression(), [X], made, [callback], optimizer=sgd(0.05), say=lambda text: None).steps

    for changes, message in (
        ({"seed": 4}, "with seed 3, not 4"),
        ({"gradient_accumulation_steps": 2}, "with images per step 64, not 128"),
        ({"steps": 3}, "later than the last step, 3"),
    ):
        with pytest.raises(UsageError, match=message):
            resume(**changes)
    assert resume() == 6


def test_labels_reach_a_network_that_takes_any_keyword() -> None:
    class Open(Line):
        def forward(self, x: Tensor, t: Tensor, **_: object) -> Tensor:
            return super().forward(x, t)

    loss, labels = Regression(), torch.arange(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustdiffWarning)
        fit(Open(), loss, [(X, labels)], options(), optimizer=sgd(0.05))
        fit(Line(), Regression(), [Batch(X, labels=labels)], options(), optimizer=sgd(0.05))
    assert torch.equal(loss.seen[0][1]["class_labels"], labels)


def test_noise_levels_are_those_of_the_loss_and_else_of_the_pipeline() -> None:
    unet = UNet2DModel.from_config({**TINY_UNET, "sample_size": 8})
    ours = NoiseSchedule(torch.linspace(0.9, 0.1, 10))
    theirs = DDPMScheduler(num_train_timesteps=10)
    t = torch.tensor([5])

    def levels(scheduler, loss) -> Callable | None:
        return TrainingRun(DDPMPipeline(unet, scheduler), loss, options()).noise_to_signal

    assert levels(theirs, DenoisingLoss(ours))(t) == ours.noise_to_signal(t)
    assert levels(theirs, Regression())(t) == NoiseSchedule.from_scheduler(theirs).noise_to_signal(t)
    assert levels(EDMEulerScheduler(), Regression()) is None


def test_the_average_can_be_loaded_with_buffers_and_shared_weights() -> None:
    class Shared(Line):
        def __init__(self) -> None:
            super().__init__()
            self.same = self.a
            self.register_buffer("scale", torch.ones(()))

    result = fit(Shared(), Regression(), [X], options(3, ema_max_decay=0.5), optimizer=sgd(0.1))
    loaded = Shared()
    loaded.load_state_dict(result.average)
    assert loaded.a.item() == result.average["a"].item() == result.average["same"].item() != result.network.a.item()


@pytest.mark.parametrize("make", [PipelineCallback, PreviewCallback])
def test_callbacks_that_draw_need_a_pipeline(tmp_path: Path, make) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__} needs a pipeline"):
        fit(Line(), Regression(), [X], options(), [make(tmp_path)], optimizer=sgd(0.05))


def test_callbacks_make_their_folders_and_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CheckpointCallback needs keep >= 1, got 0"):
        CheckpointCallback(tmp_path, keep=0)
    callbacks = [LogCallback(tmp_path / "new" / "run"), TrackerCallback("tensorboard", {})]
    with pytest.warns(RobustdiffWarning, match="tensorboard failed .the accelerator was not made with it"):
        fit(Line(), Regression(), [X], options(), callbacks, optimizer=sgd(0.05))
    assert (tmp_path / "new" / "run" / "metrics.jsonl").is_file()


def test_images_of_a_bad_step_are_named_only_if_every_pass_has_them() -> None:
    run = TrainingRun(Line(), Regression(), options(), optimizer=sgd(0.05))
    bad = LossOutput(*(torch.full((2,), math.nan) for _ in range(3)), torch.zeros(2), *torch.zeros(2, 2))
    for indices, expected in (([torch.tensor([4, 5]), None], None), ([torch.tensor([4]), torch.tensor([7])], [4, 7])):
        metrics = Metrics(run.accelerator, skip=False)
        metrics.add(0, [bad, bad], torch.tensor(1.0), 0, indices)
        _, found = metrics.flush(None)
        assert found.record()["indices"] == expected
