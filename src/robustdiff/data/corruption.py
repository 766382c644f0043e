"""Dirt for experiments: seeded, frozen per image, and a pure function of (seed, place in the list, image index).

Written on the command line as ``gaussian:sigma=0.2,fraction=0.9``. The same image gets the same dirt every time it is
looked at, whatever the batch, the order of the calls or the number of processes. Neither the parameters nor the
fraction enter the draws, so a stronger setting is the same dirt made stronger, and the images hit at ``fraction=0.1``
are among those hit at ``fraction=0.9``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

from robustdiff.utils.errors import UsageError
from robustdiff.utils.seeds import derive_seed

if TYPE_CHECKING:  # the command line prints help_text() and parses specs before it pays for importing torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """A setting of a corruption: its default, its range [low, high] or its choices, and what it means."""

    default: float | int | str
    meaning: str
    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        return f"{kind} in [{self.low:g}, {self.high:g}]"

    def read(self, value: object) -> float | int | str:
        """``value`` (a number, or its text) as this parameter's type.

        Raises:
            ValueError: If it is not a finite number of the right type in range, or not one of the choices.
        """
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"must be {self.allowed}, got {value!r}{_did_you_mean(str(value), self.choices)}")
            return str(value)
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        whole = isinstance(self.default, int)
        if not self.low <= number <= self.high or (whole and not number.is_integer()):  # not-a-number fails as well
            raise ValueError(f"must be {self.allowed}, got {value!r}")
        return int(number) if whole else number


FRACTION = Parameter(1.0, "probability that an image is hit, for each image independently")

KINDS: Mapping[str, tuple[str, Mapping[str, Parameter]]] = {
    "gaussian": (
        "additive Gaussian noise, not clipped",
        {"sigma": Parameter(0.2, "standard deviation, pixels being in [-1, 1]", high=100)},
    ),
    "impulse": (
        "salt and pepper: pixels set to -1 or +1, all channels together",
        {"amount": Parameter(0.05, "probability per pixel")},
    ),
    "outlier": (
        "the whole image replaced by something that is none of the data",
        {
            "source": Parameter(
                "uniform",
                "uniform noise, one random colour, or a checkerboard of two random colours",
                choices=("uniform", "constant", "checker"),
            )
        },
    ),
    "missing": (
        "pixels lost, all channels together",
        {
            "amount": Parameter(0.3, "probability per pixel, or per block"),
            "value": Parameter(0.0, "what a lost pixel becomes; 0 is mid grey", low=-1),
            "block": Parameter(1, "edge in pixels of the squares that are lost together", low=1, high=65536),
        },
    ),
    "blur": ("Gaussian blur", {"radius": Parameter(1.0, "standard deviation in pixels", high=1000)}),
    "jpeg": (
        "JPEG compression of the clipped 8-bit image",
        {"quality": Parameter(30, "Pillow's quality", low=1, high=95)},
    ),
}
"""Kind -> (meaning, parameters by name). Every kind also takes ``fraction``."""


def help_text() -> str:
    """Every kind and parameter with its default and range, one per line; needs no torch."""
    lines = ["kind:parameter=value,...  for example  gaussian:sigma=0.2,fraction=0.9"]
    for kind, (meaning, parameters) in KINDS.items():
        lines.append(f"  {kind}: {meaning}")
        lines += [f"    {name}={p.default}: {p.meaning}; {p.allowed}" for name, p in parameters.items()]
    lines.append(f"  every kind: fraction={FRACTION.default:g}: {FRACTION.meaning}; {FRACTION.allowed}")
    return "\n".join(lines)


def is_hit(fraction: float, seed: int, position: int, kind: str, index: int) -> bool:
    """Whether an image is hit: a uniform number from (seed, position, kind, index) against ``fraction``."""
    bits = derive_seed("corruption hits", seed, position, kind, index) >> 10
    return bits / 2**53 < fraction  # 53 bits: the quotient is exact and always below 1


@dataclass(frozen=True)
class Corruption:
    """One kind of dirt with its settings; parameters left out take their defaults.

    Args:
        kind: A key of :data:`KINDS`.
        parameters: Values by name; numbers may be given as text.
        fraction: Probability in [0, 1] that an image is hit.

    Raises:
        ValueError: In one line, for an unknown kind or parameter or a value out of range.
    """

    kind: str
    parameters: Mapping[str, float | int | str] = field(default_factory=dict, hash=False)
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check everything once and fill in the defaults."""
        if self.kind not in KINDS:
            hint = _did_you_mean(self.kind, KINDS)
            raise ValueError(f"unknown corruption {self.kind!r}{hint}; kinds: {', '.join(KINDS)}")
        known = KINDS[self.kind][1]
        for name in self.parameters:
            if name not in known:
                names = (*known, "fraction")
                hint = f"{_did_you_mean(name, names)}; parameters: {', '.join(names)}"
                raise ValueError(f"corruption {self.kind} has no parameter {name!r}{hint}")
        values = {name: self._read(name, p, self.parameters.get(name, p.default)) for name, p in known.items()}
        object.__setattr__(self, "parameters", values)
        object.__setattr__(self, "fraction", self._read("fraction", FRACTION, self.fraction))

    def _read(self, name: str, parameter: Parameter, value: object) -> float | int | str:
        try:
            return parameter.read(value)
        except ValueError as error:
            raise ValueError(f"corruption {self.kind}: {name} {error}") from None

    @classmethod
    def parse(cls, spec: str) -> Corruption:
        """Read ``kind`` or ``kind:name=value,name=value``.

        Args:
            spec: For example ``gaussian:sigma=0.2,fraction=0.9``; the order of the parameters is free.

        Raises:
            ValueError: In one line: what is wrong, what is allowed, and the nearest name for a misspelt one.
        """
        kind, colon, rest = spec.partition(":")
        values: dict[str, float | int | str] = {}
        for item in rest.split(",") if colon else ():
            name, equals, value = (part.strip() for part in item.partition("="))
            if not (name and equals and value):
                raise ValueError(f"corruption {spec!r}: expected name=value, got {item!r}; write kind:name=value,...")
            if name in values:
                raise ValueError(f"corruption {spec!r}: {name} is given twice")
            values[name] = value
        fraction = values.pop("fraction", 1.0)
        return cls(kind.strip(), values, fraction)  # type: ignore[arg-type]  # __post_init__ reads text

    def __str__(self) -> str:
        """The canonical spec, every parameter written out; it parses back to an equal object."""
        values = {**self.parameters, "fraction": self.fraction}
        return f"{self.kind}:" + ",".join(f"{name}={str(v).removesuffix('.0')}" for name, v in values.items())

    def hits(self, seed: int, index: int, position: int = 0) -> bool:
        """Whether image ``index`` is hit: a uniform number from (seed, position, kind, index) against ``fraction``.

        Args:
            seed: Seed of the experiment.
            index: Index of the image in its data set.
            position: Place of this corruption in the list, so that two of a kind are independent.
        """
        return is_hit(self.fraction, seed, position, self.kind, index)

    def apply(self, x0: Tensor, seed: int, index: int, position: int = 0) -> Tensor:
        """The image with this dirt on it, if :meth:`hits`, else ``x0`` itself. ``x0`` is never mutated.

        Drawn in float32 on the CPU, so that precision and device do not change the dirt.

        Args:
            x0: Shape (C, H, W), floating, in [-1, 1] (or beyond, after unclipped noise).
            seed: As in :meth:`hits`.
            index: As in :meth:`hits`.
            position: As in :meth:`hits`.

        Raises:
            ValueError: If ``x0`` is not one floating-point image, or has neither 1 nor 3 channels (``jpeg`` only).
        """
        if x0.ndim != 3 or not x0.is_floating_point():
            raise ValueError(f"expected one floating-point image (C, H, W), got {tuple(x0.shape)} of {x0.dtype}")
        if not self.hits(seed, index, position):
            return x0
        import torch

        generator = torch.Generator().manual_seed(derive_seed("corruption draws", seed, position, self.kind, index))
        return _apply(self.kind, self.parameters, x0, generator)


