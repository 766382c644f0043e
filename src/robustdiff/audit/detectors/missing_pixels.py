"""Lost pixels: which value stands for them, where they are, single or in blocks, and how they are filled in.

Of tensors (B, C, H, W) in [-1, 1], noise may exceed it. A value that the histogram of a whole set has a spike at may
stand for pixels that were lost; whether it does shows where it lies. Content keeps company and has ragged edges;
pixels lost one by one lie scattered, blocks fill whole cells of a grid, which lie scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from robustdiff.audit import mixture
from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.simulate import any_colour, corrupted, draws
from robustdiff.audit.spectral_model import Load, batches, same_above
from robustdiff.utils.images import from_uint8, to_uint8
from robustdiff.utils.words import counted

if TYPE_CHECKING:  # it holds a result, which fills pixels in
    from robustdiff.audit.survey import Survey

LEVEL = 2 / 255
"""One step of 8 bit."""
STEPS = 511
"""Half steps of 8 bit from -1 to 1: mid grey, 0, lies between two of the whole ones."""
SPIKE, EXTREME_SPIKE, LEAST = 8.0, 2.0, 0.005
"""How much commoner than its neighbours a value is, or black or white, and its share of all pixels, to be suspected."""
SPIKY, DRAWING = 3.0, 8
"""How much commoner than its neighbours a value of a drawing is, and how many such values it has."""
COMPANY, ALSO_HERE = 0.35, 5.0
"""Of the way from independence to flat areas; how much commoner than its neighbours, in the image itself."""
HOLED, LONE, APART = 0.02, 0.01, 0.3
"""Least share of an image's pixels that are of the value, or black or white and alone; what alone means."""
WHOLE, MOST_BLOCKS, PLACED = 0.9, 0.9, 0.8
"""Share of an image's pixels of the value that lie in whole cells; of the images of small whole cells that have larger
ones too, if those are the blocks; how often a cell of the grid is lost at most: more is a mark at its place."""
MANY, CHANCE = 0.25, 3.0
"""Share of an image from which on black or white pixels may be lost though few are alone, if their company is by
chance: so many standard errors at most beyond that of independent ones."""
FEW_SPIKES, LARGEST_CELL, FEWEST_CELLS = 4, 8, 3
"""Of a single image: values that stand out at most, or it is a drawing; edge of the largest cells that are asked about,
and how many of them there must be."""
FARTHEST, AS_OFTEN = 0.75, 0.5
"""Where surroundings are least like the value: around the farthest quarter of the pixels; how often it is there at
least, of how often it would be if pixels were lost whatever they show."""
HOLED_KINDS = ("holes", "impulse")
"""Kinds of simulated damage that an image with lost pixels looks like."""
MOST_NAMED = 3
"""Values of lost pixels that a finding names."""
PAIRED = 512
"""Clean images on which a repair is tried, to measure it."""


class Gap(NamedTuple):
    """What lost pixels look like.

    Attributes:
        value: Theirs, in [-1, 1].
        block: Edge in pixels of the cells that are lost together; the grid begins at the upper left corner.
    """

    value: float
    block: int = 1


# -- which value -----------------------------------------------------------------------------------------


def grey_histogram(images: Tensor) -> Tensor:
    """Counts of pixels whose channels are all the same value, by half steps of 8 bit, int64, shape (511,)."""
    same = (images == images[:, :1]).all(1) & (images[:, 0].abs() <= 1)
    place = ((images[:, 0][same].double() + 1) * 255).round().long()
    return torch.bincount(place.clamp(0, STEPS - 1), minlength=STEPS)


