"""How far each image lies from the others in features: foreign pictures that nothing else about them gives away."""

from __future__ import annotations

import math
import warnings

import torch
from sklearn.covariance import MinCovDet
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.survey import Survey

COMPONENTS = 32
"""Leading principal components of the features: the robust covariance needs many images for each."""
IMAGES_EACH = 10
"""Fewest images for each component."""
FIT = 20_000
"""The covariance is fitted on at most so many images, evenly spread."""
SUPPORT = 0.75
"""Share of the images that the covariance is of: up to a quarter may be foreign."""


@register_detector
class FeatureOutliers(Detector):
    """Foreign pictures, if features are given: measured and shown, and not acted on."""

    name = "far"
    title = "far from the others in features"
    order = 70
    acts = False
    least_side = 1

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """Keep the distance of every image as a sign."""
        if survey.features is not None:
            name, values = survey.features
            survey.add(signs={**survey.result.signs, "distance": robust_distance(values)}, features=name)


def robust_distance(features: Tensor) -> Tensor:
    """Mahalanobis distance with a robust mean and covariance, in the leading principal components of the features.

    Divided by the root of their number: images that are like the others have about 1.

    Args:
        features: Finite, shape (N, d).

    Returns:
        float64, shape (N,), all 0 where features do not vary, or N is below twenty.

    Source: minimum covariance determinant, Rousseeuw & Van Driessen (1999); scikit-learn's.
    """
    x = features.double()
    x = x - x.mean(0)
    components = min(COMPONENTS, x.shape[1], len(x) // IMAGES_EACH)
    if components < 2 and len(x) < 2 * IMAGES_EACH:
        return torch.zeros(len(x), dtype=torch.float64)
    values, basis = torch.linalg.eigh(x.T @ x / len(x))
    leading = [k for k in range(len(values) - components, len(values)) if values[k] > 1e-9 * values[-1] > 0]
    if not leading:
        return torch.zeros(len(x), dtype=torch.float64)
    scores = (x @ basis[:, leading] / values[leading].sqrt()).numpy()
    sample = scores[:: -(-len(scores) // FIT)]
    with warnings.catch_warnings():  # of a covariance without full rank: the pseudo-inverse is used
        warnings.simplefilter("ignore")
        robust = MinCovDet(support_fraction=SUPPORT, random_state=0).fit(sample)
    return torch.from_numpy(robust.mahalanobis(scores)).clamp(min=0).sqrt() / math.sqrt(len(leading))
