"""The same run, bit for bit, wherever it is stopped, however it is fed, and whatever it shares its batches with."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers import TINY_UNET, Calls, SmallNet, assert_same_but_rounding
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.training import loop
from robustdiff.training.config import TrainConfig
from robustdiff.training.loader import Batches, RankSampler, iterate_batches
from robustdiff.training.setup import build_objective
from robustdiff.training.trainer import train
from robustdiff.utils.signals import Interrupted

STEPS = 8
DIRT = ("gaussian:sigma=0.2,fraction=0.5", "missing:amount=0.2")
HELD, STREAMED = {"max_memory_gib": 1.0}, {"max_memory_gib": 0.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven 8 x 8 grey images of two classes: with batches of four, passes over the data end inside batches."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    random = np.random.default_rng(0)
    for i in range(7):
        path = folder / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def base(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Eight steps of 2 x 2 images with everything that draws: dirt, flips, classes, dropout, a wide gate.

    Lines come every three steps and checkpoints every four, so that most stops fall between both.
    """
    path = tmp_path_factory.mktemp("config") / "unet.json"
    path.write_text(json.dumps({**TINY_UNET, "dropout": 0.2}))
    return TrainConfig(
        str(photos),
        images=str(4 * STEPS),
        train_batch_size=2,
        gradient_accumulation_steps=2,
        model_config_name_or_path=str(path),
        learning_rate=1e-3,
        lr_warmup_steps=3,
        ddpm_num_steps=100,
        ddpm_num_inference_steps=2,
        preview_images=1,
        checkpointing_steps=4,
        logging_steps=3,
        random_flip=True,
        class_conditional=True,
        corrupt=DIRT,
        gate="0:0.7",
        dataloader_num_workers=0,
        **HELD,
    )


Outcome = dict[str, object]


def outcome(folder: Path, steps: int = STEPS) -> Outcome:
    """Everything a run of ``steps`` leaves that must not depend on its path: tensors, counters, lines, preview."""
    last = folder / "checkpoints" / f"step-{steps:08d}"
    found: Outcome = {}
    for path in (
        *(last / f"{name}.safetensors" for name in ("model", "ema", "optimizer")),
        *folder.glob("unet/*.saf*"),
    ):
        found |= {f"{path.name} {name}": value for name, value in load_file(path).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["lines"] = [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]
    found["state.json"] = json.loads((last / "state.json").read_text())
    found["preview"] = (folder / "samples" / f"step-{steps:08d}.png").read_bytes()
    return found


def differences(a: Outcome, b: Outcome) -> list[str]:
    """Names of what is not bitwise the same."""

    def same(x: object, y: object) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name])]


