"""Attacks on a batch as a whole: closed forms of the linear world, another library's kernel, gradients, the command."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.metrics.pairwise import polynomial_kernel
from torch import Tensor, nn

from attack_runs import command, raised, result, run_folder, stop_at, value
from experiments.paper import linear
from helpers import normal, seeded
from linear_networks import PROCESS, VARIANCES, linear_trajectory, points, random_network
from robustdiff.attacks.batch_goals import BatchDistance, FeatureDistance
from robustdiff.attacks.benchmark import run
from robustdiff.attacks.benchmark.sanity_checks import INFORMATIVE, check_gradient
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import (
    AttackGoal,
    FinalImageShift,
    evaluate,
    value_and_gradient,
)
from robustdiff.attacks.optimizers import APGD, PGD, RandomSearch
from robustdiff.commands import main
from robustdiff.diffusion.samplers import DifferentiableSampler
from robustdiff.evaluation.extractors import Extractor, differentiable, open_extractor
from robustdiff.utils.errors import UsageError
from robustdiff.utils.random import image_generators

pytestmark = pytest.mark.usefixtures("few_for_the_spread")
IMAGES = 6


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def gains() -> tuple[Tensor, Tensor]:
    """Of each of 20 DDIM steps, and the noise scale before it."""
    times = torch.tensor([step.t for step in linear_trajectory().steps])
    alpha_bar = torch.cat([PROCESS.alphas_cumprod.double()[times], torch.ones(1).double()])
    return linear.ddim_gains(alpha_bar, linear.optimum(alpha_bar[:-1], VARIANCES)), (1 - alpha_bar[:-1]).sqrt()


def linear_batch(attacked: list[int], away: Tensor, **settings: Any) -> tuple[BatchDistance, Tensor]:
    """Pixels of a linear sampler against a reference whose mean is ``away`` from the undisturbed one's."""
    batch = FinalImageShift(linear_trajectory(), points(IMAGES), attacked)
    with torch.no_grad():
        centre = batch.images(None, ()).mean(0)
    reference = centre - away + torch.tensor([[-1.0], [1.0]]).double()
    return BatchDistance(batch, FeatureDistance(pixels, reference), **settings), away


@pytest.mark.parametrize("attack", [PGD(15), APGD(15)], ids=["pgd", "apgd"])
@pytest.mark.parametrize("attacked", [[3], [0, 5, 19], list(range(20))], ids=["one", "three", "all"])
def test_in_a_box_every_image_is_pushed_away_from_the_mean_in_every_element(attack, attacked) -> None:
    """sum_i (|c_i| + r sum_k s_k prod_{j >= k} |g_ji|)^2, as the mean of B equal pushes is one of them."""
    step, sigma = gains()
    reach = 0.1 * (sigma[:, None] * step.abs().flip(0).cumprod(0).flip(0))[attacked].sum(0)
    # farther than the pushes reach: there is one best way in every element
    objective, away = linear_batch(attacked, 1.5 * reach * torch.tensor([1, -1, 1, 1, -1]))
    found = attack(objective, LpBall("linf", 0.1), objective.like, seeded())
    truth = float((away.abs() + reach).square().sum())
    assert found.value.tolist() == pytest.approx([truth] * IMAGES, rel=1e-4)
    assert LpBall("linf", 0.1).length(found.omega).max() <= 0.1 * (1 + 1e-9)


def test_in_the_euclidean_ball_it_is_the_farthest_point_of_an_ellipsoid() -> None:
    """max |c + G u|, |u| = r: ``(mu - G^2) u = G c`` with the largest mu for which u is that long."""
    step, sigma = gains()
    reach = (sigma[4] * step[4:].prod(0)).abs()
    objective, away = linear_batch([4], 0.3 * reach * torch.tensor([1.0, 0.4, 2.0, -1.0, 0.3]))
    radius, pull = 0.3, (reach * away).numpy()

    def too_long(mu: float) -> float:
        return float(np.linalg.norm(pull / (mu - reach.numpy() ** 2)) - radius)

    low = float(reach.max()) ** 2
    push = pull / (brentq(too_long, low * (1 + 1e-9), low * 1e6, xtol=1e-14) - reach.numpy() ** 2)
    truth = float(np.square(away.numpy() + reach.numpy() * push).sum())
    found = PGD(100, step_size=1.0)(objective, LpBall("l2", radius), objective.like, seeded())
    assert found.value.tolist() == pytest.approx([truth] * IMAGES, rel=1e-4)
    assert (found.value <= truth * (1 + 1e-6)).all()
    assert LpBall("l2", radius).excess(found.omega) <= 1 + 1e-9


