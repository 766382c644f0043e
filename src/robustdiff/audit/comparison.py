"""Which images of a set look like simulated damage of its own images: one decision for every kind that is simulated.

A clean image looks like none of them. Damaged copies of trusted images, of all kinds and strengths, stand against the
images of the set; a classifier of plain statistics (``image_features.py``), cross-fitted by source image, tells "as in
the set" from each kind. First every image is trusted, damaged ones too, yet these have as much in common with the
copies as with the set, and clean ones nothing. So what looks like damage is trusted no longer, and the next round's
copies are made of the rest. In the later rounds probabilities count with how common each kind is, and images that were
found with confidence join the class they were found in: the set teaches its own damage.

Where a kind is common, the set teaches that it is normal. So what seems most like each kind is tried as a hypothesis:
these images, or those above a gap in the order of "more of this damage" (the mean difference of a copy from its own
source: shares do not matter), are held against copies of the others, damaged just as strongly. If a classifier can
hardly tell the two apart, they are not trusted in any round.

Two more questions keep content from being called damage. What pictures may have of themselves, words and rectangles,
is not looked for where much of a set seems to have it. And a kind that more images nearly show than show, unlike its
copies, is the tail of what is clean.

With every finding goes ``told_apart``, the area under the curve of a classifier between the images found and copies of
trusted images damaged just so; 0.5 says that the ones are what the others become.

Sources: two-sample tests by classifiers: Lopez-Paz and Oquab (2017); the mechanism is ours. The file is longer than
others since it is one algorithm, read from top to bottom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from torch import Tensor

from robustdiff.audit import mixture
from robustdiff.audit.damage_network import Scaling, calibration, fit_folds, with_own_shares
from robustdiff.audit.image_features import image_features
from robustdiff.utils.images import from_uint8, to_uint8
from robustdiff.utils.resources import cores

if TYPE_CHECKING:  # which asks for a comparison
    from robustdiff.audit.detector import Detector

FEWEST = 64
"""Fewer images are not compared."""
SMALLEST = 24
"""Edge in pixels of the smallest images that are compared: in smaller ones, of a few blocks, each kind's own rule for
groups finds as much, in a fraction of the time."""
MOST = 4000
"""Images, evenly spread, that networks learn from; further ones are only asked about."""
COPIES = (300, 300, 500, 500)
"""Copies of each kind that each round learns from, those of trusted images that earlier rounds made among them."""
FOLDS = 3
EACH, FEW = 3, 400
"""Networks for each fold whose logarithms of probabilities are averaged, and in sets of how many images at most: with
few images chance decides much; with many one does as well."""
SET_WEIGHT = 0.25
"""Of the images of the set beside all copies."""
TRUST = (0.75, 0.65, 0.55, 0.5)
"""Probability of no damage from which on an image is trusted, after each round."""
OWN_SHARES_FROM = 2
"""Round from which on it counts how common a kind is."""
SURE = 0.9
"""Probability of a kind from which on an image teaches it."""
FOUND, DOUBTED = 0.9, 0.7
"""Probability of damage from which on an image is called damaged; from which on it is in doubt."""
TOGETHER = 32
"""Images whose statistics are computed at once."""
USUAL = 0.15
"""Share of the set that seems to have what pictures may have of themselves from which on it is not looked for."""
UNLIKELY = -3.0
"""Logarithm of the odds of a kind below which an image does not seem to have it."""
SUSPECTED = (-4.0, UNLIKELY, -2.0, -1.0)
"""The same, where all images are trusted, of images that are tried as a group: the first that is believed counts."""
EXPLAINED, COMMON = 0.82, 0.15
"""Largest area under the curve at which a group is believed; its least share of the set: the rounds find rarer ones."""
REFUTED = 0.98
"""Area beyond which images are not what others become: they are not called damaged."""
TESTED, LEAST_TESTED = 200, 20
"""Images that a finding is tested on at most; fewer than these are not."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What was found about N images of one size.

    Attributes:
        kinds: The K kinds that were simulated.
        probability: Of no damage, and of each kind, float64, shape (N, 1 + K); they sum to 1.
        strength: As which strength of each kind an image reads, float64, shape (N, K); nan where the kind is unlikely.
        told_apart: Of kinds that were found, by name: area under the curve between the images found and what trusted
            ones become; 0.5: not at all.
        unsupported: Names of kinds that more images nearly show than show, far more than of their copies: the tail of
            what clean images are.
    """

    kinds: tuple[Detector, ...]
    probability: Tensor
    strength: Tensor
    told_apart: dict[str, float]
    unsupported: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Of the kinds."""
        return [kind.name for kind in self.kinds]

    def among(self, places: Sequence[int], count: int) -> Comparison:
        """The same where these images are some of ``count``; the others show no damage."""
        probability = torch.zeros(count, 1 + len(self.kinds), dtype=torch.float64)
        probability[:, 0] = 1
        strength = torch.full((count, len(self.kinds)), math.nan, dtype=torch.float64)
        probability[places], strength[places] = self.probability, self.strength
        return replace(self, probability=probability, strength=strength)

    @property
    def damaged(self) -> Tensor:
        """Probability of any damage, float64, shape (N,)."""
        return 1 - self.probability[:, 0]

    @property
    def kind(self) -> Tensor:
        """The likeliest kind of each image, as a place in ``kinds``, int64, shape (N,)."""
        return self.probability[:, 1:].argmax(1)

    def shows(self, name: str) -> Tensor:
        """Images found with this kind, bool, shape (N,)."""
        return self._believed(name) & (self.damaged >= FOUND)

    def doubted(self, name: str) -> Tensor:
        """Images in doubt that would have this kind, bool, shape (N,)."""
        return self._believed(name) & (self.damaged >= DOUBTED) & (self.damaged < FOUND)

    def _believed(self, name: str) -> Tensor:
        """Images of which it is the likeliest kind; none if the kind itself is not believed."""
        refuted = name in self.unsupported or self.told_apart.get(name, 0.0) > REFUTED
        return (self.kind == self.names.index(name)) & (not refuted)