@pytest.fixture
def run(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains into a folder, with changes; ``after`` stops it so many steps later, as Ctrl-C does."""

    def go(folder: Path, after: int = 0, **changes: object) -> Path:
        @contextlib.contextmanager
        def signals() -> Iterator[Callable[[], int]]:
            asked = []

            def status() -> int:
                asked.append(1)
                return 130 if len(asked) == after else 0

            yield status

        with monkeypatch.context() as patch:
            patch.setattr(loop, "stop_signals", signals)
            config = dataclasses.replace(base, output_dir=str(folder), **changes)
            if not after:
                return train(config)
            with pytest.raises(Interrupted, match=r"saved; go on with .*`resume`"):
                train(config)
            return folder

    return go


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """The outcome of the run that is never stopped, held and fed without workers; trained once per setting."""
    known: dict[str, Outcome] = {}

    def get(**changes: object) -> Outcome:
        key = repr(sorted(changes.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("whole")
            known[key] = outcome(train(dataclasses.replace(base, output_dir=str(folder / "run"), **changes)))
        return known[key]

    return get


Whole = Callable[..., Outcome]


# -- stopped and resumed -----------------------------------------------------------------------------


def test_the_reference_run_has_everything_that_could_go_wrong(whole: Whole) -> None:
    """The gate passes some images only, lines and checkpoints do not align, and the seed changes everything."""
    one = whole()
    assert [line["step"] for line in one["lines"]] == [3, 6, STEPS]
    assert all(0 < line["regularised"] < 1 for line in one["lines"])
    changed = differences(one, whole(seed=1))
    assert "lines" in changed
    assert "model.safetensors conv_in.weight" in changed


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize(
    "way",
    [
        {"preset": "gated"},
        {"preset": "paper", "gate": None, "dataloader_num_workers": 2, **STREAMED},
    ],
    ids=["gated-held-no-workers", "paper-streamed-two-workers"],
)
def test_stopped_at_any_step_and_resumed(run: Run, whole: Whole, tmp_path: Path, way: dict, step: int) -> None:
    objective = {name: value for name, value in way.items() if name in ("preset", "gate")}
    folder = run(tmp_path / "run", after=step, **way)
    assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    run(folder, resume=True, **way)
    assert differences(outcome(folder), whole(**objective)) == []


@pytest.mark.parametrize(
    "way",
    [
        {"preset": "gated", "dataloader_num_workers": 2},
        pytest.param({"preset": "gated", **STREAMED}, marks=pytest.mark.slow),
        {"preset": "paper", "gate": None},
        pytest.param(
            {"preset": "plain", "gate": None, "dataloader_num_workers": 1, **STREAMED}, marks=pytest.mark.slow
        ),
    ],
    ids=["gated-held-two-workers", "gated-streamed", "paper-held", "plain-streamed-one-worker"],
)
def test_stopped_and_resumed_in_the_other_ways_of_feeding(run: Run, whole: Whole, tmp_path: Path, way: dict) -> None:
    objective = {name: value for name, value in way.items() if name in ("preset", "gate")}
    folder = run(tmp_path / "run", after=5, **way)
    run(folder, resume=True, **way)
    assert differences(outcome(folder), whole(**objective)) == []


@pytest.mark.slow
def test_stopped_after_every_single_step(run: Run, whole: Whole, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", after=1)
    for step in range(2, STEPS):
        run(folder, after=1, resume=True)
        assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    run(folder, resume=True)
    assert differences(outcome(folder), whole()) == []


def test_each_part_of_a_run_may_be_fed_and_saved_in_its_own_way(run: Run, whole: Whole, tmp_path: Path) -> None:
    """Held, streamed, with workers and without, and another interval of checkpoints: none of it changes a bit."""
    folder = run(tmp_path / "run", after=2)
    run(folder, after=3, resume=True, checkpointing_steps=1, dataloader_num_workers=2, **STREAMED)
    run(folder, after=2, resume=True, checkpointing_steps=100, **STREAMED)
    run(folder, resume=True, checkpointing_steps=3, dataloader_num_workers=1)
    assert differences(outcome(folder), whole()) == []


def test_going_back_to_an_earlier_checkpoint_repeats_what_came_after_it(run: Run, whole: Whole, tmp_path: Path) -> None:
    """Two steps past a line, so that steps which wait for the next line come out of the checkpoint."""
    folder = run(tmp_path / "run", checkpointing_steps=5, checkpoints_total_limit=3)
    waiting = json.loads((folder / "checkpoints" / "step-00000005" / "state.json").read_text())["metrics"]["rows"]
    assert len(waiting) == 2
    run(folder, resume_from_checkpoint="step-5")
    assert differences(outcome(folder), whole()) == []


def test_a_run_that_is_resumed_at_its_end_changes_nothing(run: Run, whole: Whole, tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    run(folder, resume=True)
    assert differences(outcome(folder), whole()) == []


def test_another_split_of_the_batch_changes_rounding_only(run: Run, base: TrainConfig, tmp_path: Path) -> None:
    """Without dropout, whose masks belong to the passes."""
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    plain = {"model_config_name_or_path": str(tmp_path / "unet.json")}
    one = outcome(run(tmp_path / "one", **plain))
    folder = run(tmp_path / "split", after=4, **plain)
    run(folder, after=2, resume=True, train_batch_size=1, gradient_accumulation_steps=4, **plain)
    run(folder, resume=True, train_batch_size=4, gradient_accumulation_steps=1, **plain)
    other = outcome(folder)
    weights = [{name: end[name] for name in end if name.startswith(("model.", "ema."))} for end in (one, other)]
    assert_same_but_rounding(*weights)
    for a, b in zip(one["lines"], other["lines"], strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


# -- pure functions of the counter -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["held", "streamed"])
def batches(request: pytest.FixtureRequest, photos: Path) -> Batches:
    """The rule that training follows."""
    data = load_images(photos, max_memory=None if request.param == "held" else 0)
    assert data.streamed == (request.param == "streamed")
    return fresh(data)


def fresh(data: object) -> Batches:
    """A rule that remembers nothing."""
    return Batches(data, tuple(map(Corruption.parse, DIRT)), seed=3, random_flip=True)


def one_by_one(batches: Batches, counters: range) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Image, first draws and label of each counter, asked for alone and with no memory of the others."""
    result = []
    for counter in counters:
        batch = fresh(batches.images)(range(counter, counter + 1))
        (generator,) = batch.generators
        result.append((batch.x0[0], torch.rand(5, generator=generator), int(batch.labels[0])))
    return result


def test_images_draws_and_labels_belong_to_the_counter(batches: Batches) -> None:
    """Batches of any size, backwards and across the ends of passes over the data, from one rule or a new one."""
    alone = one_by_one(batches, range(30))
    assert len({x0.numpy().tobytes() for x0, _, _ in alone}) > 7  # mirrored or not, so more than there are images
    assert len({tuple(draws.tolist()) for _, draws, _ in alone}) == 30
    for size in (7, 5, 30, 2):
        for first in reversed(range(0, 30 - size + 1, size)):
            batch = batches(range(first, first + size))
            assert batch.index.tolist() == [batches.index(counter) for counter in batch.counters]
            for place in range(size):
                image, draws, label = alone[first + place]
                assert torch.equal(batch.x0[place], image), (size, first, place)
                assert torch.equal(torch.rand(5, generator=batch.generators[place]), draws)
                assert int(batch.labels[place]) == label


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_processes_get_the_images_of_the_counter(batches: Batches, workers: int) -> None:
    alone = one_by_one(batches, range(24))
    seen = []
    for process in range(2):
        shares = RankSampler(1, 3, 8, 2, process, 2)
        for batch in iterate_batches(fresh(batches.images), shares, workers):
            for place, counter in enumerate(batch.counters):
                image, draws, label = alone[counter]
                assert torch.equal(batch.x0[place], image)
                assert torch.equal(torch.rand(5, generator=batch.generators[place]), draws)
                assert int(batch.labels[place]) == label
                seen.append(counter)
    assert sorted(seen) == list(range(8, 24))


def test_global_randomness_rules_nothing_and_is_left_alone(batches: Batches) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [batch.x0 for batch in iterate_batches(fresh(batches.images), RankSampler(0, 3, 4, 4, 0, 1), 1)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = [batch.x0 for batch in iterate_batches(fresh(batches.images), RankSampler(0, 3, 4, 4, 0, 1), 1)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("preset", ["gated", "paper"])
def test_timesteps_noise_and_perturbation_belong_to_the_counter(batches: Batches, base, preset: str) -> None:
    """What the network is given, pass by pass, is bitwise the same in a batch of 12 and one by one."""
    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 100))
    gate = "0:1" if preset == "gated" else None
    objective = build_objective(dataclasses.replace(base, preset=preset, gate=gate), schedule)
    assert isinstance(objective, EquivarianceLoss)

    class Half(torch.nn.Module):  # works on each number alone: batches cannot change its rounding
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x * 0.5 + 0.01 * t[:, None, None, None]

    def inputs(counters: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Everything the network is given, row by row in the order of the counters, one list per pass."""
        model = Calls(Half())
        batch = batches(counters)
        objective(model, batch.x0, generator=batch.generators)
        return [(x, t) for x, t, _ in model.seen]

    together = inputs(range(12))
    alone = [inputs(range(counter, counter + 1)) for counter in range(12)]
    assert len(together) == (3 if preset == "paper" else 2)
    for number, (x, t) in enumerate(together):
        rows = [seen[number] for seen in alone if len(seen) > number]  # closed gates leave passes out
        assert len(rows) == len(x)
        assert torch.equal(x, torch.cat([row for row, _ in rows]))
        assert torch.equal(t, torch.cat([row for _, row in rows]))
    assert 1 < len(together[-1][0]) <= 12
    if preset == "gated":
        assert len(together[-1][0]) < 12


def test_losses_of_a_real_network_follow(batches: Batches) -> None:
    objective = EquivarianceLoss.preset("paper", NoiseSchedule(torch.linspace(0.999, 0.01, 100)))
    network = SmallNet(channels=1, dtype=torch.float32)

    def totals(counters: range) -> torch.Tensor:
        batch = batches(counters)
        return objective(network, batch.x0, generator=batch.generators).total.detach()

    split = torch.cat([totals(range(0, 3)), totals(range(3, 4)), totals(range(4, 12))])
    torch.testing.assert_close(split, totals(range(12)), atol=1e-6, rtol=1e-5)