def suspected(histogram: Tensor, pixels: int) -> list[float]:
    """Values so common that they may stand for lost pixels, in [-1, 1]: spikes in the histogram of all images.

    Where many values are spikes, as in drawings or pictures of few bits, one must stand out of the others, and black
    and white, which are then at home there, are not suspected.

    Args:
        histogram: Sum of :func:`grey_histogram`.
        pixels: Pixels that were counted from.
    """
    share = histogram.double() / max(1, pixels)
    usual = torch.zeros_like(share)
    for place in share.nonzero().flatten().tolist():
        near = torch.cat([share[max(0, place - 8) : place], share[place + 1 : place + 9]])
        usual[place] = near[near > 0].median() if bool((near > 0).any()) else 0.0
    spiky = share[(share > SPIKY * usual) & (share > LEAST / 5)]
    drawing = len(spiky) >= DRAWING
    least = SPIKE * float(spiky.median()) if drawing else LEAST
    found = []
    for place in (share >= max(least, LEAST)).nonzero().flatten().tolist():
        extreme = place in (0, STEPS - 1)
        if not (extreme and drawing) and share[place] >= (EXTREME_SPIKE if extreme else SPIKE) * usual[place]:
            found.append(place / 255 - 1)
    return found


# -- where -----------------------------------------------------------------------------------------------


def holes(images: Tensor, gaps: Sequence[Gap]) -> Tensor:
    """Lost pixels, bool, shape (B, H, W): those of a suspected value that lie scattered over their image.

    An image is believed to have holes of a value if at least :data:`HOLED` of its pixels have it and these keep no
    company: the chance that the pixel to the right or below has it too is less than :data:`COMPANY` of the way from
    their share of the image, that of independence, to 1, that of flat areas. The value must be a spike in the image's
    own histogram, too. Black and white are common in pictures: there at least :data:`LONE` of the pixels must differ
    from all of their neighbours by :data:`APART`, and from the median of their 3 x 3 neighbourhood by three times the
    neighbours' spread; lost are then those that differ from that median.

    Blocks are lost where :data:`WHOLE` of the pixels of the value fill cells of the grid; the company that cells keep
    was asked of the set (:func:`find`), and of black and white ones it is of the image, too.

    Args:
        images: Shape (B, C, H, W).
        gaps: Of :func:`find`.
    """
    found = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)
    for value, block in gaps:
        here = having(images, value)
        if block > 1:
            cell, covered, believed = _in_cells(images, here, value, block)
            if abs(value) == 1:
                believed &= _scattered(*company(cell))
            found |= covered & believed[:, None, None]
        elif abs(value) == 1:
            enough = _share(here) >= LONE
            found[enough] |= _impulses(images[enough], here[enough], value)
        else:
            believed = (_share(here) >= HOLED) & _scattered(*company(here)) & _spike(images, here, value)
            found |= here & believed[:, None, None]
    return found


def in_one(image: Tensor) -> list[Gap]:
    """What may be lost pixels of one image, (C, H, W), by its own values alone: scattered pixels, or scattered cells.

    Values are asked that the image has more of than of those next to them, each in cells of 1 to :data:`LARGEST_CELL`
    pixels. An image of more than :data:`FEW_SPIKES` such values is a drawing, of which nothing is said.
    """
    images = image[None]
    share = grey_histogram(images).double() / image[0].numel()
    values = [place / 255 - 1 for place in (share >= HOLED).nonzero().flatten().tolist()]
    values = [value for value in values if bool(_spike(images, having(images, value), value))]
    if len(values) > FEW_SPIKES:
        return []
    found = (_cells_of(images, value) for value in values)
    return [gap for gap in found if gap is not None]


def _cells_of(images: Tensor, value: float) -> Gap | None:
    """The largest cells of the value that lie scattered over one image, (1, C, H, W); single pixels come first."""
    if bool(holes(images, [Gap(value)]).any()):
        return Gap(value)
    here = having(images, value)
    for block in range(LARGEST_CELL, 1, -1):
        (cell,), _, believed = _in_cells(images, here, value, block)
        enough = int(cell.sum()) >= FEWEST_CELLS and not _rectangle(cell)
        if enough and bool(believed & _scattered(*company(cell[None]))):
            return Gap(value, block)
    return None


def having(images: Tensor, value: float) -> Tensor:
    """Pixels of which every channel has the value, bool, shape (B, H, W)."""
    return ((images - value).abs() < LEVEL / 4).all(1)


