"""Distance in features: the chi distribution on normal features, foreign ones far away, and nothing that breaks it."""

import pytest
import scipy.stats
import torch

from helpers import normal
from robustdiff.audit.detectors.feature_outliers import robust_distance


def test_of_normal_features_it_is_chi_whatever_their_covariance() -> None:
    mixing = normal(16, 16, seed=1) + 3 * torch.eye(16)
    distance = robust_distance(normal(4000, 16) @ mixing + 7)
    assert distance.shape == (4000,)
    assert distance.dtype == torch.float64
    for share in (0.1, 0.5, 0.9, 0.99):
        wanted = scipy.stats.chi(16).ppf(share) / 4
        assert distance.quantile(share).item() == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("share", "spread", "away"), [(0.01, 0.1, 6), (0.03, 0.1, 6), (0.15, 6, 0)])
def test_foreign_images_are_far(share: float, spread: float, away: float) -> None:
    """A small cluster of its own, or many of no kind: with the plain covariance they would bend the axes to themselves.

    A tight cluster of 15 % does: it is then the nearest of all.
    """
    features, count = normal(1000, 40), round(1000 * share)
    features[:count, :4] = features[:count, :4] * spread + away
    distance = robust_distance(features)
    assert distance[:count].quantile(0.2) > 1.3 * distance[count:].quantile(0.95)
    assert distance[count:].median() == pytest.approx(1, abs=0.15)


def test_features_that_do_not_vary_and_few_images_say_nothing() -> None:
    assert not robust_distance(torch.ones(100, 8)).any()
    assert not robust_distance(normal(19, 8)).any()
    some = torch.cat([normal(100, 2), torch.zeros(100, 6)], 1)  # two that do
    assert robust_distance(some).isfinite().all()
    torch.testing.assert_close(robust_distance(some), robust_distance(some[:, :2]))
    assert robust_distance(normal(25, 300)).isfinite().all()  # more features than images
