"""What several test files share: seeded draws, small networks, perturbations under the test's control."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.perturbation import Respond
from robustdiff.utils.random import Generators

PREDICTIONS: tuple[str, ...] = ("epsilon", "sample", "v_prediction")


TINY_UNET = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
"""A UNet2DModel configuration that trains in milliseconds; size and channels come from the data."""


def experiment(name: str) -> ModuleType:
    """A file of ``experiments/`` as a module."""
    return importlib.import_module(f"experiments.{name}")


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator with a stated seed."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded standard normal numbers."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def ddpm_schedule(
    prediction: str = "epsilon", zero_snr: bool = False, dtype: torch.dtype = torch.float64
) -> NoiseSchedule:
    """The process of diffusers' default DDPM scheduler, with its table in ``dtype``."""
    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    return NoiseSchedule(scheduler.alphas_cumprod.to(dtype), prediction)


def schedule_at(levels: Tensor, prediction: str = "epsilon") -> NoiseSchedule:
    """A process whose noise levels sigma/alpha are ``levels``, ascending, shape (T,)."""
    return NoiseSchedule(1 / (1 + levels.double().square()), prediction)


def seed_parameters(module: nn.Module, seed: int = 0) -> None:
    """Redraw all parameters from a seed, without touching torch's global stream."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


class SmallNet(nn.Module):
    """A small convolutional network that depends on the timestep; batch norm and dropout on request."""

    def __init__(
        self,
        channels: int = 2,
        width: int = 6,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            self.first = nn.Conv2d(channels, width, 3, padding=1)
            self.time = nn.Linear(1, width)
            self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
            self.dropout = nn.Dropout(dropout)
            self.last = nn.Conv2d(width, channels, 3, padding=1)
        seed_parameters(self, seed)
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H, W)."""
        time = self.time(t.to(x.dtype).reshape(-1, 1) / 1000)[:, :, None, None]
        hidden = nn.functional.silu(self.norm(self.first(x) + time))
        return self.last(self.dropout(hidden))


class Calls(nn.Module):
    """Wraps a model and keeps the inputs of every forward pass in ``seen``."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        """Record and pass on."""
        self.seen.append((x.detach().clone(), t.clone(), kwargs))
        return self.model(x, t, **kwargs)


class Given:
    """A perturbation that returns the omega it was given, or one computed from the rows asked for."""

    def __init__(self, omega: Tensor | Callable[[Tensor], Tensor]) -> None:
        self.omega = omega

    def __call__(self, respond: Respond, radius: Tensor, like: Tensor, generator: Generators = None) -> Tensor:
        """The given omega; ``respond`` is not called."""
        return self.omega(like) if callable(self.omega) else self.omega


class Spy:
    """A perturbation that runs another one and keeps what went in and what came out."""

    def __init__(self, inner: Callable[..., Tensor]) -> None:
        self.inner = inner
        self.omega = torch.empty(0)
        self.radius = torch.empty(0)
        self.respond: Respond | None = None

    def __call__(self, respond: Respond, radius: Tensor, like: Tensor, generator: Generators = None) -> Tensor:
        """Run the wrapped perturbation."""
        self.omega, self.radius, self.respond = self.inner(respond, radius, like, generator), radius, respond
        return self.omega


def assert_same_but_rounding(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """The weights of two runs that differ in the order of their sums, by name.

    Softmax does not see the bias of an attention's keys: its gradient is rounding alone, which Adam makes steps of.
    """
    assert first.keys() == second.keys()
    for name, value in first.items():
        atol = 1e-3 if name.endswith("to_k.bias") else 2e-6
        torch.testing.assert_close(
            second[name], value, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    """The gradient of ``loss`` for every parameter, leaving ``.grad`` alone."""
    return list(torch.autograd.grad(loss, list(module.parameters())))


def uncorrelated(rows: int, *sizes: int, seed: int = 0) -> list[Tensor]:
    """Samples, shapes (rows, size), whose means are 0 and whose joint second moment is the identity, exactly.

    A loss that is quadratic in them then has its expectation as its sample mean: no sampling error in the test.
    """
    draw = normal(rows, sum(sizes), seed=seed)
    basis = torch.linalg.qr(draw - draw.mean(0)).Q * rows**0.5
    return list(basis.split(list(sizes), dim=1))
