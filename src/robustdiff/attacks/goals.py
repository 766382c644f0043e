"""What an attack makes large (objectives), and where it must stay (balls).

A perturbation ``omega`` has shape (B, K, ...): per image, one push for each of K attacked sampler steps, in units of
the noise scale, so that the state before step k moves by ``s_k omega_k``
(:class:`~robustdiff.diffusion.samplers.DifferentiableSampler`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from robustdiff.diffusion.model import call_model
from robustdiff.diffusion.samplers import DifferentiableSampler

# -- constraints -------------------------------------------------------------------------------------


# -- objectives --------------------------------------------------------------------------------------


class AttackGoal(Protocol):
    """What an attack makes large: a mean of terms, so that memory is that of one term."""

    @property
    def terms(self) -> int:
        """Number of terms, such as draws of the sampler's noise."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Networks whose weights need no gradients meanwhile."""
        ...

    @property
    def joint(self) -> bool:
        """Whether the value is the batch's as a whole, the same for every image."""
        ...

    def __call__(self, omega: Tensor, term: int) -> Tensor:
        """One value per image, shape (B,), for ``omega``, shape (B, K, ...)."""
        ...


@dataclass(frozen=True, eq=False)
class CallableGoal:
    """Any function of omega as an objective: a classifier's loss, a whole chain of purification and classifier.

    Args:
        function: Maps omega (B, K, ...) to one value per image, (B,); asked ``terms`` times, with new randomness if it
            has any of its own (expectation over transformations, Athalye et al. 2018).
        terms: See there.
        modules: See :class:`AttackGoal`.
    """

    function: Callable[[Tensor], Tensor]
    terms: int = 1
    modules: Sequence[nn.Module] = ()
    joint: ClassVar[bool] = False

    def __call__(self, omega: Tensor, term: int) -> Tensor:
        """The function's value."""
        return self.function(omega)


@dataclass(frozen=True, eq=False)
class FinalImageShift:
    """End to end: squared distance of the final image from where it would have been, through all remaining steps.

    Args:
        trajectory: The sampler.
        x: The state before step ``attacked[0]``, shape (B, ...); the steps before it are not run.
        attacked: Sampler steps, rising.
        noise: For stochastic samplers: maps a term to the noise of every step
            (:meth:`DifferentiableSampler.draw_noise`). The same noise for the same term: fixed seeds. New noise every
            time: fresh ones. The undisturbed image is computed with the same noise.
        terms: Draws of the noise that are averaged.
        target: If given, shape (B, ...): come near it instead; the value is minus the squared distance to it.
        fresh: Whether ``noise`` is new every time, so that undisturbed images cannot be kept.
        checkpointed: Bounded memory: one state per sampler step and one network call; a third more time or up
            to two.

    The gradient is exactly 0 at omega = 0 (unless there is a target): start elsewhere.
    """

    trajectory: DifferentiableSampler
    x: Tensor
    attacked: Sequence[int]
    noise: Callable[[int], Sequence[Tensor | None]] = lambda term: ()
    terms: int = 1
    target: Tensor | None = None
    fresh: bool = False
    checkpointed: bool = True
    joint: ClassVar[bool] = False
    _clean: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The network."""
        return self.trajectory.modules

    @property
    def like(self) -> Tensor:
        """A tensor of the shape of omega, (B, K, ...)."""
        return _like(self.x, len(self.attacked))

    def part(self, rows: slice) -> FinalImageShift:
        """Some images of the batch; noise is to be given to :meth:`images`."""
        target = None if self.target is None else self.target[rows]
        return dataclasses.replace(self, trajectory=self.trajectory.part(rows), x=self.x[rows], target=target)

    def images(self, omega: Tensor | None, noise: Sequence[Tensor | None]) -> Tensor:
        """The final images, shape (B, ...), with a perturbation or without."""
        attacked = self.attacked if omega is not None else ()
        checkpointed = self.checkpointed and torch.is_grad_enabled()
        start = self.attacked[0]
        return self.trajectory.run(self.x, omega, attacked, first=start, noise=noise, checkpointed=checkpointed)

    def clean(self, term: int, noise: Sequence[Tensor | None]) -> Tensor:
        """The undisturbed images under this noise."""
        found = None if self.fresh else self._clean.get(term)
        if found is None:
            with torch.no_grad():
                found = self.images(None, noise)
            if not self.fresh:
                self._clean[term] = found
        return found

    def __call__(self, omega: Tensor, term: int) -> Tensor:
        """Sum over the image's elements of the squared difference."""
        noise = self.noise(term)
        target = self.clean(term, noise) if self.target is None else self.target
        square = (self.images(omega, noise) - target).square().flatten(1).sum(1)
        return square if self.target is None else -square


