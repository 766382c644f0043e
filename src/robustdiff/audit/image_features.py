"""Plain statistics of single images, by which a damaged one differs from what it was.

Nothing here is a decision. Each statistic is something that one kind of damage changes and content changes less:
differences at three scales, how they agree with their neighbours, what a second blur or a second enlargement still
takes away, the grid of JPEG, flat patches, lonely pixels, grey levels, the spectrum. Logarithms, so that factors count.

Sources: second blurs and shrinking as signs of a first one: Crete et al. (2007); the 8 x 8 grid: Fan and de Queiroz
(2003); flat patches: Pyatykh et al. (2013); the collection and its use here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SIDE = 16
"""Edge in pixels of the smallest images that have these statistics."""
QUANTILES = (0.25, 0.5, 0.8, 0.95, 0.995)
BINS, STEPS_PER_ROOT = 384, 16
"""Sizes of differences are counted by their square roots, finely near 0."""
BLURS = (0.5, 0.8, 1.2, 1.8, 2.7)
FACTORS = (1.5, 2.0, 3.0, 4.0)
ANGLES = 8
COLOURS = 4099
"""Colours that are told apart, by a remainder."""
EDGES = (0.03, 0.08, 0.15, 0.22, 0.3, 0.37, 0.43, 0.5, 0.71)
"""Borders of the bands of the spectrum, in periods per pixel."""
LAGS = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 3), (3, 0), (0, 4), (4, 0))


@torch.no_grad()
def image_features(images: Tensor) -> Tensor:
    """Statistics of images.

    Args:
        images: uint8, shape (N, C, H, W), C 1 or 3, edges of :data:`LEAST_SIDE` pixels at least.

    Returns:
        float32, shape (N, F), finite; F depends on C and on the edges.
    """
    x = images.float()
    y = x if x.shape[1] == 1 else (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    parts = [
        *_differences(y),
        *_spectrum(y),
        *_blurred_again(y),
        *_enlarged_again(y),
        *_edges_and_flats(x, y),
        *_grid(y),
        *_flat_patches(y),
        *_levels(images),
    ]
    if x.shape[1] == 3:
        parts += [*_colour(x)]
    columns = [part.reshape(len(x), -1) for part in parts]
    return torch.cat(columns, 1).nan_to_num(0.0, 0.0, 0.0).float()


# -- helpers ---------------------------------------------------------------------------------------------


def _log(x: Tensor, floor: float = 0.05) -> Tensor:
    return torch.log(x + floor)


def _rms(b: Tensor) -> Tensor:
    return b.square().flatten(1).mean(1).sqrt()


def _quantiles(b: Tensor, shares: tuple[float, ...] = QUANTILES) -> Tensor:
    """Logarithms of quantiles of sizes, (n, ...) -> (n, shares): counted, which is faster than sorted."""
    n = len(b)
    place = (b.abs().flatten(1).sqrt_() * STEPS_PER_ROOT).long().clamp_(max=BINS - 1)
    place += torch.arange(n)[:, None] * BINS
    count = torch.bincount(place.flatten(), minlength=n * BINS).view(n, BINS).cumsum(1)
    wanted = torch.tensor(shares) * place.shape[1]
    found = torch.searchsorted(count, wanted.expand(n, -1).floor().long() + 1).clamp(max=BINS - 1)
    return _log((found / STEPS_PER_ROOT).square())


def _gradients(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[..., 1:] - z[..., :-1], z[..., 1:, :] - z[..., :-1, :]


def _highest(x: Tensor, reach: int) -> Tensor:
    """Largest value in the square of ``2 * reach + 1`` pixels around each; beyond the border is the border."""
    for axis in (2, 3):
        size, width = x.shape[axis], 1
        pad = [0, 0, 0, 0]
        pad[2 * (3 - axis)] = pad[2 * (3 - axis) + 1] = reach
        x = F.pad(x, pad, mode="replicate")
        while width < 2 * reach + 1:
            step = min(width, 2 * reach + 1 - width)
            length = x.shape[axis] - step
            x = torch.maximum(x.narrow(axis, 0, length), x.narrow(axis, step, length))
            width += step
        x = x.narrow(axis, 0, size)
    return x


def _median_of_nine(x: Tensor) -> Tensor:
    """Median of the 3 x 3 pixels around each: of the highest low, the middle middle and the lowest high of columns."""
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    a, b, c = p[..., :-2, :], p[..., 1:-1, :], p[..., 2:, :]
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    middle, high = torch.minimum(high, c), torch.maximum(high, c)
    low, middle = torch.minimum(low, middle), torch.maximum(low, middle)
    lows = torch.maximum(torch.maximum(low[..., :-2], low[..., 1:-1]), low[..., 2:])
    highs = torch.minimum(torch.minimum(high[..., :-2], high[..., 1:-1]), high[..., 2:])
    return _median(_median(*(middle[..., i : middle.shape[-1] - 2 + i] for i in range(3))), lows, highs)


def _median(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


# -- the statistics --------------------------------------------------------------------------------------


def _differences(y: Tensor) -> Iterator[Tensor]:
    """At three scales, and how the energies of their kinds stand to each other."""
    z = y
    for _ in range(3):
        if min(z.shape[2:]) < 8:
            return
        dx, dy = _gradients(z)
        dd = dx[..., 1:, :] - dx[..., :-1, :]
        xx, yy = z[..., 2:] - 2 * z[..., 1:-1] + z[..., :-2], z[..., 2:, :] - 2 * z[..., 1:-1, :] + z[..., :-2, :]
        rms = {name: _log(_rms(b)) for name, b in (("x", dx), ("y", dy), ("d", dd), ("xx", xx), ("yy", yy))}
        yield torch.stack([rms["x"], rms["y"], rms["d"]], 1)
        for b in (dx, dy, dd):
            yield _quantiles(b)
        yield rms["xx"] - rms["x"]
        yield rms["yy"] - rms["y"]
        yield rms["d"] - 0.5 * (rms["x"] + rms["y"])
        for b in (dd, xx, yy):  # how heavy the tails are
            yield _log(b.abs().flatten(1).mean(1)) - _log(_rms(b))
        z = F.avg_pool2d(z, 2)


@lru_cache(8)
def _of_the_spectrum(height: int, width: int) -> tuple[Tensor, Tensor, int, int]:
    """Window; weights, (H W, K), of what is linear in the power spectrum; how many are bands, and filtered energies."""
    v, u = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    radius = torch.hypot(v, u)
    bands = [((radius >= a) & (radius < b)).float() for a, b in pairwise(EDGES)]
    weights = [band / band.sum().clamp(min=1) for band in bands]
    lines = []
    for length in (5, 9, 13):
        for step in range(ANGLES):
            angle = math.pi * step / ANGLES
            along = u * math.cos(angle) + v * math.sin(angle)
            lines.append((1 - torch.sinc(length * along)).square())
    weights += lines
    x, y = (2 - 2 * torch.cos(2 * math.pi * f) for f in (u, v))
    for high in (x * y, x.square() + 0 * y, y.square() + 0 * x):
        weights.append(high)
        weights += [high * torch.cos(2 * math.pi * (i * v + j * u)) for i, j in LAGS]
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)
    return window, torch.stack([w.expand(height, width).flatten() for w in weights], 1), len(bands), len(lines)


def _spectrum(y: Tensor) -> Iterator[Tensor]:
    """Bands; energy that a blur along a line takes away; whether the finest detail is white, correlated, or smooth."""
    height, width = y.shape[2:]
    window, weights, bands, lines = _of_the_spectrum(height, width)
    centred = (y - y.mean((2, 3), keepdim=True))[:, 0] * window
    power = torch.fft.fft2(centred).abs().square() / (height * width) / window.square().mean()
    sums = power.flatten(1) @ weights
    band = _log(sums[:, :bands], 0.01)
    yield band
    yield band.diff(dim=1)
    pixels = height * width
    lost = _log((sums[:, bands : bands + lines] / pixels).clamp(min=0).sqrt()).view(len(y), -1, ANGLES)
    across = lost.roll(ANGLES // 2, 2)
    order = lost.sort(2).values
    yield order[:, :, [0, 1, -1]]
    yield order[:, :, -1] - order[:, :, 0]
    yield (across - lost).amax(2)
    for group in sums[:, bands + lines :].split(1 + len(LAGS), 1):
        yield group[:, 1:] / (group[:, :1] + 0.05 * pixels)


@lru_cache(16)
def _blur_matrix(size: int, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5) or 1
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / 2 / sigma**2)
    whole = F.pad(torch.eye(size)[None], (reach, reach), mode="replicate")[0]
    return F.conv1d(whole[:, None], (kernel / kernel.sum()).view(1, 1, -1))[:, 0].T.contiguous()


def _blurred_again(y: Tensor) -> Iterator[Tensor]:
    """What is blurred already loses less."""

    def sharpness(z: Tensor) -> tuple[Tensor, Tensor]:
        a, b = _gradients(z)
        both = torch.cat([a.flatten(1), b.flatten(1)], 1)
        return _log(both.abs().mean(1), 0.01), _quantiles(both, (0.9, 0.98))

    mean, tail = sharpness(y)
    for sigma in BLURS:
        rows, columns = (_blur_matrix(size, sigma) for size in y.shape[2:])
        m, t = sharpness(rows @ y @ columns.T)
        yield m - mean
        yield t - tail


@lru_cache(64)
def _resize_matrix(size: int, factor: float, mode: str) -> Tensor:
    """Shrinking and enlarging again, along one axis."""
    unit = torch.eye(size)[:, None, :, None].expand(-1, 1, -1, 4)
    small = F.interpolate(unit, size=(max(4, int(size / factor)), 4), mode=mode, antialias=True, align_corners=False)
    return F.interpolate(small, size=(size, 4), mode=mode, align_corners=False)[:, 0, :, 0].T.contiguous()


def _enlarged_again(y: Tensor) -> Iterator[Tensor]:
    """What was enlarged already loses less."""
    deviation = _log(y.flatten(1).std(1), 1)
    for factor in FACTORS:
        for mode in ("bilinear", "bicubic"):
            rows, columns = (_resize_matrix(size, factor, mode) for size in y.shape[2:])
            yield _log(_rms(y - rows @ y @ columns.T)) - deviation


def _edges_and_flats(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Widths of edges; lonely pixels; pixels that are exactly alike; strokes of black or white."""
    high, low = _highest(y, 3), -_highest(-y, 3)
    spread = high - low
    gx, gy = _gradients(y)
    steep = _highest(torch.maximum(F.pad(gx.abs(), (0, 1)), F.pad(gy.abs(), (0, 0, 0, 1))), 3)
    ratio, edge = (steep / (spread + 4)).flatten(1), spread.flatten(1)
    least = edge.kthvalue(int(0.7 * edge.shape[1]) + 1, dim=1, keepdim=True).values
    top = torch.where(edge >= least, ratio, torch.nan).sort(1).values
    count = (~top.isnan()).sum(1, keepdim=True)
    for share in (0.1, 0.5, 0.9, 0.99):
        yield top.gather(1, (share * (count - 1)).long())

    lonely = y - _median_of_nine(y)
    yield _quantiles(lonely, (0.5, 0.9, 0.98, 0.995))
    dark, light = x.amax(1, keepdim=True) <= 3, x.amin(1, keepdim=True) >= 252
    for extreme in (dark & (lonely < -24), light & (lonely > 24)):
        yield _log(extreme.float().mean((1, 2, 3)), 0.001)
    for size in (25, 40, 80):
        yield _log((lonely.abs() > size).float().mean((1, 2, 3)), 0.001)

    same = [(step == 0).all(1, keepdim=True) for step in _gradients(x)]
    for one in same:
        yield one.float().mean((1, 2, 3))
    flat = F.pad((same[0][..., :-1, :] & same[0][..., 1:, :] & same[1][..., :-1]).float(), (0, 1, 0, 1))
    for reach in (0, 1, 3, 6):
        yield (-_highest(-flat, reach)).mean((1, 2, 3)) if reach else flat.mean((1, 2, 3))
    yield from _commonest_colour(x, torch.ones_like(flat, dtype=torch.bool)[:, 0])
    steep_here = torch.maximum(F.pad(gx.abs(), (0, 1)), F.pad(gx.abs(), (1, 0)))
    wide = max(1, min(y.shape[2:]) // 32)  # strokes of letters are narrower
    broad = _highest(-_highest(-flat, wide), wide + 1) > 0
    yield from _commonest_colour(x, ((steep_here >= 40) & ~broad)[:, 0])
    yield y.mean((1, 2, 3)) / 50
    yield _log(y.flatten(1).std(1), 1)
    yield _log((y <= 2).float().mean((1, 2, 3)), 0.002)
    yield _log((y >= 253).float().mean((1, 2, 3)), 0.002)


def _commonest_colour(x: Tensor, where: Tensor) -> Iterator[Tensor]:
    """Of some pixels, bool, (n, H, W): how many have exactly the same colour, and the box that these fill.

    Rectangles and captions are of one colour; of pictures, what is blown out or black is.
    """
    n, _, height, width = x.shape
    factors = x.new_tensor([1.0, 37.0, 1369.0])[: x.shape[1], None, None]
    name = (x * factors).sum(1).long() % COLOURS
    place = (name + torch.arange(n)[:, None, None] * COLOURS)[where]
    count = torch.bincount(place, minlength=n * COLOURS).view(n, COLOURS)
    for colour in count.topk(2, 1).indices.T:
        here = (name == colour[:, None, None]) & where
        rows, columns = here.any(2), here.any(1)
        box = [(one.cummax(1).values & one.flip(1).cummax(1).values.flip(1)).sum(1) for one in (rows, columns)]
        size = here.flatten(1).sum(1)
        yield _log(size / (height * width), 0.001)
        yield size / (box[0] * box[1]).clamp(min=1)
        yield box[0] / height
        yield box[1] / width
        for axis in (1, 2):  # how often lines of pixels enter and leave it, where they do most
            often = (here.diff(dim=axis).sum(axis)).float()
            yield _log(F.avg_pool1d(often[:, None], 5, 1, 2).amax((1, 2)), 0.5)
        borders = [(here.diff(dim=axis)).sum(3 - axis).float() for axis in (1, 2)]  # along each line between pixels
        longest = [one.topk(2, 1).values for one in borders]
        for one in longest:
            yield one / size[:, None].sqrt().clamp(min=1)
        yield sum(one.sum(1) for one in longest) / sum(one.sum(1) for one in borders).clamp(min=1)


@lru_cache(1)
def _dct() -> Tensor:
    k = torch.arange(8.0)
    basis = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


def _blocks(v: Tensor) -> Tensor:
    """Coefficients of the cosine transform of blocks of 8 x 8: (n, 1, H, W) -> (n, rows, columns, 8, 8)."""
    a, b = v.shape[2] // 8 * 8, v.shape[3] // 8 * 8
    cells = v[..., :a, :b].reshape(len(v), a // 8, 8, b // 8, 8).permute(0, 1, 3, 2, 4)
    return _dct() @ cells @ _dct().T


def _grid(y: Tensor) -> Iterator[Tensor]:
    """Steps at the borders of blocks of 8 x 8, and coefficients of 0 in them, against blocks that lie elsewhere."""
    for axis in (2, 3):
        d = y.diff(dim=axis).abs()
        m = (d - 0.5 * (d.roll(1, axis) + d.roll(-1, axis))).mean((1, 5 - axis))
        at = m[:, : m.shape[1] // 8 * 8].view(len(y), -1, 8).mean(1)[:, 7]
        yield at / (m.abs().mean(1) + 0.05)
        yield _log(at.clamp(min=0))
    on, off = _blocks(y - 128), _blocks((y - 128)[..., 4:-4, 4:-4])
    order = torch.arange(8)[:, None] + torch.arange(8)
    zero, elsewhere = (c.abs() < 1 for c in (on, off))
    for low, up in ((1, 4), (4, 8), (8, 15)):
        here = (order >= low) & (order < up)
        one, other = (c[..., here].float().flatten(1).mean(1) for c in (zero, elsewhere))
        yield one
        yield one - other
    yield _log(on[..., 4:, 4:].abs().flatten(1).mean(1)) - _log(off[..., 4:, 4:].abs().flatten(1).mean(1))


def _flat_patches(y: Tensor) -> Iterator[Tensor]:
    """Strength and correlation of what varies in the flattest patches, and how it grows with brightness."""
    step = 3 if min(y.shape[2:]) < 48 else 6
    patch = y.unfold(2, 6, step).unfold(3, 6, step).reshape(len(y), -1, 6, 6)
    mean = patch.mean((2, 3), keepdim=True)
    ramp = torch.arange(6.0) - 2.5
    patch = patch - mean
    for q in (ramp.view(6, 1), ramp.view(1, 6)):
        patch = patch - (patch * q).sum((2, 3), keepdim=True) / (ramp.square().sum() * 6) * q
    var = patch.square().mean((2, 3))
    order, index = var.sort(1)
    for share in (0.02, 0.1, 0.25, 0.5):
        yield _log(order[:, int(share * var.shape[1])].sqrt())
    flat = patch.gather(1, index[:, : max(4, var.shape[1] // 5), None, None].expand(-1, -1, 6, 6))
    v = flat.square().mean((1, 2, 3)) + 0.02
    for i, j in ((0, 1), (1, 0), (1, 1), (2, 0), (0, 2)):
        yield (flat[..., i:, j:] * flat[..., : 6 - i, : 6 - j]).mean((1, 2, 3)) / v
    lv, m = torch.log(var + 0.5), mean.flatten(1)
    mc = m - m.mean(1, keepdim=True)
    yield (mc * (lv - lv.mean(1, keepdim=True))).mean(1) / ((mc.square().mean(1) * lv.var(1)).sqrt() + 1)
    light, dark = m > m.quantile(0.75, dim=1, keepdim=True), m <= m.quantile(0.25, dim=1, keepdim=True)
    yield (lv * light).sum(1) / light.sum(1).clamp(min=1) - (lv * dark).sum(1) / dark.sum(1).clamp(min=1)


def _levels(images: Tensor) -> Iterator[Tensor]:
    """How many grey levels there are, and how far apart."""
    n, channels = images.shape[:2]
    place = images.flatten(2).long() + (torch.arange(n * channels) * 256).view(n, channels, 1)
    count = torch.bincount(place.flatten(), minlength=n * channels * 256).view(n, channels, 256)
    share = count / images[0, 0].numel()
    there = count > 0
    level = torch.arange(256)
    first, last = torch.where(there, level, 255).amin(2), torch.where(there, level, 0).amax(2)
    used = there.sum(2)
    yield _log(used.float(), 1).mean(1)
    yield _log((last - first + 1) / used, 0).mean(1)
    yield -(share * torch.log(share + 1e-9)).sum(2).mean(1)
    most = share.topk(8, 2).values
    yield most[..., 0].mean(1)
    yield most.sum(2).mean(1)
    yield _log(share[..., 1:-1].amax(2), 0.001).mean(1)


def _colour(x: Tensor) -> Iterator[Tensor]:
    """Detail of colour differences, on the grid of JPEG too, and whether the channels vary together."""
    for c in (x[:, :1] - x[:, 1:2], x[:, 2:] - x[:, 1:2]):
        dx = _gradients(c)[0]
        dd = dx[..., 1:, :] - dx[..., :-1, :]
        yield _log(_rms(dd))
        yield _quantiles(dd)
        yield _log(_rms(dx))
        yield _log(_rms(_gradients(F.avg_pool2d(c, 2))[0]))
        on, off = (_blocks(v)[..., 3:, 3:].abs().flatten(1).mean(1) for v in (c, c[..., 4:-4, 4:-4]))
        yield _log(on) - _log(off)
    high = [c[..., 1:, 1:] - c[..., :-1, 1:] - c[..., 1:, :-1] + c[..., :-1, :-1] for c in torch.split(x, 1, 1)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        size = (high[a].square().mean((1, 2, 3)) * high[b].square().mean((1, 2, 3))).sqrt()
        yield (high[a] * high[b]).mean((1, 2, 3)) / (size + 0.05)
