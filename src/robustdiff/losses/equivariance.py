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
from robustdiff.utils.errors import check_choice
from robustdiff.utils.random import Generators
from robustdiff.utils.tensors import to_device

FunctionOfSigma = Callable[[Tensor], Tensor]
"""Maps noise levels sigma/alpha, shape (B,), to values, shape (B,)."""


@dataclass(frozen=True)
class SigmaRange:
    """A strength that is ``value`` where ``low <= sigma/alpha <= high`` and 0 elsewhere.

    Images drawn outside take no perturbed forward pass at all: where a share q is inside, a step costs ``1 + q`` plain
    ones with a random and ``1 + 1.67 q`` with an adversarial perturbation.

    Args:
        low: Lower noise level sigma/alpha, >= 0.
        high: Upper noise level, >= low; ``float("inf")`` for none.
        value: Strength inside, >= 0.

    Raises:
        ValueError: If the levels are not ordered or the value is negative.

    Source: docs/explanation/theory.md T6: below c = ``high`` the generated variance of a direction of variance v is
    ``v (v + c^2) / (v + (1 + m) c^2)``, m = lambda E[omega^2]: small directions shrink, large ones stay.
    """

    low: float
    high: float
    value: float

    def __post_init__(self) -> None:
        """Check the order."""
        if not 0 <= self.low <= self.high:
            raise ValueError(f"SigmaRange needs 0 <= low <= high, got low={self.low}, high={self.high}")
        if not self.value >= 0:
            raise ValueError(f"SigmaRange needs value >= 0, got {self.value}")

    def __call__(self, noise_to_signal: Tensor) -> Tensor:
        """The strength per image, shape (B,)."""
        inside = (noise_to_signal >= self.low) & (noise_to_signal <= self.high)
        return self.value * inside.to(noise_to_signal.dtype)


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
        strength: lambda >= 0: a number, or a function of sigma/alpha, shape (B,) -> (B,), such as :class:`SigmaRange`.
        radius: Bound on omega per noise level: a :class:`Radius` or ``callable(sigma, generator)``.
        gradient: Which branch of the regulariser trains the network: ``"both"``, ``"perturbed"`` (the clean branch is
            a fixed target) or ``"clean"`` (for study: in the linear case this one does nothing).
        target: ``"output"``: be equivariant with the network's own output; ``"noise"``: hit the true ``eps + omega``.

    Differences from the paper: which branch carries gradients, and the exact radius, are not stated there.

    Raises:
        ValueError: If a setting is out of range.

    Source: Briglia et al. (2025), arXiv 2505.21742.
    """

    perturbation: str | Perturbation | None = "adversarial"
    strength: float | FunctionOfSigma = 0.3
    radius: Radius | Callable[[Tensor, Generators], Tensor] = field(default_factory=Radius)
    gradient: Literal["both", "perturbed", "clean"] = "both"
    target: Literal["output", "noise"] = "output"

    def __post_init__(self) -> None:
        """Check the settings and resolve a perturbation given by name."""
        if isinstance(self.perturbation, str):
            object.__setattr__(self, "perturbation", named_perturbation(self.perturbation))
        if not callable(self.strength) and not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be a finite number >= 0, got {self.strength}")
        if not callable(self.radius):
            raise ValueError(
                f"radius must be a Radius or a function, got {self.radius}: "
                f"Radius(exponent=0, scale=..., floor=0, random=False) is constant"
            )
        check_choice("gradient", self.gradient, ("both", "perturbed", "clean"))
        check_choice("target", self.target, ("output", "noise"))
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
        dtype, count = output.dtype, len(output)
        strength = self._strength(noised.t, dtype)
        index = strength.nonzero().squeeze(1) if callable(self.strength) else None
        if index is not None and len(index) == 0:
            return plain
        part, part_output, part_kwargs, part_generator = noised, output, kwargs, generator
        if index is not None and len(index) < count:
            here = to_device(index, output.device)
            part = noised.rows(index, here)
            part_output, part_kwargs = output[here], select_rows(kwargs, index, count)
            if isinstance(generator, Sequence):
                part_generator = [generator[i] for i in index.tolist()]
        radius = to_device(self._radius(part.t, dtype, part_generator), output.device)
        equivariance = self._regulariser(model, part, part_output, radius, part_generator, part_kwargs)
        if part is not noised:
            nothing = torch.zeros_like(plain.denoising)
            equivariance, radius = nothing.index_put((here,), equivariance), nothing.index_put((here,), radius)
        strength = to_device(strength, output.device)
        return replace(
            plain,
            total=plain.denoising + strength * equivariance,
            equivariance=equivariance,
            radius=radius.detach(),
            strength=strength,
        )

    def _strength(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Lambda per image, shape (B,), where ``t`` lies."""
        if not callable(self.strength):
            return torch.full(t.shape, float(self.strength), dtype=dtype, device=t.device)
        return checked("strength", self.strength(self.schedule.noise_to_signal(t)).to(dtype), t)

    def _radius(self, t: Tensor, dtype: torch.dtype, generator: Generators) -> Tensor:
        """The bound on omega per image, shape (B,), where ``t`` lies."""
        radius = self.radius(self.schedule.sigma(t).to(dtype), generator)
        return radius if isinstance(self.radius, Radius) else checked("radius", radius, t)

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
    if values.shape != t.shape:
        raise ValueError(f"the {what} function returned shape {tuple(values.shape)}, not {tuple(t.shape)}")
    if not bool((values >= 0).all()):
        raise ValueError(f"the {what} function returned a value that is negative or not a number")
    return values


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"perturbation": AdversarialPerturbation(steps=1, inner="shift"), "strength": 0.3, "radius": Radius()},
    "gated": {
        "perturbation": RandomPerturbation(),
        "strength": SigmaRange(0.0, 0.2, 3.75),
        "radius": Radius(exponent=0.0, scale=1.0, floor=0.0, random=False),
    },
    "plain": {"perturbation": None, "strength": 0.0, "radius": Radius()},
}
"""Settings of :class:`EquivarianceLoss` by name. ``paper``: Briglia et al. (2025), lambda = 0.3, one FGSM step.
``gated``: m = 1.25 below sigma/alpha = 0.2, the point of least price on clean data that helps (see experiments/)."""