@dataclass(frozen=True, eq=False)
class NoisePredictionShift:
    """What training attacks: how far the network's answer moves at each attacked step by itself.

    Args:
        trajectory: The sampler.
        states: The undisturbed state before each attacked step, K tensors of shape (B, ...).
        attacked: Sampler steps, K of them.
        inner: ``"shift"`` ``||eps_hat(x') - eps_hat(x)||^2``, or ``"residual"``, the equivariance residual.

    Each step is one term, and depends on its own omega_k only; the sampler is not run.
    """

    trajectory: DifferentiableSampler
    states: Sequence[Tensor]
    attacked: Sequence[int]
    inner: Literal["shift", "residual"] = "shift"
    joint: ClassVar[bool] = False
    _clean: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.inner not in ("shift", "residual"):
            raise ValueError(f"one-step objective {self.inner!r} is not one of shift, residual")
        if len(self.states) != len(self.attacked):
            raise ValueError(f"got {len(self.states)} states for {len(self.attacked)} attacked steps")

    @property
    def terms(self) -> int:
        """K."""
        return len(self.attacked)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The network."""
        return self.trajectory.modules

    @property
    def like(self) -> Tensor:
        """A tensor of the shape of omega, (B, K, ...)."""
        return _like(self.states[0], len(self.attacked))

    def __call__(self, omega: Tensor, term: int) -> Tensor:
        """Sum over the image's elements of the squared shift or residual of one step."""
        x, schedule = self.states[term], self.trajectory.schedule
        t = torch.tensor(self.trajectory.steps[self.attacked[term]].t, device=x.device)
        kwargs = dict(self.trajectory.kwargs)
        if term not in self._clean:
            with torch.no_grad():
                self._clean[term] = call_model(self.trajectory.model, x, t, kwargs)
        push = omega[:, term]
        shift = call_model(self.trajectory.model, schedule.perturb(x, push, t), t, kwargs) - self._clean[term]
        moved = schedule.eps_shift if self.inner == "shift" else schedule.equivariance_residual
        return moved(shift, push, t).square().flatten(1).sum(1)


def _like(x: Tensor, count: int) -> Tensor:
    return x.detach().unsqueeze(1).expand(x.shape[0], count, *x.shape[1:])


class NoGradient(ValueError):
    """The objective does not depend on omega in a way that gives gradients."""


def evaluate(objective: AttackGoal, omega: Tensor) -> Tensor:
    """The mean over the terms, shape (B,), without gradients."""
    with torch.no_grad():
        return torch.stack([objective(omega, term) for term in range(objective.terms)]).mean(0)


def value_and_gradient(objective: AttackGoal, omega: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the terms, (B,), and the gradient of every image's with respect to its own omega, (B, K, ...).

    Of a joint objective the gradient is that of its one value.
    One term's graph is alive at a time; no weight receives a gradient.

    Raises:
        NoGradient: If the model gives none.
    """
    value, gradient = None, None
    for term in range(objective.terms):
        with torch.enable_grad():
            leaf = omega.detach().requires_grad_()
            one = objective(leaf, term)
            if not one.requires_grad:
                raise NoGradient("the model gives no gradients (it detaches its input, or runs without autograd)")
            (slope,) = torch.autograd.grad(one.mean() if objective.joint else one.sum(), leaf)
        value = one.detach() if value is None else value + one.detach()
        gradient = slope if gradient is None else gradient + slope
    if value is None or gradient is None:
        raise ValueError("an objective needs at least one term")
    return value / objective.terms, gradient / objective.terms
