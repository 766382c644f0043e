"""A sampler as a differentiable function of its start and of what is done to its states.

``pipeline.py`` draws images with diffusers' own schedulers; here the same steps (DDIM and DDPM) are written out as
numbers, so that gradients flow through all of them in bounded memory, and the noise of every step is an argument. The
tests hold both equal, and ``robustdiff attack`` replays what it finds in the stock sampler.

Torch only: it works on any ``callable(x_t, t)`` with a :class:`~robustdiff.diffusion.schedule.NoiseSchedule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustdiff.diffusion.clipping import clip_output
from robustdiff.diffusion.model import Model, call_model, module_of
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.utils.errors import check_choice
from robustdiff.utils.random import Generators, draw_normal

Sampler = Literal["ddim", "ddpm"]


@dataclass(frozen=True)
class StepCoefficients:
    """One sampler step: ``x' = x0 * x0_hat + eps * eps_hat + x * x_t + noise * z``, with z standard normal.

    Attributes:
        t: Timestep of the network call.
        x0: Weight of the denoised image.
        eps: Weight of the predicted noise (DDIM; 0 for DDPM).
        x: Weight of the state (DDPM; 0 for DDIM).
        noise: Standard deviation of the fresh noise; 0 without.
    """

    t: int
    x0: float
    eps: float
    x: float
    noise: float


def ddim_step(schedule: NoiseSchedule, t: int, previous: int, final_alpha_bar: float = 1.0) -> StepCoefficients:
    """The deterministic step from ``t`` to ``previous`` (below 0: to the image itself).

    Source: Song et al. (2021, DDIM), Eq. 12 with eta = 0; diffusers' ``DDIMScheduler``.
    """
    after = float(schedule.alphas_cumprod[previous]) if previous >= 0 else final_alpha_bar
    return StepCoefficients(t, after**0.5, (1 - after) ** 0.5, 0.0, 0.0)


def ddpm_step(schedule: NoiseSchedule, t: int, previous: int, large_variance: bool = False) -> StepCoefficients:
    """The ancestral step from ``t`` to ``previous``, for any stride.

    Args:
        schedule: Noise schedule.
        t: Timestep, in [0, T).
        previous: Where it leads, below ``t``; below 0: to the image itself.
        large_variance: beta_t for the variance (diffusers' ``fixed_large``) instead of the posterior's
            (``fixed_small``).

    Source: Ho et al. (2020), Eq. 7; diffusers' ``DDPMScheduler``.
    """
    here = float(schedule.alphas_cumprod[t])
    after = float(schedule.alphas_cumprod[previous]) if previous >= 0 else 1.0
    alpha = here / after
    variance = (1 - alpha) if large_variance else max((1 - after) / (1 - here) * (1 - alpha), 1e-20)
    x0, x = after**0.5 * (1 - alpha) / (1 - here), alpha**0.5 * (1 - after) / (1 - here)
    return StepCoefficients(t, x0, 0.0, x, variance**0.5 if t > 0 else 0.0)


def trailing(levels: int, steps: int) -> list[int]:
    """The timesteps of ``steps`` steps down from ``levels - 1``, trailing spacing, as diffusers rounds them."""
    return [round(levels * (1 - i / steps)) - 1 for i in range(steps)]


@contextmanager
def frozen(models: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode, and no gradients for weights, until left; then every flag is as it was.

    Graphs made inside must be used up inside: what is recomputed during a backward pass must see the same flags.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for model in models:
            model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True, eq=False)
class DifferentiableSampler:
    """A sampler, from its start to the image, in which every state can be pushed.

    Args:
        model: ``callable(x_t, t, **kwargs)``, returning a tensor or an object with ``.sample``.
        schedule: Its noise schedule.
        steps: What each step does, the noisiest first.
        clip: Bound on the denoised image within each step (diffusers' ``clip_sample_range``), or None; the noise is
            the one that goes with it (:func:`~robustdiff.diffusion.clipping.clip_output`).
        clamp: Whether the image at the end is held in [-1, 1], as ``robustdiff.sample`` does.
        kwargs: Passed to every call of the model; rows must fit the batch.
    """

    model: Model
    schedule: NoiseSchedule
    steps: Sequence[StepCoefficients]
    clip: float | None = None
    clamp: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        schedule: NoiseSchedule,
        sampler: Sampler = "ddim",
        timesteps: Sequence[int] | int = 50,
        *,
        final_alpha_bar: float = 1.0,
        large_variance: bool = False,
        **settings: Any,  # noqa: ANN401 - the other fields
    ) -> DifferentiableSampler:
        """A sampler by name.

        Args:
            model: As above.
            schedule: As above.
            sampler: ``"ddim"`` (deterministic) or ``"ddpm"`` (ancestral).
            timesteps: Falling timesteps in [0, T), or how many, trailing.
            final_alpha_bar: What DDIM's last step arrives at; 1 unless a scheduler says otherwise.
            large_variance: See :func:`ddpm_step`.
            settings: ``clip``, ``clamp``, ``kwargs``.

        Raises:
            ValueError: If the sampler is unknown or the timesteps do not fit.
        """
        check_choice("sampler", sampler, get_args(Sampler))
        levels = schedule.num_timesteps
        if isinstance(timesteps, int):
            if not 1 <= timesteps <= levels:
                raise ValueError(f"the number of steps, {timesteps}, must be in 1 .. {levels}")
            timesteps = trailing(levels, timesteps)
        times = [*timesteps, -1]
        if len(times) < 2 or any(a <= b for a, b in pairwise(times)) or times[0] >= levels:
            raise ValueError(f"timesteps must fall from below {levels} to at least 0, got {list(timesteps)}")
        pairs = list(pairwise(times))
        if sampler == "ddim":
            steps = [ddim_step(schedule, t, previous, final_alpha_bar) for t, previous in pairs]
        else:
            steps = [ddpm_step(schedule, t, previous, large_variance) for t, previous in pairs]
        return cls(model, schedule, steps, **settings)

    @property
    def stochastic(self) -> bool:
        """Whether some step adds noise."""
        return any(step.noise for step in self.steps)

    @property
    def modules(self) -> list[nn.Module]:
        """The network, if it is a module or wraps one."""
        module = module_of(self.model)
        return [] if module is None else [module]

    def part(self, rows: slice) -> DifferentiableSampler:
        """The same sampler for some images of the batch."""
        kwargs = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return dataclasses.replace(self, kwargs=kwargs)

    def sigmas(self, attacked: Sequence[int], like: Tensor) -> Tensor:
        """Noise scales s_k of the sampler steps ``attacked``, shape (K,), dtype and device of ``like``."""
        t = torch.tensor([self.steps[k].t for k in attacked], device=like.device)
        return self.schedule.sigma(t).to(like.dtype)

    def draw_noise(self, like: Tensor, generator: Generators = None, first: int = 0) -> list[Tensor | None]:
        """The noise of every step from ``first`` on, in the order in which stock pipelines draw it.

        Args:
            like: A state, shape (B, ...).
            generator: One, or one per image.
            first: Sampler step from which on.

        Returns:
            One tensor per step of the whole sampler; None before ``first`` and where nothing is drawn.
        """
        wanted = [k >= first and bool(step.noise) for k, step in enumerate(self.steps)]
        return [draw_normal(like, generator) if draw else None for draw in wanted]

    def graph_bytes(self, x: Tensor, k: int = 0) -> int:
        """Bytes that step ``k`` keeps for its backward pass where it is not checkpointed, weights left out.

        Args:
            x: A state, shape (B, ...); what is kept grows with B.
            k: The step.
        """
        held: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for model in self.modules for p in model.parameters()}

        def keep(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return saved

        t = torch.tensor(self.steps[k].t, device=x.device)
        with frozen(self.modules), torch.enable_grad():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                after = self._step(x.detach().requires_grad_(), k, t)  # alive, so that no address is used twice
            del after
        return sum(size for address, size in held.items() if address not in weights)

    def run(
        self,
        x: Tensor,
        omega: Tensor | None = None,
        attacked: Sequence[int] = (),
        *,
        first: int = 0,
        last: int | None = None,
        noise: Sequence[Tensor | None] = (),
        checkpointed: bool = False,
    ) -> Tensor:
        """The state after the sampler's steps ``first`` .. ``last - 1``.

        Before step k in ``attacked`` the state becomes ``x_t + s_k omega_k``, as by a step callback.

        Args:
            x: The state before step ``first``, shape (B, ...).
            omega: Perturbations in units of the noise scale, shape (B, K, ...).
            attacked: The K sampler steps they belong to, within ``first`` .. ``last - 1``.
            first: First step.
            last: Step before which to stop; default: none, the result is the image.
            noise: As :meth:`draw_noise` gives it; may be empty for deterministic samplers.
            checkpointed: Keep one state per step for the backward pass, and compute the network again there
                (Chen et al. 2016): the memory of one network call instead of all, a third more time or up to two.

        Raises:
            ValueError: If noise is missing, or a step is attacked that is not run.
        """
        last = len(self.steps) if last is None else last
        place = {step: i for i, step in enumerate(attacked)}
        outside = [step for step in attacked if not first <= step < last]
        if outside or len(place) < len(attacked):
            raise ValueError(f"attacked steps {list(attacked)} are not each once in {first} .. {last - 1}")
        sigmas = self.sigmas(attacked, x) if attacked else None
        times = torch.tensor([step.t for step in self.steps], device=x.device)
        for k in range(first, last):
            if k in place and omega is not None and sigmas is not None:
                x = x + sigmas[place[k]] * omega[:, place[k]]
            one = partial(self._step, k=k, t=times[k])
            x = checkpoint(one, x, use_reentrant=False) if checkpointed else one(x)
            if scale := self.steps[k].noise:
                z = noise[k] if k < len(noise) else None
                if z is None:
                    raise ValueError(f"step {k} of this sampler draws noise, and none was given")
                x = x + scale * z
        return x.clamp(-1, 1) if self.clamp and last == len(self.steps) else x

    def _step(self, x: Tensor, k: int, t: Tensor) -> Tensor:
        """One step without its fresh noise."""
        step = self.steps[k]
        output = call_model(self.model, x, t, dict(self.kwargs))
        if self.clip is not None:
            output = clip_output(self.schedule, output, x, t, self.clip)
        moved = step.x0 * self.schedule.x0_hat(output, x, t)
        if step.eps:
            moved = moved + step.eps * self.schedule.eps_hat(output, x, t)
        return moved + step.x * x if step.x else moved