def test_the_kernel_distance_is_that_of_scikit_learns_kernel() -> None:
    a, b = normal(7, 4), normal(1500, 4, seed=1) + 0.5  # more rows than are looked at in one go
    within, real, across = (polynomial_kernel(x, y, 3, 1 / 4, 1) for x, y in ((a, a), (b, b), (a, b)))
    means = [(k.sum() - np.trace(k)) / len(k) / (len(k) - 1) for k in (within, real)]
    found = float(FeatureDistance(pixels, b, "kernel")(a))
    assert found == pytest.approx(sum(means) - 2 * across.mean(), rel=1e-9)
    mean = float(FeatureDistance(pixels, b)(a))
    assert mean == pytest.approx(float(np.square(a.numpy().mean(0) - b.numpy().mean(0)).sum()), rel=1e-9)


def network_batch(kind: str, sampler: str = "ddim", terms: int = 1, **settings: Any) -> BatchDistance:
    """A nonlinear sampler and nonlinear features of five images."""
    trajectory = DifferentiableSampler.of(random_network().double(), PROCESS, sampler, 8)  # type: ignore[arg-type]
    x = normal(5, 3, seed=1)
    noises = [trajectory.draw_noise(x, seeded(i)) for i in range(terms)]
    checkpointed = settings.pop("checkpointed", True)
    batch = FinalImageShift(trajectory, x, [1, 4], noises.__getitem__, terms, checkpointed=checkpointed)
    weights = normal(3, 6, seed=5)
    distance = FeatureDistance(lambda images: (images.asinh() @ weights / 10).tanh(), normal(20, 6, seed=6), kind)  # type: ignore[arg-type]
    return BatchDistance(batch, distance, **settings)


@pytest.mark.parametrize("kind", ["mean", "kernel"])
@pytest.mark.parametrize(("sampler", "terms"), [("ddim", 1), ("ddpm", 3)])
def test_gradients_are_those_of_finite_differences_however_memory_is_cut(kind, sampler, terms) -> None:
    omega, h = 0.3 * normal(5, 2, 3, seed=2), 1e-5
    whole = network_batch(kind, sampler, terms, checkpointed=False)
    value, gradient = value_and_gradient(whole, omega)
    for at_once in (1, 2, 5, None):
        cut = network_batch(kind, sampler, terms, at_once=at_once)
        a, b = value_and_gradient(cut, omega)
        assert torch.allclose(a, value, rtol=1e-12)
        assert torch.allclose(b, gradient, rtol=1e-8, atol=1e-13)
    for seed in range(3):
        way = normal(5, 2, 3, seed=10 + seed)
        slope = (evaluate(whole, omega + h * way) - evaluate(whole, omega - h * way)) / (2 * h)
        assert slope.tolist() == pytest.approx([float((gradient * way).sum())] * 5, rel=1e-5)