def comparable(shape: Sequence[int], count: int, kinds: Iterable[Detector]) -> bool:
    """Whether images of a shape (C, H, W), so many of them, can be compared with copies of these kinds."""
    return count >= FEWEST and min(shape[1:]) >= SMALLEST and shape[0] in (1, 3) and any(kinds)


def compare(load: Callable[[Sequence[int]], Tensor], places: Sequence[int], kinds: Sequence[Detector]) -> Comparison:
    """Hold the images of a set against simulated damage of their own.

    Nothing is random: the same images are always judged alike.

    Args:
        load: Images by place, (B, C, H, W), in [-1, 1]; seen at 8 bit.
        places: Of the N images that are asked about, N >= :data:`FEWEST`.
        kinds: What is simulated; each has strengths.
    """
    return _Rounds(load, places, kinds).result()


@dataclass(frozen=True, eq=False)
class _Copies:
    """Damaged copies: statistics (M, F), kind 1 ... K, source and logarithm of the strength, each (M,)."""

    features: Tensor
    kind: Tensor
    source: Tensor
    strength: Tensor

    def __getitem__(self, which: Tensor) -> _Copies:
        return _Copies(self.features[which], self.kind[which], self.source[which], self.strength[which])

    @classmethod
    def joined(cls, parts: Sequence[_Copies]) -> _Copies:
        columns = zip(*((one.features, one.kind, one.source, one.strength) for one in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


def _sure_and_doubted(probability: Tensor, number: int) -> tuple[int, int]:
    """How many images show a kind, 1 ... K, with confidence, and how many may or may not: of (N, 1 + K)."""
    mine = probability[:, 1:].argmax(1) + 1 == number
    damaged = 1 - probability[:, 0]
    return int((mine & (damaged >= FOUND)).sum()), int((mine & (damaged >= 1 - FOUND) & (damaged < FOUND)).sum())


class _Rounds:
    def __init__(
        self, load: Callable[[Sequence[int]], Tensor], places: Sequence[int], kinds: Sequence[Detector]
    ) -> None:
        self.load, self.kinds, self.places = load, tuple(kinds), list(places)
        self.generator = torch.Generator().manual_seed(0)
        self.features = self._statistics(len(self.places), lambda at: load([self.places[at]])[0])
        count = len(self.places)
        self.possible = self._possible()
        self.learnt = torch.arange(0, count, -(-count // MOST))
        self.fold = torch.randint(FOLDS, (count,), generator=self.generator)
        self.made: dict[int, _Copies] = {}  # of each kind, 1 ... K
        self.proven: set[int] = set()
        self.asked = list(range(1, 1 + len(self.kinds)))

    def _possible(self) -> Tensor:
        """Which images may have which kind of damage at all, bool, (N, K)."""
        found = []
        for first in range(0, len(self.places), TOGETHER):
            images = from_uint8(to_uint8(self.load(self.places[first : first + TOGETHER])))
            found.append(torch.stack([kind.possible(images) for kind in self.kinds], 1))
        return torch.cat(found)

    # -- statistics and copies -----------------------------------------------------------------------------

    def _statistics(self, count: int, make: Callable[[int], Tensor]) -> Tensor:
        """Of images that are made one by one, (C, H, W) in [-1, 1], from their number."""

        def some(first: int) -> Tensor:
            numbers = range(first, min(first + TOGETHER, count))
            return image_features(to_uint8(torch.stack([make(number) for number in numbers])))

        with ThreadPoolExecutor(cores()) as pool:
            return torch.cat(list(pool.map(some, range(0, count, TOGETHER))))

    def _copies(self, kind: int, sources: Tensor, strengths: Tensor) -> _Copies:
        """Copies of images with one kind, 1 ... K, and logarithms of strengths."""
        one = self.kinds[kind - 1]
        seeds = torch.randint(2**62, (len(sources),), generator=self.generator).tolist()

        def copy(number: int) -> Tensor:
            image = from_uint8(to_uint8(self.load([self.places[int(sources[number])]])))[0]
            return one.simulate(image, math.exp(float(strengths[number])), torch.Generator().manual_seed(seeds[number]))

        made = self._statistics(len(sources), copy)
        return _Copies(made, torch.full((len(sources),), kind), sources, strengths)

    def _of_all_kinds(self, trusted: Tensor, count: int) -> _Copies:
        """So many copies of trusted images, bool (N,), of each kind."""
        return _Copies.joined([self._of_one_kind(number, trusted, count) for number in self.asked])

    def _of_one_kind(self, number: int, trusted: Tensor, count: int) -> _Copies:
        """So many copies of trusted images with one kind, 1 ... K, of any strength: those there are, and new ones."""
        made = [self.made[number]] if number in self.made else []
        kept = [one[trusted[one.source].nonzero().flatten()[:count]] for one in made]
        missing = count - sum(len(one.kind) for one in kept)
        if missing:
            some = self.learnt[trusted[self.learnt]]
            low, high = self._reach(number)
            source = some[torch.randint(len(some), (missing,), generator=self.generator)]
            new = self._copies(number, source, low + (high - low) * torch.rand(missing, generator=self.generator))
            self.made[number] = _Copies.joined([*made, new])
            kept.append(new)
        return _Copies.joined(kept)

    def _reach(self, number: int) -> tuple[float, float]:
        """Logarithms of the least and the greatest strength of a kind."""
        strengths = self.kinds[number - 1].strengths
        return math.log(min(strengths)), math.log(max(strengths))

    # -- the rounds ----------------------------------------------------------------------------------------

    def result(self) -> Comparison:
        while (found := self._all_rounds()) is None:
            self.proven.clear()
        return found

    def _all_rounds(self) -> Comparison | None:
        """What all rounds say; None if one of them left a kind out, so that they begin anew."""
        everywhere = torch.ones(len(self.places), dtype=torch.bool)
        known = self._of_all_kinds(everywhere, COPIES[0])
        judged = self._judge(known, everywhere, None, 0)
        if self._leave_out_what_is_usual(judged):
            return None
        explained = self._explained(judged, known)
        for number in range(1, len(TRUST)):
            trusted = judged[:, 0] >= math.log(TRUST[number - 1])
            for kind in self.proven:
                trusted = trusted & explained & (judged[:, kind] - judged[:, 0] <= UNLIKELY)
            if not bool(trusted[self.learnt].any()):
                trusted = judged[:, 0] >= judged[self.learnt, 0].median()
            known = self._of_all_kinds(trusted, COPIES[number])
            judged = self._judge(known, trusted, judged if number >= OWN_SHARES_FROM else None, number)
            if self._leave_out_what_is_usual(judged):
                return None
        return self._read(judged.exp().double(), trusted, known)

    def _leave_out_what_is_usual(self, judged: Tensor) -> bool:
        """Do not look for what pictures may have of themselves, where much of the set seems to have it."""
        kind = judged[self.learnt, 1:].argmax(1)
        seem = judged[self.learnt, 0] < math.log(TRUST[0])
        usual = [
            number
            for number in self.asked
            if self.kinds[number - 1].usual and float((seem & (kind == number - 1)).double().mean()) > USUAL
        ]
        self.asked = [number for number in self.asked if number not in usual]
        return bool(usual)

    def _judge(self, copies: _Copies, trusted: Tensor, before: Tensor | None, seed: int) -> Tensor:
        """Logarithms of probabilities, (N, 1 + K): one round."""
        classes = 1 + len(self.kinds)
        scaling = Scaling.of(self.features[self.learnt[trusted[self.learnt]]])
        here, copied = scaling(self.features), scaling(copies.features)
        learnt = torch.zeros(len(here), dtype=torch.bool)
        learnt[self.learnt] = True
        weight, found, kind = trusted.float(), torch.zeros_like(trusted), torch.zeros(len(here), dtype=torch.long)
        if before is not None:
            kind = before[:, 1:].argmax(1) + 1
            found = before[:, 0] < math.log(1 - SURE)
            weight = before[:, 0].exp() * trusted * ~found  # a little of each that is in doubt would add up to much
        known, asked = [], []
        for number in range(FOLDS):
            mine, theirs = self.fold == number, self.fold[copies.source] == number
            some, sure, far = learnt & ~mine & (weight > 0) & ~found, learnt & ~mine & found, ~theirs
            share = weight[some] * (SET_WEIGHT * int(far.sum()) / weight[some].sum())
            known.append(
                (
                    torch.cat([here[some], copied[far], here[sure]]),
                    torch.cat([torch.zeros(int(some.sum()), dtype=torch.long), copies.kind[far], kind[sure]]),
                    torch.cat([share, torch.ones(int(far.sum() + sure.sum()))]),
                )
            )
            asked.append(torch.cat([here, copied]))
        each = EACH if len(here) <= FEW else 1
        own = torch.stack(fit_folds(known * each, asked * each, classes, seed))  # (each x folds, N + M, K)
        own = own.view(each, FOLDS, *own.shape[1:]).mean(0)
        fold = torch.cat([self.fold, self.fold[copies.source]])
        judged = own[fold, torch.arange(len(fold))]
        of_set, of_copies = judged[: len(here)], judged[len(here) :]
        sample = learnt & (weight > 0)
        factor, offset = calibration(
            torch.cat([of_set[sample], of_copies]),
            torch.cat([torch.zeros(int(sample.sum()), dtype=torch.long), copies.kind]),
            torch.cat([weight[sample] * (SET_WEIGHT * len(copied) / weight[sample].sum()), torch.ones(len(copied))]),
        )
        shares = torch.tensor([SET_WEIGHT] + [1 / len(self.kinds)] * len(self.kinds))
        shares = shares / shares.sum()
        ratios = (torch.cat([of_set, of_copies]) * factor + offset).log_softmax(1) - shares.log()
        ratios[: len(here), 1:].masked_fill_(~self.possible, -math.inf)
        if before is not None:
            _, shares = with_own_shares(ratios[self.learnt], shares)
        probability = (ratios + shares.log()).log_softmax(1)
        self.of_copies = probability[len(here) :].exp().double()
        return probability[: len(here)]

    # -- hypotheses ----------------------------------------------------------------------------------------

    def _explained(self, judged: Tensor, copies: _Copies) -> Tensor:
        """Images that may be trusted, bool, (N,): not those of groups that are what others become.

        Args:
            judged: Logarithms of probabilities where all are trusted, (N, 1 + K).
            copies: Of all kinds.
        """
        odds = judged[:, 1:] - judged[:, :1]
        asked = [number for number in self.asked if not (self.kinds[number - 1].usual or self.kinds[number - 1].faint)]
        others = (odds[:, [number - 1 for number in asked]] <= UNLIKELY).all(1)
        found = torch.zeros_like(others)
        for number in asked:
            some = copies[copies.kind == number]
            suspected = [odds[:, number - 1] > least for least in SUSPECTED]
            for upper in (*self._ordered_groups(some), *suspected):
                lower = others & ~upper
                if int(lower[self.learnt].sum()) < LEAST_TESTED:
                    lower = ~upper
                common = float(upper[self.learnt].double().mean()) >= COMMON
                if not common or int(lower[self.learnt].sum()) < LEAST_TESTED:
                    continue
                area = self._area(number, upper, lower, self._of_one_kind(number, lower, COPIES[0]))
                if area is not None and area < EXPLAINED:
                    found |= upper
                    self.proven.add(number)
                    break
        trusted = ~found
        if int(trusted[self.learnt].sum()) < LEAST_TESTED:
            self.proven.clear()
        return trusted

    def _ordered_groups(self, copies: _Copies) -> list[Tensor]:
        """Images above the lowest group, bool (N,), along "more of this damage"; none if there are no groups.

        The order is the mean difference of a copy of one kind from its own source: shares do not matter.
        """
        spread = self.features[self.learnt].std(0) + 1e-3
        change = ((copies.features - self.features[copies.source]) / spread).numpy()
        signs = np.r_[np.ones(len(change)), np.zeros(len(change))]
        ranker = LogisticRegression(C=0.01, fit_intercept=False, max_iter=500)
        ranker.fit(np.concatenate([change, -change]), signs)
        score = (self.features / spread) @ torch.from_numpy(ranker.coef_[0]).float()
        groups = mixture.split(score[self.learnt].double())
        if len(groups) < 2:
            return []
        lowest = score[self.learnt][groups.members(0)].max()
        return [score > (lowest + score[self.learnt][~groups.members(0)].min()) / 2]

    def _reader(self, number: int, copies: _Copies, trusted: Tensor) -> Callable[[Tensor], Tensor]:
        """Logarithms of strengths from statistics, learnt from copies of one kind."""
        scaling = Scaling.of(self.features[self.learnt[trusted[self.learnt]]])
        ridge = RidgeCV(np.logspace(-1, 4, 11)).fit(scaling(copies.features).numpy(), copies.strength.numpy())
        low, high = self._reach(number)
        return lambda features: torch.from_numpy(ridge.predict(scaling(features).numpy())).clamp(low, high).float()

    def _area(self, number: int, shown: Tensor, trusted: Tensor, copies: _Copies) -> float | None:
        """How well images, bool (N,), are told from trusted ones that were damaged as strongly as they read."""
        some = self.learnt[shown[self.learnt]]
        if len(some) < LEAST_TESTED:
            return None
        some = some[torch.randperm(len(some), generator=self.generator)[:TESTED]]
        strength = self._reader(number, copies, trusted)(self.features[some])
        clean = self.learnt[trusted[self.learnt]]
        source = clean[torch.randint(len(clean), (len(some),), generator=self.generator)]
        made = self._copies(number, source, strength)
        both = torch.cat([self.features[some], made.features])
        x = Scaling.of(both)(both).numpy()
        y = np.r_[np.zeros(len(some)), np.ones(len(made.kind))]
        model = LogisticRegression(C=0.01, max_iter=500)
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=0)
        groups = torch.cat([some, source]).numpy()
        told = cross_val_predict(model, x, y, cv=folds, groups=groups, method="predict_proba")[:, 1]
        return float(roc_auc_score(y, told))

    def _unsupported(self, probability: Tensor, copies: _Copies) -> frozenset[str]:
        """Kinds of which more images are in doubt than found, beyond what their copies would have it.

        Damage leaves few in doubt, and the copies say how many. What clean images are has a tail without an end.
        """
        names = set()
        for number, kind in enumerate(self.kinds, 1):
            of_copies = _sure_and_doubted(self.of_copies[copies.kind == number], number)
            sure, doubted = _sure_and_doubted(probability, number)
            if doubted - sure * of_copies[1] / max(of_copies[0], 1) >= max(sure, 1):
                names.add(kind.name)
        return frozenset(names)

    # -- strengths -----------------------------------------------------------------------------------------

    def _read(self, probability: Tensor, trusted: Tensor, copies: _Copies) -> Comparison:
        strength = torch.full((len(probability), len(self.kinds)), math.nan, dtype=torch.float64)
        found = Comparison(self.kinds, probability, strength, {}, self._unsupported(probability, copies))
        for number, kind in enumerate(self.kinds, 1):
            asked = (found.shows(kind.name) | found.doubted(kind.name)).nonzero().flatten()
            if not len(asked):
                continue
            mine = copies[copies.kind == number]
            strength[asked, number - 1] = self._reader(number, mine, trusted)(self.features[asked]).exp().double()
            area = self._area(number, found.shows(kind.name), trusted, mine)
            if area is not None:
                found.told_apart[kind.name] = area
        return found