def whole_cells(here: Tensor, block: int) -> Tensor:
    """Cells of a grid all of whose pixels are marked, bool: (B, H, W) -> (B, ceil(H / block), ceil(W / block)).

    Cells that the lower and right edges cut off are whole if what is left of them is.
    """
    height, width = here.shape[1:]
    padded = pad(here, (0, -width % block, 0, -height % block), value=True)
    return padded.unfold(1, block, block).unfold(2, block, block).flatten(3).all(3)


def company(here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How marked pixels, or cells, lie beside one another, image by image; all float64, shape (B,).

    Returns:
        Their share; pairs of one and its marked neighbour to the right or below; of those that have such a neighbour,
        counted once for each.
    """
    pairs = (here[:, 1:] & here[:, :-1]).flatten(1).sum(1) + (here[:, :, 1:] & here[:, :, :-1]).flatten(1).sum(1)
    first = here[:, :-1].flatten(1).sum(1) + here[:, :, :-1].flatten(1).sum(1)
    return _share(here), pairs.double(), first.double()


def _share(here: Tensor) -> Tensor:
    return here.flatten(1).double().mean(1)


def _scattered(share: Tensor, pairs: Tensor, first: Tensor) -> Tensor:
    """Whether pixels or cells keep so little company that they were lost."""
    return pairs / first.clamp(min=1) < share + COMPANY * (1 - share)


def _by_chance(share: Tensor, pairs: Tensor, first: Tensor) -> Tensor:
    """Whether pixels keep no more company than independent ones may, by chance."""
    return pairs / first.clamp(min=1) < share + CHANCE * (share * (1 - share) / first.clamp(min=1)).sqrt()


def _rectangle(cell: Tensor) -> bool:
    """Whether marked cells, (rows, columns), fill a rectangle, as those of a bar do."""
    return int(cell.sum()) == int(cell.any(0).sum()) * int(cell.any(1).sum())


def _much(images: Tensor) -> Tensor:
    """Images of which black or white fill :data:`MANY`, lying as by chance: hardly one such pixel is alone."""
    found = torch.zeros(len(images), dtype=torch.bool)
    for value in (-1.0, 1.0):
        here = having(images, value)
        found |= (_share(here) >= MANY) & _by_chance(*company(here))
    return found


def _spike(images: Tensor, here: Tensor, value: float) -> Tensor:
    """Whether the value is commoner in an image than those next to it, which flat areas of pictures have as well."""
    away = (images - value).abs()
    near = ((away > LEVEL * 3 / 4) & (away < LEVEL * 9 / 2)).all(1).flatten(1).double().mean(1) / 8
    return _share(here) >= ALSO_HERE * near


def _impulses(images: Tensor, here: Tensor, value: float) -> Tensor:
    """Black or white pixels unlike their neighbourhood, where many stand alone."""
    around = pad(images.double().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    nine = around.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)[:, 0]
    median, others = nine.median(-1).values, nine[..., [0, 1, 2, 3, 5, 6, 7, 8]]
    ranked = others.sort(-1).values
    spread = (ranked[..., 5] - ranked[..., 2]) / 1.35  # of about the quartiles, as a standard deviation
    far = (3 * spread).clamp(min=APART)
    lone = here & ((others - value).abs() > APART).all(-1) & ((median - value).abs() > far)
    return here & ((median - value).abs() > APART) & (lone.flatten(1).double().mean(1) >= LONE)[:, None, None]


def _in_cells(images: Tensor, here: Tensor, value: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole cells of the value, (B, rows, columns); their pixels; in which images they are nearly all of it, (B,)."""
    cell = whole_cells(here, block)
    height, width = here.shape[1:]
    covered = cell.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]
    share = _share(here)
    believed = (share >= HOLED) & (_share(covered) >= WHOLE * share) & _spike(images, here, value)
    return cell, covered, believed


# -- in a whole set --------------------------------------------------------------------------------------