def test_a_cut_batch_keeps_the_graph_of_nothing_but_the_pushes() -> None:
    def kept(at_once: int | None) -> int:
        objective, sizes = network_batch("mean", at_once=at_once, checkpointed=False), []
        omega = (0.1 * normal(5, 2, 3, seed=2)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            objective(omega, 0)
        return sum(sizes)

    assert kept(1) < 0.05 * kept(None)


@pytest.mark.parametrize("attack", [PGD(5, restarts=2, momentum=0.9), APGD(8), RandomSearch(3)])
def test_the_best_iterate_is_kept_of_all_images_together(attack) -> None:
    objective = network_batch("kernel")
    found = attack(objective, LpBall("linf", 0.2), objective.like, image_generators(0, range(5)))
    assert (found.value == found.value[0]).all()
    assert evaluate(objective, found.omega).tolist() == pytest.approx(found.value.tolist(), rel=1e-9)
    assert LpBall("linf", 0.2).excess(found.omega) <= 1 + 1e-9
    cut = network_batch("kernel", at_once=2)
    again = attack(cut, LpBall("linf", 0.2), cut.like, image_generators(0, range(5)))
    assert torch.allclose(again.omega, found.omega, atol=1e-9)


def test_the_flags_about_gradients_know_that_images_move_together() -> None:
    def flags(objective: AttackGoal) -> dict[str, bool]:
        found = check_gradient(objective, LpBall("linf", 0.1), objective.like, seeded())  # type: ignore[attr-defined]
        return {flag.name: flag.raised for flag in found}

    assert not any(flags(network_batch("mean")).values())
    rounded = network_batch("mean")
    distance = FeatureDistance(lambda x: x + (x.detach() / 0.3).round() - x.detach(), normal(9, 3))
    assert flags(BatchDistance(rounded.batch, distance))["gradient-mismatch"]


def test_distances_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="not one of mean, kernel"):
        FeatureDistance(pixels, normal(3, 2), "median")  # type: ignore[arg-type]
    for wrong in (normal(3), normal(1, 2)):
        with pytest.raises(ValueError, match="m >= 2"):
            FeatureDistance(pixels, wrong)


# -- extractors ----------------------------------------------------------------------------------------


class Features(nn.Module):
    """A TorchScript extractor: ``floats`` says what it does with images that are not 8-bit."""

    def __init__(self, floats: str) -> None:
        super().__init__()
        self.convolution, self.floats = nn.Conv2d(3, 4, 3), floats

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if self.floats == "rounded":
            x = x.round()
        if images.dtype == torch.uint8 or self.floats != "0 to 1":
            x = x / 255
        return self.convolution(x).tanh().mean((2, 3))


def script(folder: Path, floats: str) -> str:
    torch.manual_seed(0)
    path = folder / f"{floats.replace(' ', '-')}.pt"
    torch.jit.save(torch.jit.script(Features(floats)), path)
    return str(path)


