"""The equivariance loss: the denoising loss, and a regulariser that keeps the denoised image where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from robustdiff.diffusion.model import Model, call_model, kept_buffers, kept_random_stream, select_rows
from robustdiff.diffusion.schedule import Schedule
from robustdiff.losses.ambient import NoisyBatch
from robustdiff.losses.denoising import DenoisingLoss, LossOutput
from robustdiff.losses.perturbation import (
    AdversarialPerturbation,
    Perturbation,
    Radius,
    RandomPerturbation,
    Response,
    named_perturbation,
)
from robustdiff.losses.strength import InverseRadius, SigmaRange, Strength, check_takes_two
from robustdiff.utils.errors import check_choice
from robustdiff.utils.random import Generators
from robustdiff.utils.tensors import to_device


@dataclass(frozen=True)
class EquivarianceLoss(DenoisingLoss):
    """The denoising loss plus the equivariance regulariser.

    With ``x_t' = x_t + s omega`` and the network's prediction of the noise::

        L = ||eps_hat(x_t) - eps||^2 + lambda ||eps_hat(x_t') - (eps_hat(x_t) + omega)||^2        (epsilon-prediction)

    The second term equals ``SNR ||x0_hat(x_t') - x0_hat(x_t)||^2``: the denoised image must not move. That is its
    definition for every prediction; its weight is the one the denoising loss gives to an error of x0_hat
    (``Prediction.x0_weight``), so that a ``strength`` means the same for all.

    Args:
        schedule: The noise schedule, which also says what the model predicts.
        perturbation: ``"none"``, ``"random"``, ``"adversarial"``, or a :class:`Perturbation` object.
        strength: lambda >= 0: a number, or a function of sigma/alpha and the bound on omega, both of shape (B,), such
            as :class:`SigmaRange` or :class:`InverseRadius`. Images of a noise level where it is 0 take no second pass.
        radius: Bound on omega per noise level: a :class:`Radius` or ``callable(sigma, generator)``.
        normalise: Divide both terms of a noise level by ``1 + lambda E[omega^2]``, the mean over the draws at that
            level. Every level keeps its minimiser; no level rules the others by its weight, which in units of the state
            grows as 1 / sigma^2, over four decades. Needs a :class:`Radius`. Default: where the radius is in units of
            the state.
        gradient: Which branch of the regulariser trains the network: ``"both"``, ``"perturbed"`` (the clean branch is
            a fixed target) or ``"clean"`` (for study: in the linear case this one does nothing).
        target: ``"output"``: be equivariant with the network's own output; ``"noise"``: hit the true ``eps + omega``.

    Differences from the paper: which branch carries gradients, and the exact radius, are not stated there; the
    normalisation is ours.

    Raises:
        ValueError: If a setting is out of range.

    Source: Briglia et al. (2025), arXiv 2505.21742.
    """

    perturbation: str | Perturbation | None = "adversarial"
    strength: float | Strength = 0.3
    radius: Radius | Callable[[Tensor, Generators], Tensor] = field(default_factory=Radius)
    gradient: Literal["both", "perturbed", "clean"] = "both"
    target: Literal["output", "noise"] = "output"
    normalise: bool | None = None

    def __post_init__(self) -> None:
        """Check the settings and resolve a perturbation given by name."""
        if isinstance(self.perturbation, str):
            object.__setattr__(self, "perturbation", named_perturbation(self.perturbation))
        if callable(self.strength):
            check_takes_two("strength", self.strength, "the noise levels sigma/alpha and the radius")
        elif not isinstance(self.strength, int | float) or not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be a finite number >= 0, or a function, got {self.strength!r:.80}")
        if not callable(self.radius):
            raise ValueError(
                f"radius must be a Radius or a function, got {self.radius}: "
                f"Radius(exponent=0, scale=..., floor=0, random=False) is constant"
            )
        if not isinstance(self.radius, Radius):
            check_takes_two("radius", self.radius, "the noise scales sigma, and a generator")
        check_choice("gradient", self.gradient, ("both", "perturbed", "clean"))
        check_choice("target", self.target, ("output", "noise"))
        if self.normalise is None:
            object.__setattr__(self, "normalise", isinstance(self.radius, Radius) and self.radius.units == "state")
        if self.normalise and not isinstance(self.radius, Radius):
            raise ValueError("normalise needs a Radius, whose mean square is known: give one, or normalise=False")
        if self.target == "noise" and self.gradient == "clean":
            raise ValueError("target='noise' has no clean branch: use gradient='both' or 'perturbed'")

    @classmethod
    def preset(cls, name: str, schedule: Schedule, **changes: Any) -> EquivarianceLoss:  # noqa: ANN401 - fields
        """Published or recommended settings by name (:data:`PRESETS`); ``changes`` override single fields.

        Raises:
            ValueError: If there is no such preset.
        """
        check_choice("preset", name, PRESETS)
        return cls(schedule, **{**PRESETS[name], **changes})

    def _terms(
        self, model: Model, noised: NoisyBatch, output: Tensor, generator: Generators, kwargs: dict[str, Any]
    ) -> LossOutput:
        plain = super()._terms(model, noised, output, generator, kwargs)
        if self.perturbation is None or (not callable(self.strength) and self.strength == 0):
            return plain
        index = self._taking_part(noised.t, output.dtype)
        terms = (
            plain
            if index is not None and len(index) == 0
            else self._with_regulariser(plain, model, noised, output, index, generator, kwargs)
        )
        if not self.normalise:
            return terms
        return replace(terms, total=to_device(self._weight(noised.t, output.dtype), output.device) * terms.total)

    def _taking_part(self, t: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The images whose noise level has a strength, shape (at most B,); None for all. Nothing is drawn."""
        if not callable(self.strength):
            return None
        sigma = self.schedule.sigma(t).to(dtype)
        if isinstance(self.strength, SigmaRange):
            strength = self._strength(t, torch.ones_like(sigma))
        elif isinstance(self.radius, Radius):  # the strengths of the smallest, the largest and two radii between
            ends = [self._strength(t, self.radius.at(sigma, torch.full_like(sigma, u))) for u in (0.0, 1.0)]
            strength = self.radius.mean(lambda radius: self._strength(t, radius), sigma) + sum(ends)
        else:
            return None
        index = strength.nonzero().squeeze(1)
        return index if len(index) < len(t) else None

    def _with_regulariser(
        self,
        plain: LossOutput,
        model: Model,
        noised: NoisyBatch,
        output: Tensor,
        index: Tensor | None,
        generator: Generators,
        kwargs: dict[str, Any],
    ) -> LossOutput:
        """All terms, with the regulariser of the images ``index``."""
        part, part_output, part_kwargs, part_generator = noised, output, kwargs, generator
        if index is not None:
            here = to_device(index, output.device)
            part = noised.rows(index, here)
            part_output, part_kwargs = output[here], select_rows(kwargs, index, len(output))
            if isinstance(generator, Sequence):
                part_generator = [generator[i] for i in index.tolist()]
        radius = self._radius(part.t, output.dtype, part_generator)
        strength = to_device(self._strength(part.t, radius), output.device)
        radius = to_device(radius, output.device)
        equivariance = self._regulariser(model, part, part_output, radius, part_generator, part_kwargs)
        if index is not None:
            nothing = torch.zeros_like(plain.denoising)
            equivariance, radius, strength = (
                nothing.index_put((here,), values) for values in (equivariance, radius, strength)
            )
        return replace(
            plain,
            total=plain.denoising + strength * equivariance,
            equivariance=equivariance,
            radius=radius.detach(),
            strength=strength.detach(),
        )

    def _radius(self, t: Tensor, dtype: torch.dtype, generator: Generators) -> Tensor:
        """The bound on omega per image, shape (B,), where ``t`` lies."""
        radius = self.radius(self.schedule.sigma(t).to(dtype), generator)
        return radius if isinstance(self.radius, Radius) else checked("radius", radius, t)

    def _strength(self, t: Tensor, radius: Tensor) -> Tensor:
        """Lambda per image, shape (B,), where ``t`` lies."""
        if not callable(self.strength):
            return torch.full(t.shape, float(self.strength), dtype=radius.dtype, device=t.device)
        level = self.schedule.noise_to_signal(t).to(radius.dtype)
        return checked("strength", self.strength(level, radius), t).to(radius.dtype)

    def _weight(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``1 / (1 + lambda E[omega^2])`` of each image's noise level, shape (B,), where ``t`` lies."""
        assert isinstance(self.radius, Radius)
        mean_square = float(getattr(self.perturbation, "mean_square", 1.0))
        m = self.radius.mean(lambda r: self._strength(t, r) * r.square(), self.schedule.sigma(t).to(dtype))
        return 1 / (1 + mean_square * m)

    def _regulariser(
        self,
        model: Model,
        noised: NoisyBatch,
        output: Tensor,
        radius: Tensor,
        generator: Generators,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The per-image regulariser, shape (B,), at an omega chosen by the perturbation."""
        assert self.perturbation is not None
        assert not isinstance(self.perturbation, str)  # resolved when made
        t = to_device(noised.t, noised.x_t.device)
        clean = output.detach()

        def perturbed_output(omega: Tensor) -> Tensor:
            return call_model(model, self.schedule.perturb(noised.x_t, omega, t), t, kwargs)

        def respond(omega: Tensor) -> Response:
            with kept_random_stream(omega.device):
                moved = perturbed_output(omega) - clean
            return Response(
                self.schedule.eps_shift(moved, omega, t), self.schedule.equivariance_residual(moved, omega, t)
            )

        with kept_buffers(model):
            omega = self.perturbation(respond, radius, noised.x_t, generator)
        squares = self._penalised(noised, output, perturbed_output(omega), omega, t).square()
        return noised.mean(squares) if self.target == "noise" else squares.flatten(1).mean(1)

    def _penalised(self, noised: NoisyBatch, output: Tensor, perturbed: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """The quantity whose mean square is the regulariser, shape (B, ...)."""
        if self.target == "noise":
            # The state x_t' holds the noise eps + omega; its target is that of the clean state, moved alike.
            error = noised.kept(perturbed) - noised.target
            return self.schedule.equivariance_residual(error, noised.kept(omega), t)
        return self.schedule.equivariance_residual(self._shift(output, perturbed), omega, t)

    def _shift(self, output: Tensor, perturbed: Tensor) -> Tensor:
        """The change of the output, with gradients through the branches that ``gradient`` names."""
        if self.gradient == "perturbed":
            return perturbed - output.detach()
        return (perturbed.detach() if self.gradient == "clean" else perturbed) - output


def checked(what: str, values: Tensor, t: Tensor) -> Tensor:
    """What a user's function returned.

    Raises:
        ValueError: If it is not one number >= 0 per image.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"the {what} function returned {type(values).__name__}, not a tensor")
    if values.shape != t.shape:
        raise ValueError(f"the {what} function returned shape {tuple(values.shape)}, not {tuple(t.shape)}")
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"the {what} function returned a value that is negative or not finite")
    return values


STATE_RADIUS = Radius(exponent=0.0, units="state")
"""``U(0, 1) + 8/255`` in units of the state: the reading of the published radius that shows the published pattern."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"perturbation": AdversarialPerturbation(), "strength": 0.3, "radius": STATE_RADIUS},
    "paper-random": {"perturbation": RandomPerturbation(), "strength": 0.3, "radius": STATE_RADIUS},
    "paper-noise": {"perturbation": AdversarialPerturbation(), "strength": 0.3, "radius": Radius()},
    "paper-scaled": {"perturbation": AdversarialPerturbation(), "strength": InverseRadius(0.3), "radius": Radius()},
    "gated": {
        "perturbation": RandomPerturbation(),
        "strength": SigmaRange(0.0, 0.2, 3.75),
        "radius": Radius(exponent=0.0, scale=1.0, floor=0.0, random=False),
    },
    "fast": {"perturbation": AdversarialPerturbation(), "strength": SigmaRange(0.0, 0.2, 0.3), "radius": STATE_RADIUS},
    "plain": {"perturbation": None, "strength": 0.0, "radius": Radius()},
}
"""Settings of :class:`EquivarianceLoss` by name. ``paper``: Briglia et al. (2025), lambda = 0.3, one step of FGSM that
ascends the shift, the radius read in units of the state; ``paper-random``: its random variant. ``paper-noise``: read in
units of the noise, which cannot denoise whatever the network (docs/explanation/theory.md T15); ``paper-scaled``: so
read, with lambda over the deviation of the perturbation. The formulas are not public: these are
readings. ``fast``: ``paper`` below sigma/alpha = 0.2 alone, where nearly all of its force lies, at 1.1 to 1.2 times the
cost of a plain step.
``gated``: m = 1.25 below sigma/alpha = 0.2, the point of least price on clean data that helps (see experiments/)."""