def find(load: Load, count: int) -> tuple[tuple[Gap, ...], Tensor]:
    """What lost pixels look like in a set of images, and which images have such pixels.

    Args:
        load: The images.
        count: N >= 1, how many.

    Returns:
        Only what at least eight images have; bool, shape (N,).
    """
    histogram, pixels = torch.zeros(STEPS, dtype=torch.long), 0
    for places in batches(count):
        images = load(places)
        histogram, pixels = histogram + grey_histogram(images), pixels + images[:, 0].numel()
    single = [Gap(value) for value in suspected(histogram, pixels)]
    nothing = torch.zeros(count, dtype=torch.bool)
    if not single:
        return (), nothing
    blocks = [gap for value, _ in single if (gap := _blocks(load, count, value))]
    of = {gap.value: gap for gap in single} | {gap.value: gap for gap in blocks}
    found, holed = [], nothing
    for gap in of.values():
        if gap.block == 1 and abs(gap.value) < 1 and not _anywhere(load, count, gap):
            continue
        here = torch.cat([holes(load(places), [gap]).flatten(1).any(1) for places in batches(count)])
        if int(here.sum()) >= mixture.FEWEST:
            found.append(gap)
            holed = holed | here
    return tuple(found), holed


def _anywhere(load: Load, count: int, gap: Gap) -> bool:
    """Whether pixels of the value lie in surroundings of any kind, as those that were lost do.

    A value that some content has here and there, such as a black background that noise of one size lifted and clipped,
    lies scattered, but not where the surroundings are far from it.
    """
    there = usual = 0.0
    for places in batches(count):
        images = load(places)
        lost = holes(images, [gap])
        images, lost = (x[lost.flatten(1).any(1)] for x in (images, lost))
        known = (~lost[:, None]).double()
        grey = images.double().mean(1, keepdim=True) * known
        around, mass = (9 * avg_pool2d(x, 3, 1, 1)[:, 0] - x[:, 0] for x in (grey, known))
        for away, enough, one in zip((around / mass - gap.value).abs(), mass > 0.5, lost, strict=True):
            if bool(enough.any()):
                ranked = away[enough].sort().values
                far = enough & (away >= ranked[int(FARTHEST * len(ranked))])
                there += float(one[far].sum())
                usual += float(one[enough].double().mean() * far.sum())
    return there >= AS_OFTEN * usual


