"""Closed forms of the linear-Gaussian world: what training converges to, and what samplers make of it.

Data are Gaussian with covariance eigenvalues ``v``; the network is ``eps_hat = W x_t``. Every optimum shares the
eigenvectors of the data, so each function works on one number ``w`` per direction, in float64.

Symbols: ``a = sqrt(alpha_bar)``, ``s = sqrt(1 - alpha_bar)``, level ``s / a``; ``kappa = E[omega_i^2]`` (uniform on
[-r, r]: ``r^2 / 3``; signs: ``r^2``); ``m = lambda kappa``, the strength. Levels and strengths are a number or of shape
(K,), ``v`` of shape (d,), results of shape (d,) or (K, d).

Source: derived for this project; docs/explanation/theory.md, T3 to T11.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Numbers = Tensor | float
"""A number, or a tensor of them."""


def _double(values: Numbers) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _scales(alpha_bar: Numbers) -> tuple[Tensor, Tensor]:
    """(a, s), shape () or (K,) with an axis for directions added."""
    table = _double(alpha_bar)
    if table.ndim > 1 or not bool(((table >= 0) & (table <= 1)).all()):
        raise ValueError("alpha_bar must be a number or have shape (K,), with values in [0, 1]")
    table = table.unsqueeze(-1)
    return table.sqrt(), (1 - table).sqrt()


# -- what training converges to ----------------------------------------------------------------------


def optimum(alpha_bar: Numbers, v: Tensor, m: Numbers = 0.0) -> Tensor:
    """The network that the equivariance regulariser with a random omega converges to.

    ``w = s (1 + m) / (a^2 v + (1 + m) s^2)``: the ordinary optimum for data of variance ``v / (1 + m)``. It does not
    depend on the distribution of omega, and is the same with a stop-gradient on the clean branch.

    Args:
        alpha_bar: Noise level in [0, 1), () or (K,).
        v: Eigenvalues of the data covariance, >= 0, shape (d,).
        m: Strength ``lambda kappa`` >= 0, a number or one per level, (K,); 0 is plain training.

    Returns:
        Eigenvalues of W, shape (d,) or (K, d).

    Source: derived for this project; docs/explanation/theory.md T3.
    """
    a, s = _scales(alpha_bar)
    inflated = 1 + _double(m).unsqueeze(-1)
    return s * inflated / (a.square() * _double(v) + inflated * s.square())


def invariance_optimum(alpha_bar: Numbers, v: Tensor, m: Numbers) -> Tensor:
    """The same for the invariance penalty ``||eps_hat(x_t') - eps_hat(x_t)||^2``, whatever the network predicts.

    ``w = s / (a^2 v + (1 + m) s^2)``. Arguments and result as in :func:`optimum`, with ``m = lambda kappa`` for a
    network that predicts the noise.

    Source: derived for this project; docs/explanation/theory.md T5.
    """
    return optimum(alpha_bar, v, m) / (1 + _double(m).unsqueeze(-1))


def noise_target_strength(strength: float, kappa: float) -> float:
    """The m of ``target="noise"``: ``lambda kappa / (1 + lambda)``, never above kappa.

    Args:
        strength: lambda >= 0.
        kappa: Second moment of an element of omega.

    Source: derived for this project; docs/explanation/theory.md T4.
    """
    return strength * kappa / (1 + strength)


def relabelled(alpha_bar: Numbers, v: Tensor, relabel: float = 1.0, label_floor: float = 0.0) -> Tensor:
    """The plain network asked at another level, ``max(relabel * s/a, label_floor)``, as an ``eps_hat`` at its own.

    ``relabel = sqrt(1 + m)`` gives :func:`optimum` at strength m: what the regulariser does here costs no training.

    Args:
        alpha_bar: Noise level of the state, in (0, 1), () or (K,).
        v: Eigenvalues of the data covariance, > 0, shape (d,).
        relabel: Factor on the level, >= 1.
        label_floor: Least level to ask at.

    Returns:
        Eigenvalues of W, shape (d,) or (K, d).

    Source: derived for this project; docs/explanation/theory.md T7.
    """
    a, s = _scales(alpha_bar)
    asked = (relabel * s / a).clamp(min=label_floor).square()
    return asked / (_double(v) + asked) / s


def levelled_optimum(alpha_bar: Numbers, v: Tensor, noise: Tensor, told: Tensor, share: Tensor) -> Tensor:
    """The network that images converge to which carry noise and say how much (``noise_level``), rightly or not.

    Group j, a share c_j of the images, carries noise sigma_j and says s_j; it trains the levels L = s/a above s_j. The
    result is the ordinary :func:`optimum` for variance ``v + d``::

        d = sum_j c_j g_j^2 (sigma_j^2 - s_j^2) / sum_j c_j g_j^2,      g_j = 1 - (s_j / L)^2, over all s_j < L

    So the truth (s_j = sigma_j) gives the clean network at every level, and silence (s_j = 0) plain training on dirt.

    Args:
        alpha_bar: Noise level in [0, 1), () or (K,).
        v: Eigenvalues of the clean covariance, >= 0, shape (d,).
        noise: sigma_j >= 0, shape (J,).
        told: s_j >= 0, shape (J,).
        share: c_j > 0, weight of each group in the loss at a level, shape (J,), or (K, J) where it depends on it.

    Returns:
        Eigenvalues of W, shape (d,) or (K, d).

    Raises:
        ValueError: If a level is trained by no group.

    Source: derived for this project from Daras et al. (2024), arXiv 2411.02780; docs/explanation/theory.md T13.
    """
    a, s = _scales(alpha_bar)
    rho = (a * _double(told) / s).square()
    weight = torch.where(rho < 1, _double(share) * (1 - rho).square(), 0.0)
    total = weight.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("a noise level lies below every level told: no image trains it")
    left = (weight * (_double(noise).square() - _double(told).square())).sum(-1, keepdim=True) / total
    return optimum(alpha_bar, _double(v) + left)


# -- what samplers make of it ------------------------------------------------------------------------


def _steps(alpha_bar: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(a, s, a', s', w) of every step, shapes (K, 1) and (K, d)."""
    a, s = _scales(alpha_bar)
    if w.ndim != 2 or len(w) != len(a) - 1:
        raise ValueError(f"w must have shape (K, d) for K + 1 levels, got {tuple(w.shape)} for {len(a)} levels")
    if not bool((a > 0).all()):
        raise ValueError("alpha_bar must be above 0 at every level visited: there, eps_hat says nothing of x0")
    return a[:-1], s[:-1], a[1:], s[1:], _double(w)


def ddim_gains(alpha_bar: Tensor, w: Tensor) -> Tensor:
    """What each deterministic DDIM step multiplies each direction by: ``a' (1 - s w) / a + s' w``.

    Args:
        alpha_bar: Levels visited, in (0, 1], the noisiest first and the one arrived at (1) last, shape (K + 1,). For
            a diffusers scheduler with trailing spacing: ``alphas_cumprod[timesteps]``, then 1.
        w: Eigenvalues of W at the first K levels, shape (K, d).

    Returns:
        Gains, shape (K, d), in the order of the steps.

    Raises:
        ValueError: If the shapes do not fit, or a level has no signal at all.

    Source: derived for this project from Song et al. (2021, DDIM), Eq. 12; docs/explanation/theory.md T3.
    """
    a, s, a_next, s_next, w = _steps(alpha_bar, w)
    return a_next * (1 - s * w) / a + s_next * w


def ddim_variance(alpha_bar: Tensor, w: Tensor) -> Tensor:
    """Variance per direction that DDIM generates from standard normal noise, exactly: the squared product of gains.

    Arguments as in :func:`ddim_gains`; returns shape (d,).
    """
    return ddim_gains(alpha_bar, w).prod(0).square()


def ddpm_variance(alpha_bar: Tensor, w: Tensor) -> Tensor:
    """Variance per direction that ancestral sampling (DDPM, ``fixed_small``) generates, exactly: the product of steps.

    ``V -> A^2 V + beta_tilde`` with ``1 - beta = alpha_bar / alpha_bar'``, ``A = (1 - beta w / s) / sqrt(1 - beta)``
    and ``beta_tilde = beta (1 - alpha_bar') / (1 - alpha_bar)``, for any stride. Arguments as in :func:`ddim_gains`;
    returns shape (d,).

    Source: derived for this project from Ho et al. (2020), Eq. 7 and 11; docs/explanation/theory.md T3.
    """
    a, s, a_next, s_next, w = _steps(alpha_bar, w)
    beta = 1 - (a / a_next).square()
    gains = (1 - beta * w / s) / (1 - beta).sqrt()
    added = beta * (s_next / s).square()
    variance = torch.ones(w.shape[1], dtype=torch.float64, device=w.device)
    for gain, noise in zip(gains, added, strict=True):
        variance = gain.square() * variance + noise
    return variance


def gated_variance(v: Tensor, m: float, low: float = 0.0, high: float = float("inf")) -> Tensor:
    """Variance that the probability-flow ODE generates if the strength is m for ``low <= s/a <= high`` and 0 elsewhere.

    ``v (v + c^2) / (v + (1 + m) c^2)`` for a gate from 0 to c: directions with ``v >> m c^2`` stay, those with
    ``v << c^2`` are divided by ``1 + m``. In general that times ``(v + (1 + m) b^2) / (v + b^2)``, b the lower edge.
    Without edges: ``v / (1 + m)``.

    Args:
        v: Eigenvalues of the data covariance, > 0, shape (d,).
        m: Strength inside the gate, >= 0.
        low: Lower edge, >= 0.
        high: Upper edge, > 0; may be infinite.

    Returns:
        Shape (d,).

    Source: derived for this project; docs/explanation/theory.md T6.
    """
    v = _double(v)
    at_high = 1 / (1 + m) if high == float("inf") else (v + high**2) / (v + (1 + m) * high**2)
    return v * at_high * (v + (1 + m) * low**2) / (v + low**2)


def gated_variance_sde(v: Tensor, m: float, low: float = 0.0, high: float = float("inf")) -> Tensor:
    """The same for the reverse SDE.

    ``v/(1 + m) [1 + m v^2 / (v + (1 + m) c^2)^2]`` for a gate from 0 to c. In general, with ``v' = v / (1 + m)``:
    ``v - (v - v') (1 - ((v' + b^2) / (v' + c^2))^2) (v / (v + b^2))^2``. Arguments as in :func:`gated_variance`.

    Source: derived for this project; docs/explanation/theory.md T6.
    """
    v = _double(v)
    shrunk = v / (1 + m)
    remembered = ((shrunk + low**2) / (shrunk + high**2)).square()
    return v - (v - shrunk) * (1 - remembered) * (v / (v + low**2)).square()


def invariance_variance(v: Tensor, m: float, largest: float) -> Tensor:
    """Variance that the variance-exploding flow of :func:`invariance_optimum` generates from noise ``S = largest``.

    ``S^2 (v / (v + (1 + m) S^2))^(1 / (1 + m))``: it grows with S without bound. Shape (d,).

    Source: derived for this project; docs/explanation/theory.md T5.
    """
    v = _double(v)
    return largest**2 * (v / (v + (1 + m) * largest**2)) ** (1 / (1 + m))


# -- adversaries -------------------------------------------------------------------------------------


def spectral_clipping(alpha_bar: float, v: Tensor, strength: float, radius: float) -> Tensor:
    """The network that the regulariser with the worst omega of the ball ``||omega||_2 <= rho`` converges to.

    ``1 - s w_i = min(b_i, tau)`` with ``b_i = a^2 v_i / (a^2 v_i + s^2)`` and tau from
    ``sum_{b_i > tau} ((a^2 v_i + s^2) / s^2) (b_i - tau) = lambda rho^2 tau``: the largest directions are clipped to a
    common value, the others stay plain.

    Args:
        alpha_bar: Noise level in (0, 1).
        v: Eigenvalues of the data covariance, >= 0, shape (d,).
        strength: lambda >= 0.
        radius: rho >= 0, of the whole vector omega.

    Returns:
        Eigenvalues of W, shape (d,).

    Source: derived for this project; docs/explanation/theory.md T9.
    """
    a, s = _scales(alpha_bar)
    v = _double(v)
    size = a.square() * v + s.square()
    plain, weight = a.square() * v / size, size / s.square()
    # (sum of weight * b - tau * weight over what is clipped) falls in tau, lambda rho^2 tau rises: one crossing
    low, high = torch.zeros_like(plain.max()), plain.max()
    for _ in range(100):
        tau = (low + high) / 2
        too_low = (weight * (plain - tau).clamp(min=0)).sum() > strength * radius**2 * tau
        low, high = (tau, high) if too_low else (low, tau)
    return (1 - plain.clamp(max=high)) / s


def linf_bounds(alpha_bar: float, w: Tensor, radius: float) -> tuple[float, float]:
    """Bounds on ``max ||A omega||^2`` over the box ``|omega_i| <= r``, where ``A = s W - I``.

    ``r^2 ||A||_F^2 <= max <= r^2 d ||A||_2^2``. Random signs have the left side for their mean; the right one is
    reached if some top singular vector of A is a pattern of +-1, such as the brightness of stationary images.

    Args:
        alpha_bar: Noise level in [0, 1).
        w: Eigenvalues of W, shape (d,).
        radius: r >= 0.

    Returns:
        (lower, upper), of the sum of squares; divide by d for the mean that the objectives report.

    Source: derived for this project; docs/explanation/theory.md T9.
    """
    _, s = _scales(alpha_bar)
    squares = (1 - s * _double(w)).square()
    return radius**2 * squares.sum().item(), radius**2 * len(squares) * squares.max().item()


def displacement_bound(rho: float) -> float:
    """Least root mean square by which a generator's output moves when its start does, in spreads of that output.

    For any map G of standard normal noise x, and ``x' = sqrt(1 - rho^2) x + rho z`` with fresh noise z, which has the
    law of x: ``E ||G(x') - G(x)||^2 >= 2 (1 - sqrt(1 - rho^2)) tr Cov G(x)``; equal for linear maps.

    Args:
        rho: In [0, 1].

    Returns:
        ``sqrt(2 (1 - sqrt(1 - rho^2)))``, about rho.

    Source: docs/explanation/theory.md T14; the Hermite expansion behind the Gaussian Poincare inequality (Chernoff
        1981).
    """
    return math.sqrt(2 * (1 - math.sqrt(1 - rho**2)))


def largest_displacement(gains: Tensor, bounds: Tensor) -> float:
    """The farthest that pushes of the state can move the end of a linear sampler, for data with uncorrelated elements.

    ``sqrt(sum_i (sum_k e_k prod_{j>=k} |g_{j,i}|)^2)``: all pushes of a direction add up with their signs aligned.
    Divide by the generated spread ``sqrt(sum_i V_i)`` before comparing: shrinking alone looks like robustness.

    Args:
        gains: Of each step, in their order, shape (K, d), as :func:`ddim_gains` returns them.
        bounds: e_k >= 0, largest absolute push of each element of the state before step k, shape (K,).

    Returns:
        Euclidean length.

    Source: derived for this project; docs/explanation/theory.md T10.
    """
    remaining = _double(gains).abs().flip(0).cumprod(0).flip(0)
    return float((_double(bounds)[:, None] * remaining).sum(0).norm())


# -- what metrics say about samples of the true law --------------------------------------------------


def coverage_of_one_law(n: int, neighbours: int = 5) -> float:
    """Expected coverage between two sets of n samples of one law, of any continuous density.

    ``1 - prod_{i=1..k} (n - i) / (2 n - i)``: a real point is not covered if its k nearest are all real.

    Args:
        n: Samples on either side, > ``neighbours``.
        neighbours: k of the k-nearest-neighbour balls.

    Source: derived for this project, for the metric of Naeem et al. (2020), Eq. 4; docs/explanation/theory.md T11.
    """
    missed = 1.0
    for i in range(1, neighbours + 1):
        missed *= (n - i) / (2 * n - i)
    return 1 - missed
