"""Distributions whose truth is known, so that every error of a model trained on them can be measured exactly.

Points have shape (d,), images (C, H, W); both lie in about [-1, 1], and dirt is the same as for images::

    world = Plane()
    x0 = world.sample(20_000, generator)
    dirty, hit = make_dirty(x0, [Corruption.parse("gaussian:sigma=0.2,fraction=0.9")], seed=0)

Where a density exists it is that of ``x_t = alpha x0 + sigma eps`` (``diffusion/schedule.py``), so that the ideal
prediction of the noise, ``-sigma * score``, is known at every noise level.

Longer than most files: four worlds, to be read one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from robustdiff.data.corruption import Corruption, corrupt

NEIGHBOURLESS = ("gaussian", "impulse", "missing", "outlier")
"""Dirt that has a meaning for points, whose coordinates are no neighbours of one another."""


@runtime_checkable
class World(Protocol):
    """A distribution with a known support."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one draw: (d,) or (C, H, W)."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent draws, float32, shape (n, ...)."""
        ...

    def distance_to_support(self, x: Tensor) -> Tensor:
        """Euclidean distance of each of ``x``, (n, ...), to where the law lives, shape (n,)."""
        ...


class WorldWithDensity(World, Protocol):
    """A distribution whose density is known at every noise level."""

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Logarithm of the density of ``alpha x0 + sigma eps`` at ``x``, (n, d) -> (n,)."""
        ...

    def score(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Its gradient in ``x``, (n, d) -> (n, d)."""
        ...


def make_dirty(x0: Tensor, corruptions: Sequence[Corruption], seed: int) -> tuple[Tensor, Tensor]:
    """Frozen dirt, drawn as for images: a function of (seed, index) alone.

    Args:
        x0: Clean draws, shape (n, d) or (n, C, H, W); never changed.
        corruptions: Applied in their order. A point is dirtied as an image of one row: "pixels" are its coordinates.
        seed: Seed of the dirt.

    Returns:
        The dirty draws, of the shape of ``x0``, and which were hit, bool, shape (n,).

    Raises:
        ValueError: If a kind needs neighbouring pixels and ``x0`` are points.
    """
    if x0.ndim == 2:
        for corruption in corruptions:
            if corruption.kind not in NEIGHBOURLESS:
                kinds = ", ".join(NEIGHBOURLESS)
                raise ValueError(f"corruption {corruption.kind} needs an image; points can have {kinds}")
    dirty, hit = x0.clone(), torch.zeros(len(x0), dtype=torch.bool)
    images = dirty[:, None, None, :] if x0.ndim == 2 else dirty
    for index in range(len(x0)):
        changed, kinds_hit = corrupt(images[index], corruptions, seed, index)
        if kinds_hit:
            images[index], hit[index] = changed, True
    return dirty, hit


# -- a plane in space ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """The uniform law on a square in an oblique plane through the origin of three-dimensional space.

    Args:
        half_width: Half of the square's edge, > 0; 0.8 keeps every coordinate in [-1, 1].

    Raises:
        ValueError: If ``half_width`` is not positive.

    Source: the proof of concept of Briglia et al. (2025); size and tilt are ours.
    """

    half_width: float = 0.8

    def __post_init__(self) -> None:
        """Check the size."""
        if not 0 < self.half_width < math.inf:
            raise ValueError(f"Plane needs a positive half_width, got {self.half_width}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(3,)."""
        return (3,)

    @property
    def basis(self) -> Tensor:
        """Orthonormal axes of the plane as columns, along the square's edges, float64, shape (3, 2)."""
        return (
            torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
            / torch.tensor([2.0, 6.0], dtype=torch.float64).sqrt()
        )

    @property
    def normal(self) -> Tensor:
        """Unit normal (1, 1, 1)/sqrt(3), float64, shape (3,)."""
        return torch.full((3,), 3**-0.5, dtype=torch.float64)

    def coordinates(self, x: Tensor) -> Tensor:
        """Coordinates in the plane and above it, (n, 3) -> (n, 3): along the two edges, then along the normal."""
        return x @ torch.cat([self.basis, self.normal[:, None]], 1).to(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent draws, float32, shape (n, 3)."""
        u = (2 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1) * self.half_width
        return (u @ self.basis.T).float()

    def distance_to_support(self, x: Tensor) -> Tensor:
        """Distance to the square (not only to its plane), (n, 3) -> (n,)."""
        u = self.coordinates(x)
        beyond = (u[:, :2].abs() - self.half_width).clamp(min=0)
        distance: Tensor = torch.linalg.vector_norm(torch.cat([beyond, u[:, 2:]], 1), dim=1)
        return distance

    def distance_to_plane(self, x: Tensor) -> Tensor:
        """Distance to the plane, however far from the square, (n, 3) -> (n,)."""
        return self.coordinates(x)[:, 2].abs()

    def coverage(self, x: Tensor, cells: int = 10) -> float:
        """Share of ``cells`` x ``cells`` equal cells of the square that hold the projection of one of ``x`` or more."""
        place = ((self.coordinates(x)[:, :2] / self.half_width + 1) / 2 * cells).floor().long()
        place = place[((place >= 0) & (place < cells)).all(1)]
        held = torch.zeros(cells, cells, dtype=torch.bool)
        held[place[:, 0], place[:, 1]] = True
        return float(held.double().mean())

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Log density of ``alpha x0 + sigma eps``, (n, 3) -> (n,), float64; the clean law, on a surface, has none.

        A product: a box of half-width ``alpha h`` blurred by sigma along each edge, a Gaussian along the normal.

        Raises:
            ValueError: If ``sigma`` is 0.
        """
        return self._along(x, alpha, sigma)[0].sum(1)

    def score(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Gradient of :meth:`log_density`, (n, 3) -> (n, 3), float64.

        Raises:
            ValueError: If ``sigma`` is 0.
        """
        axes = torch.cat([self.basis, self.normal[:, None]], 1)
        return self._along(x, alpha, sigma)[1] @ axes.T

    def _along(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Log density and its derivative along the three axes of :meth:`coordinates`, (n, 3) each."""
        if not sigma > 0:
            raise ValueError("the law of a plane has a density only with some noise: sigma > 0")
        u = self.coordinates(x.double())
        box, slope = _blurred_box(u[:, :2], alpha * self.half_width, sigma)
        height = u[:, 2:]
        gauss = -0.5 * (height / sigma).square() - math.log(sigma * math.sqrt(2 * math.pi))
        return torch.cat([box, gauss], 1), torch.cat([slope, -height / sigma**2], 1)


def _blurred_box(u: Tensor, half_width: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Log density of Uniform[-h, h] + N(0, sigma^2), and its derivative; any shape, float64.

    By symmetry u >= 0 is enough. The difference of two normal tails is taken through the smaller one, so that nothing
    cancels far outside the box.
    """
    side, u = torch.where(u < 0, -1.0, 1.0), u.abs()
    if half_width == 0:
        return -0.5 * (u / sigma).square() - math.log(sigma * math.sqrt(2 * math.pi)), -side * u / sigma**2
    near, far = (u - half_width) / sigma, (u + half_width) / sigma
    log_near, log_far = torch.special.log_ndtr(-near), torch.special.log_ndtr(-far)
    log_mass = log_near + torch.log1p(-torch.exp(log_far - log_near))
    log_density = log_mass - math.log(2 * half_width)
    log_phi_near = -0.5 * near.square() - 0.5 * math.log(2 * math.pi)
    log_phi_far = -0.5 * far.square() - 0.5 * math.log(2 * math.pi)
    slope = (torch.exp(log_phi_far - log_mass) - torch.exp(log_phi_near - log_mass)) / sigma
    return log_density, side * slope


# -- mixtures of Gaussians -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of isotropic Gaussians.

    Args:
        centres: Shape (k, d).
        std: Standard deviation of every component, or of each, shape (k,); > 0.
        weights: Shape (k,), >= 0; normalised. Default: equal.

    Raises:
        ValueError: If shapes or ranges do not fit.
    """

    centres: Tensor
    std: float | Tensor = 0.1
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        """Check, and spread the settings over the components."""
        k = len(self.centres)
        std = torch.as_tensor(self.std, dtype=torch.float64).expand(k)
        weights = torch.ones(k) if self.weights is None else self.weights
        if self.centres.ndim != 2 or weights.shape != (k,) or not bool((std > 0).all()):
            raise ValueError("Mixture needs centres (k, d), weights (k,) and positive standard deviations")
        if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < math.inf:
            raise ValueError("Mixture needs weights >= 0, not all of them 0")
        object.__setattr__(self, "centres", self.centres.double())
        object.__setattr__(self, "std", std)
        object.__setattr__(self, "weights", weights.double() / weights.double().sum())

    @classmethod
    def ring(cls, count: int = 8, radius: float = 0.8, std: float = 0.07) -> Mixture:
        """``count`` >= 1 equal Gaussians in the plane, evenly spaced on a circle; by default 8.7 deviations apart."""
        angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        return cls(radius * torch.stack([angle.cos(), angle.sin()], 1), std)

    @classmethod
    def grid(cls, side: int = 3, half_width: float = 0.8, std: float = 0.08) -> Mixture:
        """``side`` x ``side`` equal Gaussians in the plane, from -``half_width`` to ``half_width``."""
        line = torch.linspace(-half_width, half_width, side, dtype=torch.float64)
        return cls(torch.cartesian_prod(line, line), std)

    @property
    def shape(self) -> tuple[int, ...]:
        """(d,)."""
        return (self.centres.shape[1],)

    def _parts(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.std, Tensor)
        assert self.weights is not None
        return self.std, self.weights

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent draws, float32, shape (n, d)."""
        std, weights = self._parts()
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        return (self.centres[which] + std[which, None] * noise).float()

    def with_gaussian_dirt(self, sigma: float, fraction: float) -> Mixture:
        """The law of the training data when ``fraction`` of it carries Gaussian noise ``sigma``: again a mixture."""
        std, weights = self._parts()
        blurred = (std.square() + sigma**2).sqrt()
        both = torch.cat([(1 - fraction) * weights, fraction * weights])
        return Mixture(self.centres.repeat(2, 1), torch.cat([std, blurred]), both)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest centre and its number, (n, d) -> (n,) and (n,)."""
        distance, which = torch.cdist(x.double(), self.centres).min(1)
        return distance, which

    def distance_to_support(self, x: Tensor) -> Tensor:
        """Distance to the nearest ball of four standard deviations about a centre, (n, d) -> (n,).

        In two dimensions a ball leaves out 3.4 draws in 10,000.
        """
        std, _ = self._parts()
        return (torch.cdist(x.double(), self.centres) - 4 * std).clamp(min=0).min(1).values

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Log density of ``alpha x0 + sigma eps``, (n, d) -> (n,), float64."""
        return torch.logsumexp(self._log_parts(x, alpha, sigma)[0], 1)

    def score(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Gradient of :meth:`log_density`, (n, d) -> (n, d), float64: pulls to the centres, weighted by their share."""
        log_parts, variance = self._log_parts(x, alpha, sigma)
        share = log_parts.softmax(1) / variance
        return share @ (alpha * self.centres) - share.sum(1, keepdim=True) * x.double()

    def _log_parts(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        std, weights = self._parts()
        variance = (alpha * std).square() + sigma**2
        distance = (x.double()[:, None] - alpha * self.centres).square().sum(2)
        d = self.shape[0]
        return weights.log() - 0.5 * distance / variance - 0.5 * d * torch.log(2 * math.pi * variance), variance


# -- Gaussians, and the span of images -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """A centred Gaussian of any spectrum, in a random or the standard basis; ``linear.py`` has its closed forms.

    Args:
        variances: Eigenvalues of the covariance, shape (d,), d in 2 .. 64, each >= 0, not all 0.
        basis: Eigenvectors as columns, orthogonal, shape (d, d). Default: the standard basis.

    Raises:
        ValueError: If shapes or ranges do not fit.
    """

    variances: Tensor
    basis: Tensor | None = None

    def __post_init__(self) -> None:
        """Check once."""
        v = self.variances
        if v.ndim != 1 or not 2 <= len(v) <= 64 or not bool((v >= 0).all()) or not 0 < float(v.sum()) < math.inf:
            raise ValueError("LinearGaussian needs 2 to 64 variances >= 0, not all of them 0")
        basis = torch.eye(len(v), dtype=torch.float64) if self.basis is None else self.basis.double()
        if basis.shape != (len(v), len(v)) or not torch.allclose(basis.T @ basis, torch.eye(len(v)).double()):
            raise ValueError(f"LinearGaussian needs an orthogonal basis of shape ({len(v)}, {len(v)})")
        object.__setattr__(self, "variances", v.double())
        object.__setattr__(self, "basis", basis)

    @property
    def shape(self) -> tuple[int, ...]:
        """(d,)."""
        return (len(self.variances),)

    @property
    def covariance(self) -> Tensor:
        """Sigma, float64, shape (d, d)."""
        assert self.basis is not None
        return (self.basis * self.variances) @ self.basis.T

    def coordinates(self, x: Tensor) -> Tensor:
        """``x``, (n, d), in the eigenbasis, float64."""
        assert self.basis is not None
        return x.double() @ self.basis

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent draws, float32, shape (n, d)."""
        assert self.basis is not None
        z = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        return (z * self.variances.sqrt() @ self.basis.T).float()

    def distance_to_support(self, x: Tensor) -> Tensor:
        """Length of the part of ``x`` along directions of no variance, (n, d) -> (n,); 0 if there are none."""
        distance: Tensor = torch.linalg.vector_norm(self.coordinates(x)[:, self.variances == 0], dim=1)
        return distance

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Log density of ``alpha x0 + sigma eps``, (n, d) -> (n,), float64.

        Raises:
            ValueError: If a direction then has no variance at all.
        """
        variance = self._variance(alpha, sigma)
        return -0.5 * (self.coordinates(x).square() / variance + torch.log(2 * math.pi * variance)).sum(1)

    def score(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Gradient of :meth:`log_density`, (n, d) -> (n, d), float64.

        Raises:
            ValueError: If a direction then has no variance at all.
        """
        assert self.basis is not None
        return -(self.coordinates(x) / self._variance(alpha, sigma)) @ self.basis.T

    def _variance(self, alpha: float, sigma: float) -> Tensor:
        variance = alpha**2 * self.variances + sigma**2
        if not bool((variance > 0).all()):
            raise ValueError("a Gaussian with a direction of no variance has a density only with some noise: sigma > 0")
        return variance


@dataclass(frozen=True, eq=False)
class Subspace:
    """Images projected on their leading principal components: a law on a known linear subspace of pixel space.

    A draw is a projected image, drawn to the mean by ``sqrt(1 - h^2)``, plus h times a Gaussian of the law's own
    covariance. So the mean, the ``k``-dimensional support and the covariance are those of the projected images whatever
    the smoothing h, and known exactly; so is the density at every noise level. Dirt is added in full pixel space.

    Args:
        originals: Images in [-1, 1], shape (N, C, H, W), N > k.
        components: k in 1 .. C H W - 1.
        smoothing: h in [0, 1]. At 0 the law is the uniform one on the projected images, points that a network has to
            remember; at 1 it is Gaussian.

    Raises:
        ValueError: If ``components`` or ``smoothing`` does not fit.

    Source: the linearised butterflies of Briglia et al. (2025); the smoothing is the shrunk kernel estimate of
    Silverman (1986, section 6.4.1).
    """

    originals: Tensor
    components: int
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Find the subspace."""
        flat = self.originals.flatten(1).double()
        if self.originals.ndim != 4 or not 1 <= self.components < min(flat.shape):
            raise ValueError(
                f"components must be in 1 .. {min(flat.shape) - 1} for {len(flat)} images of {flat.shape[1]} values, "
                f"got {self.components}"
            )
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {self.smoothing}")
        mean = flat.mean(0)
        _, singular, axes = torch.linalg.svd(flat - mean, full_matrices=False)
        basis = axes[: self.components].T.contiguous()
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "basis", basis)
        object.__setattr__(self, "variances", singular[: self.components].square() / len(flat))
        object.__setattr__(self, "explained", float(self.variances.sum() / (singular.square().sum() / len(flat))))
        projected = mean + (flat - mean) @ basis @ basis.T
        object.__setattr__(self, "images", projected.float().reshape(self.originals.shape))

    mean: Tensor = None  # type: ignore[assignment]  # set above: (D,), float64
    basis: Tensor = None  # type: ignore[assignment]  # (D, k), orthonormal columns, float64
    variances: Tensor = None  # type: ignore[assignment]  # (k,), descending, float64: eigenvalues of the covariance
    images: Tensor = None  # type: ignore[assignment]  # (N, C, H, W), float32: the projected originals
    explained: float = 0.0  # share of the original images' variance that the subspace holds

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.originals.shape[1:])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent draws (of images: with replacement), float32, shape (n, C, H, W)."""
        images = self.images[torch.randint(len(self.images), (n,), generator=generator)]
        if not self.smoothing:
            return images
        noise = torch.randn(n, self.components, generator=generator, dtype=torch.float64) * self.variances.sqrt()
        c = (1 - self.smoothing**2) ** 0.5 * self.coordinates(images) + self.smoothing * noise
        drawn: Tensor = (self.mean + c @ self.basis.T).float().reshape(images.shape)
        return drawn

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Log density of ``alpha x0 + sigma eps``, (n, C, H, W) or flat -> (n,), float64.

        Within the subspace a mixture of N Gaussians of one covariance, ``alpha^2 h^2 S + sigma^2``, across it noise.

        Raises:
            ValueError: If ``sigma`` is 0: the clean law, on a subspace, has no density.
        """
        inside, outside, log_parts, variance = self._noisy(x, alpha, sigma)
        off = outside.shape[1] - inside.shape[1]
        within: Tensor = torch.logsumexp(log_parts, 1) - 0.5 * torch.log(2 * math.pi * variance).sum()
        across = -0.5 * outside.square().sum(1) / sigma**2 - 0.5 * off * math.log(2 * math.pi * sigma**2)
        return within + across

    def score(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Gradient of :meth:`log_density`, of the shape of ``x``, float64.

        Raises:
            ValueError: If ``sigma`` is 0.
        """
        inside, outside, log_parts, variance = self._noisy(x, alpha, sigma)
        along = (log_parts.softmax(1) @ self._centres(alpha) - inside) / variance
        score: Tensor = along @ self.basis.T - outside / sigma**2
        return score.reshape(x.shape)

    def _centres(self, alpha: float) -> Tensor:
        shrunk: Tensor = alpha * (1 - self.smoothing**2) ** 0.5 * self.coordinates(self.images)
        return shrunk

    def _noisy(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Coordinates within and rest across, (n, k) and (n, D); log shares of the images, (n, N); variance, (k,)."""
        if not sigma > 0:
            raise ValueError("the law of a subspace has a density only with some noise: sigma > 0")
        flat = x.flatten(1).double() - alpha * self.mean
        inside = flat @ self.basis
        variance = (alpha * self.smoothing) ** 2 * self.variances + sigma**2
        centres = self._centres(alpha) / variance.sqrt()
        white = inside / variance.sqrt()
        distance = white.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * white @ centres.T
        return inside, flat - inside @ self.basis.T, -0.5 * distance - math.log(len(centres)), variance

    def coordinates(self, x: Tensor) -> Tensor:
        """Coordinates of the projection about the mean, (n, C, H, W) -> (n, k), float64."""
        return (x.flatten(1).double() - self.mean) @ self.basis

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the subspace, float64, of the shape of ``x``."""
        return (self.mean + self.coordinates(x) @ self.basis.T).reshape(x.shape)

    def residual(self, x: Tensor) -> Tensor:
        """Mean squared distance per pixel to the subspace, (n, C, H, W) -> (n,), float64."""
        return (x.double() - self.project(x)).flatten(1).square().mean(1)

    def distance_to_support(self, x: Tensor) -> Tensor:
        """Distance to the subspace, (n, C, H, W) -> (n,), float64."""
        distance: Tensor = torch.linalg.vector_norm((x.double() - self.project(x)).flatten(1), dim=1)
        return distance

    def psnr(self, x: Tensor) -> Tensor:
        """Peak signal-to-noise ratio of ``x`` against its projection, in dB, peak 2, (n, C, H, W) -> (n,)."""
        return 10 * torch.log10(4 / self.residual(x).clamp(min=1e-12))

    def frechet(self, x: Tensor) -> float:
        """Frechet distance of ``x`` to the law's exact mean and covariance, in squared pixel units.

        ``|m - m'|^2 + tr S + tr S' - 2 tr (S^1/2 S' S^1/2)^1/2``, computed in the k dimensions where S is not 0.

        Source: Dowson and Landau (1982), Eq. 2; docs/explanation/theory.md T11 for the way the root is taken.
        """
        flat = x.flatten(1).double()
        centred = flat - flat.mean(0)
        spread = centred.square().sum() / (len(flat) - 1)
        root = self.variances.sqrt()
        within = (centred @ self.basis).T.cov()
        cross = torch.linalg.eigvalsh(root[:, None] * within * root).clamp(min=0).sqrt().sum()
        return float((flat.mean(0) - self.mean).square().sum() + spread + self.variances.sum() - 2 * cross)
