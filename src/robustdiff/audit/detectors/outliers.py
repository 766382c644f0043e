"""Odd pictures, which the spectrum of the others does not describe, and pictures of one colour."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit import mixture
from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.spectral_model import separate
from robustdiff.audit.survey import FEWEST, Survey

ODD = 6.0
"""Robust deviations of the misfit beyond which an image weighs less."""
MATTER, USUAL = mixture.LEAST_SHARE, 0.2
"""Least share of odd images that is acted on: every large set has some in its tail, and training is plain without; and
the largest: what is so common is one of the things that the set is of."""
BETWEEN = 2.4
"""Odd images for each that is half as odd, at least: fewer are the tail of what the set is."""


@register_detector
class Outliers(Detector):
    """Odd pictures weigh less, the less the odder; those of one colour hold no picture."""

    name = "outliers"
    title = "unlike the others"
    order = 50

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """Look for both among what the other kinds left."""
        if int(survey.clean.sum()) >= FEWEST:
            _odd(survey)
        if bool(survey.blank.any()):
            weight = torch.where(survey.blank, 0.0, survey.result.weight)
            finding = Finding(self.name, int(survey.blank.sum()), "of one colour", Action.LEFT_OUT)
            survey.add(finding, survey.blank, weight=weight)


def _odd(survey: Survey) -> None:
    clean, before = survey.clean, survey.result
    z = separate(survey.energies, ~survey.foreign).oddness(clean)
    survey.add(signs={**before.signs, "oddness": z})
    odd = (clean | survey.foreign) & (z > ODD)
    between = clean & (z > ODD / 2) & ~odd
    if not (MATTER <= float(odd.double().mean()) <= USUAL and int(odd.sum()) >= BETWEEN * int(between.sum())):
        return
    weight = torch.where(odd, before.weight * (ODD / z.clamp(min=ODD)).square(), before.weight)
    what = f"{Outliers.title}, by more than {ODD:g} robust deviations"
    survey.add(Finding(Outliers.name, int(odd.sum()), what, Action.LESS_OFTEN), odd, weight=weight)