def corrupt(x0: Tensor, corruptions: Sequence[Corruption], seed: int, index: int) -> tuple[Tensor, tuple[str, ...]]:
    """Apply several corruptions in their order.

    Args:
        x0: Shape (C, H, W), floating, in [-1, 1].
        corruptions: The list; a place in it is that corruption's ``position``.
        seed: Seed of the experiment.
        index: Index of the image in its data set.

    Returns:
        The image, a new tensor if anything hit, and the kinds that hit, in order.
    """
    hit = []
    for position, corruption in enumerate(corruptions):
        if corruption.hits(seed, index, position):
            x0 = corruption.apply(x0, seed, index, position)
            hit.append(corruption.kind)
    return x0, tuple(hit)


# -- what each kind does -----------------------------------------------------------------------------


def _apply(kind: str, p: Mapping[str, float | int | str], x0: Tensor, generator: torch.Generator) -> Tensor:
    import torch

    channels, height, width = x0.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if kind == "gaussian":
        return x0 + float(p["sigma"]) * torch.randn(x0.shape, generator=generator).to(x0)
    if kind == "impulse":
        u, amount = uniform(height, width).to(x0.device), float(p["amount"])
        return torch.where(u < amount / 2, -torch.ones_like(x0), torch.where(u < amount, torch.ones_like(x0), x0))
    if kind == "outlier":
        if p["source"] == "uniform":
            image = uniform(channels, height, width)
        elif p["source"] == "constant":
            image = uniform(channels, 1, 1).expand(channels, height, width)
        else:
            edge = max(1, min(height, width) // 4)
            odd = (torch.arange(height)[:, None] // edge + torch.arange(width) // edge) % 2
            image = torch.where(odd == 1, uniform(channels, 1, 1), uniform(channels, 1, 1))
        return (2 * image - 1).to(x0)
    if kind == "missing":
        block = int(p["block"])
        cells = uniform(-(-height // block), -(-width // block)) < float(p["amount"])
        rows, columns = torch.arange(height) // block, torch.arange(width) // block
        lost = cells[rows[:, None], columns].to(x0.device)
        return torch.where(lost, torch.full_like(x0, float(p["value"])), x0)
    if kind == "blur":
        radius = float(p["radius"])
        return _blur_matrix(height, radius).to(x0) @ x0 @ _blur_matrix(width, radius).to(x0).T
    return _jpeg(x0, int(p["quality"]))


def _blur_matrix(size: int, radius: float) -> Tensor:
    """One axis of ``scipy.ndimage.gaussian_filter(mode="reflect", truncate=4)`` as a (size, size) matrix.

    Reflection repeats the edge pixel (d c b a | a b c d | d c b a): rows and columns both sum to 1, so the mean
    brightness of an image is kept exactly. A matrix, because it reflects any number of times in a small image.
    """
    import torch

    reach = int(4 * radius + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / max(radius, 1e-12)) ** 2)
    source = (torch.arange(size)[:, None] + offsets) % (2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))


def _jpeg(x0: Tensor, quality: int) -> Tensor:
    """Through Pillow's encoder with its own chroma subsampling (4:2:0)."""
    import numpy as np
    import torch
    from PIL import Image

    from robustdiff.utils.images import from_uint8, to_uint8

    if x0.shape[0] not in (1, 3):
        raise ValueError(f"corruption jpeg needs 1 or 3 channels, got {x0.shape[0]}")
    pixels = to_uint8(x0).permute(1, 2, 0).cpu().numpy()
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if x0.shape[0] == 1 else pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        decoded = torch.from_numpy(np.array(image)).reshape(pixels.shape)
    return from_uint8(decoded.permute(2, 0, 1)).to(x0)


def _did_you_mean(word: str, names: Sequence[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def check_corruptions(specs: tuple[str, ...]) -> tuple[Corruption, ...]:
    """The parsed ``corrupt`` specs.

    Raises:
        UsageError: With the flag's name, if one cannot be parsed.
    """
    try:
        return tuple(Corruption.parse(spec) for spec in specs)
    except ValueError as error:
        raise UsageError(f"`corrupt` {error}") from None