PROBE = (255 * torch.rand(4, 1, 8, 8, generator=seeded())).to(torch.uint8)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("floats", ["0 to 1", "0 to 255", "pixels"])
def test_extractors_are_followed_in_the_scale_that_they_take(floats: str, tmp_path: Path) -> None:
    extractor = open_extractor("pixels" if floats == "pixels" else script(tmp_path, floats))
    features = differentiable(extractor, PROBE)
    images = (PROBE.float() / 127.5 - 1).requires_grad_()
    assert torch.allclose(features(images), extractor.model(PROBE), atol=1e-5)
    way, h = torch.randn(4, 1, 8, 8, generator=seeded(1)), 1e-2
    (slope,) = torch.autograd.grad(features(images).sum(), images)
    with torch.no_grad():
        difference = (features(images + h * way) - features(images - h * way)).double().sum() / (2 * h)
    assert float(difference) == pytest.approx(float((slope * way).sum()), rel=5e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_extractors_without_gradients_are_refused_in_one_line(tmp_path: Path) -> None:
    blind = Extractor("blind", "torchscript", None, lambda x: x.float().detach().flatten(1), "none", {})
    picky = Extractor("picky", "torchscript", None, lambda x: (x >> 1).float().flatten(1), "none", {})
    for extractor in (open_extractor(script(tmp_path, "rounded")), blind, picky):
        with pytest.raises(UsageError, match=f"`extractor` {extractor.name} is not differentiable"):
            differentiable(extractor, PROBE)


# -- the command ---------------------------------------------------------------------------------------

TOGETHER = ("--objective", "batch-mean", "--reference", "digits", "--cache", "none")


@pytest.fixture(scope="module")
def together(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("together") / "evaluation"
    assert main.main(command(pipeline, output, *TOGETHER)) == 0
    return output


def test_the_command_pushes_the_batch_away_and_says_from_what(together: Path) -> None:
    body = result(together)
    clean, attacked = (
        value(body, f"distance of the batch from the reference, {which}") for which in ("undisturbed", "attacked")
    )
    files = [np.load(next(together.glob(f"*-{name}.npy"))) / 127.5 - 1 for name in ("undisturbed", "attacked")]
    from sklearn.datasets import load_digits

    real = (load_digits().images / 16 * 255).round() / 127.5 - 1
    own = [float(np.linalg.norm(images.mean(0) - real.mean(0))) for images in files]
    assert [clean, attacked] == pytest.approx(own, rel=2e-3)  # the files are rounded to 8 bit
    assert attacked > 1.01 * clean
    wrong = {flag["name"] for flag in body["details"]["flags"] if flag["invalid"]}
    assert wrong <= {"steps-not-monotone", "random-beats-attack", "radius-not-monotone"}
    assert raised(body) <= {*INFORMATIVE, *wrong}
    assert body["protocol"]["attack"]["objective"] == "batch-mean"
    assert body["protocol"]["attack"]["away_from"]["extractor"] == "pixels"
    assert "displacement, attack on few (first 2)" in body["values"]


@pytest.mark.slow
def test_how_memory_is_cut_changes_nothing_beyond_rounding(together: Path, pipeline: Path, tmp_path: Path) -> None:
    assert main.main(command(pipeline, tmp_path / "out", *TOGETHER, "--batch-size", "1")) == 0
    found, whole = result(tmp_path / "out"), result(together)
    assert found["details"]["per_image"] == pytest.approx(whole["details"]["per_image"], rel=1e-3)
    name = "distance of the batch from the reference, attacked"
    assert value(found, name) == pytest.approx(value(whole, name), rel=1e-4)


@pytest.mark.slow
def test_stopped_it_goes_on_and_ends_as_a_whole_one(together: Path, pipeline, tmp_path, monkeypatch) -> None:
    saves = stop_at(monkeypatch, lambda saves: signal.SIGINT if len(saves) == 4 else None)
    assert main.main(command(pipeline, tmp_path / "out", *TOGETHER)) == 130
    assert not list((tmp_path / "out").glob("attack-*.json"))
    assert main.main(command(pipeline, tmp_path / "out", *TOGETHER)) == 0
    assert len(saves) == len(set(saves))
    for part in ("values", "details", "warnings", "protocol"):
        assert result(tmp_path / "out")[part] == result(together)[part]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--objective", "batch-kernel", "--optimiser", "random", "--norm", "l2"),
        ("--objective", "batch-kernel", "--scheduler", "ddpm", "--noise", "fresh", "--eot", "2", "--verdicts", "2"),
        ("--objective", "batch-mean", "--optimiser", "apgd", "--sweep-n", "3", "--at", "1"),
    ],
    ids=" ".join,
)
def test_every_optimiser_and_sampler_does_it(more, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", {"data": "digits", "split": None})
    assert main.main(command(run, tmp_path / "out", *more, "--cache", "none")) == 0
    body = result(tmp_path / "out")
    assert value(body, "displacement") > 0
    wrong = {flag["name"] for flag in body["details"]["flags"] if flag["invalid"]}
    assert wrong <= {"steps-not-monotone", "random-beats-attack", "radius-not-monotone"}
    assert ("displacement, attack on few (first 2)" in body["values"]) is ("--sweep-n" not in more)
    assert json.dumps(body["protocol"]["attack"]["away_from"])


def test_without_real_images_gradients_or_room_it_is_one_line(pipeline, tmp_path, capsys, monkeypatch) -> None:
    blind = Extractor("blind", "torchscript", None, lambda x: x.float().detach().flatten(1), "none", {})
    monkeypatch.setattr("robustdiff.attacks.benchmark.quality.open_extractor", lambda *_: blind)
    for more, words in (
        (("--objective", "batch-mean"), "--objective batch-mean: the run does not say what it was trained on"),
        (("--objective", "batch-mean", "--reference", "none"), "--objective batch-mean needs real images"),
        (TOGETHER, "--extractor blind is not differentiable"),
        (TOGETHER, "holds the pushes of all 3 images at once, 0.0 GiB, and 0.0 GiB are free: lower -n"),
    ):
        if "0.0 GiB" in words:
            monkeypatch.setattr(run, "free_memory", lambda: 100)
        assert main.main(command(pipeline, tmp_path / "out", *more)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