def _blocks(load: Load, count: int, value: float) -> Gap | None:
    """The largest cells that the value fills, if it fills cells, scattered, at other places in every image."""
    height, width = load(range(1)).shape[2:]
    sizes = range(2, min(height, width) // 2 + 1)
    images = dict.fromkeys(sizes, 0)
    totals = {block: torch.zeros(3).double() for block in sizes}
    places_of = {block: torch.zeros(-(-height // block), -(-width // block)).double() for block in sizes}
    for places in batches(count):
        some = load(places)
        here = having(some, value)
        some, here = (x[_share(here) >= HOLED] for x in (some, here))
        for block in sizes:
            cell, _, believed = _in_cells(some, here, value, block)
            cell = cell[believed]
            images[block] += len(cell)
            totals[block] += torch.stack(company(cell)).sum(1)
            places_of[block] += cell.double().sum(0)
    usual = max((images[block] for block in sizes[:2]), default=0)
    if not usual:
        return None
    block = max(block for block in sizes if images[block] >= MOST_BLOCKS * usual)
    share, pairs, first = totals[block]
    apart = bool(_scattered(share / images[block], pairs, first))
    wandering = bool(places_of[block].max() <= PLACED * images[block])
    return Gap(value, block) if apart and wandering else None


# -- repair ----------------------------------------------------------------------------------------------


def fill(images: Tensor, lost: Tensor, rounds: int = 60) -> Tensor:
    """Lost pixels from their neighbours: the discrete harmonic function, by ``rounds`` averages of the four nearest.

    Args:
        images: Shape (B, C, H, W).
        lost: bool, shape (B, H, W).
        rounds: Enough for scattered pixels; wide gaps stay flat.
    """
    if not bool(lost.any()):
        return images
    hole, known = lost[:, None], (~lost[:, None]).to(images.dtype)
    mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    filled = torch.where(hole, mean, images)
    for _ in range(rounds):
        p = pad(filled, (1, 1, 1, 1), mode="replicate")
        near = (p[:, :, 1:-1, :-2] + p[:, :, 1:-1, 2:] + p[:, :, :-2, 1:-1] + p[:, :, 2:, 1:-1]) / 4
        filled = torch.where(hole, near, filled)
    return filled


# -- the kind of damage ----------------------------------------------------------------------------------


@register_detector
class MissingPixels(Detector):
    """Lost pixels, single or in blocks; their strength is the share of pixels that are lost."""

    name = "holes"
    title = "with scattered missing pixels"
    become = "with {:.0%} of pixels lost"
    strengths = (0.05, 0.6)
    order = 40
    repairs = True

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`; mostly mid grey, black or white stands for lost pixels, alone or in blocks."""
        rng = draws(generator)
        value, block = any_colour(1, rng).item() / 127.5 - 1, int(rng.choice([1, 1, 2, 3, 4]))
        return corrupted(image, generator, "missing", amount=strength, value=value, block=block)

    def possible(self, images: Tensor) -> Tensor:
        """Where a value is that may stand for lost pixels (:func:`in_one`), or much black or white, as by chance."""
        return torch.tensor([bool(in_one(image)) for image in images]) | _much(images)

    def detect(self, survey: Survey) -> Tensor:
        """Images with pixels of a value that may stand for lost ones, of the set or, if they look so, their own."""
        lost, holed = find(survey.load, survey.count)
        has_missing = holed & ~survey.blank
        if survey.compared is not None:  # what fits in with the pictures is none of it: dots, outlines, modules
            has_missing &= survey.looks_like(*HOLED_KINDS)
            lost = lost if bool(has_missing.any()) else ()
            for place in (survey.looks_like(self.name) & ~has_missing).nonzero().flatten().tolist():
                own = in_one(from_uint8(to_uint8(survey.load(range(place, place + 1))))[0])
                has_missing[place] = bool(own)
                lost = tuple(dict.fromkeys((*lost, *own)))
        survey.add(lost=lost, has_missing=has_missing)
        if lost:
            share = survey.each(lambda images: holes(images, lost).flatten(1).double().mean(1))
            survey.add(signs={**survey.result.signs, "lost": torch.where(has_missing, share, 0.0)})
        looks = survey.shows(self)
        return has_missing if looks is None else has_missing | looks

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """They are filled in, and used where the same repair of clean images no longer shows.

        Where the pixels were not found, they are used where the damage no longer shows.
        If none is whole, the repair is tried on repaired ones, each with the lost pixels of the next.
        """
        if shows is not None and bool((unknown := shows & ~survey.result.has_missing).any()):
            survey.add_simulated(self, unknown)
        if shows is None or not bool((shows := shows & survey.result.has_missing).any()):
            return
        energies, lost = survey.energies, survey.result.lost
        holed, whole = (mask.nonzero().flatten()[:PAIRED].tolist() for mask in (shows, survey.yardstick))
        pairs = list(zip(holed[1:] + holed[:1], whole, strict=False))
        original = torch.cat([survey.repaired(range(place, place + 1)) for _, place in pairs])
        gaps = torch.cat([holes(survey.load(range(place, place + 1)), lost) for place, _ in pairs])
        mended = fill(original, gaps)
        level = same_above(energies.of(original).mean(0), energies.of(mended).mean(0), energies.values)
        level = max(level, 2 * float((mended - original).double().square().mean().sqrt()))
        kinds = [f"pixels of the value {one.value:.3g}" for one in lost if one.block == 1]
        large = [one for one in lost if one.block > 1]
        kinds += [f"blocks of {one.block} x {one.block} of the value {one.value:.3g}" for one in large]
        if len(kinds) > MOST_NAMED:
            kinds = [*kinds[:MOST_NAMED], counted(len(kinds) - MOST_NAMED, "other value")]
        what = f"scattered {' and '.join(kinds)}"
        finding = Finding(self.name, int(shows.sum()), what, Action.FILLED_IN, level, measured_on=len(pairs))
        survey.add(finding, shows, min_sigma=survey.used_above(level, shows))
