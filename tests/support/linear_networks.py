"""Networks whose samplers have closed forms, and small random ones that have none."""

from __future__ import annotations

import types
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from experiments.paper import linear
from experiments.paper.point_denoiser import PointDenoiser
from helpers import normal
from robustdiff.attacks.goals import FinalImageShift
from robustdiff.diffusion.samplers import DifferentiableSampler
from robustdiff.diffusion.schedule import NoiseSchedule

VARIANCES = torch.tensor([1.5, 0.4, 0.1, 0.02, 0.003], dtype=torch.float64)
PROCESS = NoiseSchedule.from_scheduler(DDPMScheduler())


class Linear(nn.Module):
    """The exact network of a diagonal Gaussian, in any parametrisation, with a strength m of the regulariser (T3)."""

    def __init__(self, schedule: NoiseSchedule = PROCESS, m: float = 0.0) -> None:
        super().__init__()
        self.schedule = schedule
        table = linear.optimum(schedule.alphas_cumprod.double(), VARIANCES, m)
        self.weight = nn.Parameter(table)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        eps = self.weight[t.long()] * x_t
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return self.schedule.output_from_x0((x_t - sigma * eps) / alpha, x_t, t)


def linear_trajectory(steps: int = 20, prediction: str = "epsilon", m: float = 0.0, sampler: str = "ddim"):
    schedule = NoiseSchedule(PROCESS.alphas_cumprod, prediction)  # type: ignore[arg-type]
    return DifferentiableSampler.of(Linear(schedule, m), schedule, sampler, steps)  # type: ignore[arg-type]


def points(n: int = 3, seed: int = 0) -> Tensor:
    return normal(n, len(VARIANCES), seed=seed).double()


class GaussianNetwork(nn.Module):
    """The exact network for N(0, variance) pixels, in float64."""

    def __init__(self, schedule: NoiseSchedule, variance: float) -> None:
        super().__init__()
        self.schedule, self.scale = schedule, nn.Parameter(torch.tensor(variance, dtype=torch.float64))
        self.config = {"num_class_embeds": None, "sample_size": 8, "in_channels": 1}
        self.device, self.dtype = torch.device("cpu"), torch.float64

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a, s = self.schedule.alpha(t).double(), self.schedule.sigma(t).double()
        return s / (a**2 * self.scale + s**2) * x_t


def gaussian(variance: float = 0.01) -> types.SimpleNamespace:
    scheduler = DDPMScheduler(clip_sample=False)
    return types.SimpleNamespace(
        unet=GaussianNetwork(NoiseSchedule.from_scheduler(scheduler), variance), scheduler=scheduler
    )


def random_network(seed: int = 0, dimension: int = 3) -> PointDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = PointDenoiser(dimension, 32, 2)
        nn.init.normal_(model.last.weight, std=0.3)
    return model


def network_objective(steps: int = 10, attacked: Sequence[int] = (0, 5), n: int = 6, **settings) -> FinalImageShift:
    trajectory = DifferentiableSampler.of(random_network().double(), PROCESS, "ddim", steps)
    return FinalImageShift(trajectory, normal(n, 3, seed=1).double(), attacked, **settings)
