"""Training objectives: the plain denoising loss, and the same with an equivariance regulariser.

Every objective, also those of ``baselines.py``, is called alike and returns named per-image terms; the caller reduces
them::

    terms = objective(model, x0, generator=g)      # model: diffusers' or any callable(x_t, t, **kwargs)
    terms.total.mean().backward()

An objective owns neither the model nor the optimiser, mutates nothing it is given, and keeps images, noise and losses
in float32 (or float64, if ``x0`` is) whatever precision the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robustdiff.calling import Model, call_model, kept_buffers, kept_random_stream, select_rows
from robustdiff.levels import Noised, add_noise, first_timesteps
from robustdiff.perturbation import (
    AdversarialPerturbation,
    Perturbation,
    Radius,
    RandomPerturbation,
    Response,
    named_perturbation,
)
from robustdiff.process import Generators, NoiseProcess, check_generators, draw_normal, to_device

Schedule = Callable[[Tensor], Tensor]
"""Maps noise levels sigma/alpha, shape (B,), to values, shape (B,)."""


@dataclass(frozen=True)
class LossTerms:
    """Losses of a batch, one number per image; every tensor has shape (B,).

    Attributes:
        total: ``denoising + strength * equivariance``: reduce this and call ``backward``.
        denoising: Mean squared error of the prediction over an image's elements.
        equivariance: Mean squared regulariser over an image's elements; 0 where the strength is 0.
        t: Timesteps drawn.
        radius: Bound on omega; 0 where the strength is 0.
        strength: lambda at each image's noise level.
    """

    total: Tensor
    denoising: Tensor
    equivariance: Tensor
    t: Tensor
    radius: Tensor
    strength: Tensor


@dataclass(frozen=True)
class Gate:
    """A strength that is ``value`` where ``low <= sigma/alpha <= high`` and 0 elsewhere.

    Images drawn outside the gate take no perturbed forward pass at all, so a gate is also a saving: a gate of
    probability q costs ``1 + q`` plain steps with a random and ``1 + 1.67 q`` with an adversarial perturbation.

    Args:
        low: Lower noise level sigma/alpha, >= 0.
        high: Upper noise level, >= low; ``float("inf")`` for none.
        value: Strength inside, >= 0.

    Raises:
        ValueError: If the levels are not ordered or the value is negative.

    Source: theory of gating for linear denoisers: with m = lambda E[omega^2] below c = ``high`` the generated variance
    of a direction of variance v is ``v (v + c^2) / (v + (1 + m) c^2)``: small directions shrink, large ones stay.
    """

    low: float
    high: float
    value: float

    def __post_init__(self) -> None:
        """Check the order."""
        if not 0 <= self.low <= self.high:
            raise ValueError(f"Gate needs 0 <= low <= high, got low={self.low}, high={self.high}")
        if not self.value >= 0:
            raise ValueError(f"Gate needs value >= 0, got {self.value}")

    def __call__(self, noise_to_signal: Tensor) -> Tensor:
        """The strength per image, shape (B,)."""
        inside = (noise_to_signal >= self.low) & (noise_to_signal <= self.high)
        return self.value * inside.to(noise_to_signal.dtype)


# -- what all objectives do alike --------------------------------------------------------------------


def mean_square(x: Tensor) -> Tensor:
    """Mean of the squares over all but the first axis: (B, ...) -> (B,)."""
    return x.square().flatten(1).mean(1)


def _weights(mask: Tensor, x0: Tensor) -> Tensor:
    """The mask in the precision, shape and place of the images.

    Raises:
        ValueError: If its shape does not fit.
    """
    fits = mask.ndim == x0.ndim and all(m in (1, n) for m, n in zip(mask.shape[1:], x0.shape[1:], strict=True))
    if not fits or mask.shape[0] != x0.shape[0]:
        raise ValueError(f"loss_mask must broadcast to the shape of x0, {tuple(x0.shape)}, got {tuple(mask.shape)}")
    return to_device(mask, x0.device).to(x0.dtype).expand_as(x0)


@dataclass(frozen=True)
class PlainObjective:
    """The denoising loss ``||output - target||^2`` (Ho et al. 2020, Eq. 14), uniform in t.

    Args:
        process: The noise process, which also says what the model predicts.
    """

    process: NoiseProcess
    takes_noise_level: ClassVar[bool] = True
    """Whether the minimum stays where it is when images are noisy and say how much."""

    def __call__(
        self,
        model: Model,
        x0: Tensor,
        *,
        generator: Generators = None,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        noise_level: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **model_kwargs: Any,  # noqa: ANN401 - passed through
    ) -> LossTerms:
        """Loss terms of a batch.

        Args:
            model: ``callable(x_t, t, **model_kwargs)``.
            x0: Images in [-1, 1], shape (B, ...), floating point; half precision is raised to float32.
            generator: Source of all draws: one generator, one per image, or None for torch's global one.
            t: Timesteps, shape (B,), if the caller draws them itself.
            eps: Noise, shape of ``x0``, if the caller draws it itself.
            noise_level: sigma_n >= 0, standard deviation of the Gaussian noise that each image carries already, in the
                units of ``x0``, shape (B,), best on the CPU. Such an image is trained only at noise levels above its
                own, each equally often, and there towards the clean image (``levels.py``: formulas, and what that does
                to the timesteps); 0 is plain training, bit for bit.
            loss_mask: Which elements count in the denoising term, True or 1 where they do, of a shape (B, ...) that
                broadcasts to that of ``x0``; the term is their mean, 0 where none counts. For pixels that an image
                lacks, filled with something: the network sees the filling and is not asked for it. The regulariser
                keeps all of them, unless its target is the noise. Default: all, bit for bit.
            **model_kwargs: Passed to the model (``class_labels``, ``encoder_hidden_states`` ...).

        Raises:
            ValueError: If ``x0`` is not floating point, or ``t``, ``eps``, ``noise_level``, ``loss_mask`` or the
                model's output do not fit its shape; if a noise level is not below the largest of the process, or ``t``
                not above it; or if this objective cannot use noise levels.
        """
        check_generators(generator, x0.shape[0])
        if not x0.is_floating_point():
            raise ValueError(f"x0 must be floating point in [-1, 1], got {x0.dtype}")
        if t is not None and t.shape != x0.shape[:1]:
            raise ValueError(f"t must have shape ({x0.shape[0]},), got {tuple(t.shape)}")
        if eps is not None and eps.shape != x0.shape:
            raise ValueError(f"eps must have the shape of x0, {tuple(x0.shape)}, got {tuple(eps.shape)}")
        if noise_level is not None and not self.takes_noise_level:
            raise ValueError(f"{type(self).__name__} cannot use noise_level: its optimum would no longer be clean")
        if noise_level is not None and noise_level.shape != x0.shape[:1]:
            raise ValueError(f"noise_level must have shape ({x0.shape[0]},), got {tuple(noise_level.shape)}")
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        noised = self._noise(x0, generator, t, eps, noise_level)
        noised = noised if loss_mask is None else replace(noised, mask=_weights(loss_mask, x0))
        output = call_model(model, noised.x_t, to_device(noised.t, x0.device), model_kwargs)
        return self._terms(model, x0, noised, output, generator, model_kwargs)

    def _noise(
        self, x0: Tensor, generator: Generators, t: Tensor | None, eps: Tensor | None, noise_level: Tensor | None
    ) -> Noised:
        first = None if noise_level is None else first_timesteps(self.process, noise_level)
        if t is None:
            t = self.process.draw_timesteps(x0.shape[0], generator, first)
        elif first is not None and bool((t < to_device(first, t.device)).any()):
            raise ValueError("t is not above the noise_level of every image: draw it from levels.first_timesteps on")
        eps = draw_normal(x0, generator) if eps is None else eps.to(x0.dtype)
        return add_noise(self.process, x0, eps, t, noise_level)

    def _denoising(self, noised: Noised, output: Tensor) -> Tensor:
        return noised.mean((noised.kept(output) - noised.target).square())

    def _terms(
        self, model: Model, x0: Tensor, noised: Noised, output: Tensor, generator: Generators, kwargs: dict[str, Any]
    ) -> LossTerms:
        denoising = self._denoising(noised, output)
        nothing = torch.zeros_like(denoising)
        return LossTerms(denoising, denoising, nothing, noised.t, nothing, nothing)


@dataclass(frozen=True)
class RobustObjective(PlainObjective):
    """The denoising loss plus the equivariance regulariser.

    With ``x_t' = x_t + s omega`` and the network's prediction of the noise::

        L = ||eps_hat(x_t) - eps||^2 + lambda ||eps_hat(x_t') - (eps_hat(x_t) + omega)||^2        (epsilon-prediction)

    The second term equals ``SNR ||x0_hat(x_t') - x0_hat(x_t)||^2``: the denoised image must not move. That is its
    definition for every parametrisation; the weight is the one the plain loss gives to an error of x0_hat (SNR, 1 or
    SNR + 1), so that a ``strength`` means the same for epsilon-, sample- and v-prediction.

    Args:
        process: The noise process, which also says what the model predicts.
        perturbation: ``"none"``, ``"random"``, ``"adversarial"``, or a :class:`Perturbation` object.
        strength: lambda >= 0: a number, or a function of sigma/alpha, shape (B,) -> (B,), such as :class:`Gate`.
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
    strength: float | Schedule = 0.3
    radius: Radius | Callable[[Tensor, Generators], Tensor] = field(default_factory=Radius)
    gradient: Literal["both", "perturbed", "clean"] = "both"
    target: Literal["output", "noise"] = "output"

    def __post_init__(self) -> None:
        """Check the settings and resolve a perturbation given by name."""
        if isinstance(self.perturbation, str):
            object.__setattr__(self, "perturbation", named_perturbation(self.perturbation))
        if not callable(self.strength) and not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be a finite number >= 0, got {self.strength}")
        if self.gradient not in ("both", "perturbed", "clean"):
            raise ValueError(f"gradient {self.gradient!r} is not one of both, perturbed, clean")
        if self.target not in ("output", "noise"):
            raise ValueError(f"target {self.target!r} is not one of output, noise")
        if self.target == "noise" and self.gradient == "clean":
            raise ValueError("target='noise' has no clean branch: use gradient='both' or 'perturbed'")

    @classmethod
    def preset(cls, name: str, process: NoiseProcess, **changes: Any) -> RobustObjective:  # noqa: ANN401 - fields
        """Published or recommended settings by name (``PRESETS``); ``changes`` override single fields.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
        return cls(process, **{**PRESETS[name], **changes})

    def _terms(
        self, model: Model, x0: Tensor, noised: Noised, output: Tensor, generator: Generators, kwargs: dict[str, Any]
    ) -> LossTerms:
        plain = super()._terms(model, x0, noised, output, generator, kwargs)
        if self.perturbation is None or (not callable(self.strength) and self.strength == 0):
            return plain
        strength = self._strength(noised.t, x0.dtype)
        index = strength.nonzero().squeeze(1) if callable(self.strength) else None
        if index is not None and len(index) == 0:
            return plain
        part, part_output, part_kwargs, part_generator = noised, output, kwargs, generator
        if index is not None and len(index) < x0.shape[0]:
            here = to_device(index, x0.device)
            part = noised.rows(index, here)
            part_output, part_kwargs = output[here], select_rows(kwargs, index, x0.shape[0])
            if isinstance(generator, Sequence):
                part_generator = [generator[i] for i in index.tolist()]
        radius = to_device(self._radius(part.t, x0.dtype, part_generator), x0.device)
        equivariance = self._regulariser(model, part, part_output, radius, part_generator, part_kwargs)
        if part is not noised:
            nothing = torch.zeros_like(plain.denoising)
            equivariance, radius = nothing.index_put((here,), equivariance), nothing.index_put((here,), radius)
        strength = to_device(strength, x0.device)
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
        strength = self.strength(self.process.noise_to_signal(t)).to(dtype)
        if strength.shape != t.shape:
            raise ValueError(f"the strength function returned shape {tuple(strength.shape)}, not {tuple(t.shape)}")
        if not bool((strength >= 0).all()):
            raise ValueError("the strength function returned a value that is negative or not a number")
        return strength

    def _radius(self, t: Tensor, dtype: torch.dtype, generator: Generators) -> Tensor:
        """The bound on omega per image, shape (B,), where ``t`` lies."""
        radius = self.radius(self.process.sigma(t).to(dtype), generator)
        if radius.shape != t.shape:
            raise ValueError(f"the radius function returned shape {tuple(radius.shape)}, not {tuple(t.shape)}")
        if not isinstance(self.radius, Radius) and not bool((radius >= 0).all()):
            raise ValueError("the radius function returned a value that is negative or not a number")
        return radius

    def _regulariser(
        self,
        model: Model,
        noised: Noised,
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
            return call_model(model, self.process.perturb(noised.x_t, omega, t), t, kwargs)

        def respond(omega: Tensor) -> Response:
            with kept_random_stream(omega.device):
                moved = perturbed_output(omega) - clean
            return Response(
                self.process.eps_shift(moved, omega, t), self.process.equivariance_residual(moved, omega, t)
            )

        with kept_buffers(model):
            omega = self.perturbation(respond, radius, noised.x_t, generator)
        squares = self._penalised(noised, output, perturbed_output(omega), omega, t).square()
        return noised.mean(squares) if self.target == "noise" else squares.flatten(1).mean(1)

    def _penalised(self, noised: Noised, output: Tensor, perturbed: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """The quantity whose mean square is the regulariser, shape (B, ...)."""
        if self.target == "noise":
            # The state x_t' holds the noise eps + omega; its target is that of the clean state, moved alike.
            error = noised.kept(perturbed) - noised.target
            return self.process.equivariance_residual(error, noised.kept(omega), t)
        output, perturbed = self._branches(output, perturbed)
        return self.process.equivariance_residual(perturbed - output, omega, t)

    def _branches(self, output: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """The clean and the perturbed output, one of them a fixed target if ``gradient`` says so."""
        if self.gradient == "perturbed":
            return output.detach(), perturbed
        return (output, perturbed.detach()) if self.gradient == "clean" else (output, perturbed)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"perturbation": AdversarialPerturbation(steps=1, inner="shift"), "strength": 0.3, "radius": Radius()},
    "gated": {
        "perturbation": RandomPerturbation(),
        "strength": Gate(0.0, 0.2, 3.75),
        "radius": Radius(exponent=0.0, scale=1.0, floor=0.0, random=False),
    },
    "plain": {"perturbation": None, "strength": 0.0, "radius": Radius()},
}
"""Settings of :class:`RobustObjective` by name. ``paper``: Briglia et al. (2025), lambda = 0.3, one FGSM step.
``gated``: m = 1.25 below sigma/alpha = 0.2, the point of least price on clean data that helps (see experiments/)."""
