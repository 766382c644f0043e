"""Known answers: replayed training images, with noise or twice in the set; fresh draws of the true law."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import normal, seeded
from robustdiff.evaluation.memorisation import CopyTest, find_copies


def pixels(n: int, seed: int, size: int = 48) -> Tensor:
    """Images in 8 bits with neighbouring pixels alike, as [-1, 1] floats, shape (n, size)."""
    smooth = normal(n, size, seed=seed).cumsum(1)
    smooth = smooth / smooth.std(1, keepdim=True)
    return ((smooth * 50 + 128).clamp(0, 255).round() / 127.5 - 1).float()


TRAINING, HELD_OUT = pixels(400, 1), pixels(300, 2)


# -- known answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0, 2])
def test_replayed_training_images_are_caught_to_the_last(noise: int) -> None:
    which = torch.randint(0, 400, (250,), generator=seeded(3))
    replay = TRAINING[which] + torch.randint(-noise, noise + 1, (250, 48), generator=seeded(4)) / 127.5
    found = find_copies(replay, TRAINING, HELD_OUT)
    assert found.by_ratio.flagged == found.by_ratio.of == 250
    assert found.by_ratio.null_flagged == 0
    assert found.by_relative is not None
    assert found.by_relative.flagged == 250
    assert torch.equal(found.nearest, which)
    assert dict(found.copied).items() <= dict(enumerate(torch.bincount(which, minlength=400).tolist())).items()
    assert found.copied[0][1] == int(torch.bincount(which).max())
    assert len(found.copied) == 20
    excess = found.by_ratio.excess
    assert excess is not None
    assert excess[0] == 1
    assert 0.97 < excess[1][0] < 1
    assert excess[1][1] == 1


def test_mirrored_copies_are_found_beside_others() -> None:
    """Each training image counts once, at the lesser of its two distances."""
    generated = torch.cat([pixels(60, 5), TRAINING[[7, 7, 9]].flip(1), TRAINING[[3]]])
    found = find_copies(generated, TRAINING, HELD_OUT, mirrored=(generated.flip(1), HELD_OUT.flip(1)))
    assert found.by_ratio.flagged == 4
    assert found.copied == ((7, 2), (3, 1), (9, 1))
    near = torch.minimum(*(torch.cdist(x.double(), TRAINING.double()) for x in (generated, generated.flip(1))))
    near = near.sort(1).values
    torch.testing.assert_close(found.ratio, near[:, 0] / near[:, 1])
    torch.testing.assert_close(found.relative, near[:, 0] / near[:, :50].mean(1))
    assert find_copies(generated, TRAINING, HELD_OUT).by_ratio.flagged == 1
    with pytest.raises(ValueError, match="mirrored images must have the shape of held_out"):
        find_copies(generated, TRAINING, HELD_OUT, mirrored=(generated, None))


def test_copies_are_counted_among_originals() -> None:
    generated = torch.cat([pixels(60, 5), TRAINING[[7, 7, 9]]])
    found = find_copies(generated, TRAINING, HELD_OUT)
    assert found.by_ratio.flagged == 3
    assert found.copied == ((7, 2), (9, 1))
    assert [pair[:2] for pair in found.pairs[:3]] == [(60, 7), (61, 7), (62, 9)]
    assert len(found.pairs) == 20
    ratios = [pair[2] for pair in found.pairs]
    assert ratios == sorted(ratios)
    assert ratios[:3] == [0, 0, 0]
    distances = torch.cdist(generated[:60].double(), TRAINING.double()).sort(1).values
    torch.testing.assert_close(found.ratio[:60], distances[:, 0] / distances[:, 1])
    torch.testing.assert_close(found.relative[:60], distances[:, 0] / distances[:, :50].mean(1))


@pytest.mark.parametrize("generated", ["exact", "noisy"])
def test_training_images_that_occur_twice_do_not_hide_their_copies(generated: str) -> None:
    """With d2 to the second occurrence, d1 / d2 is 0 / 0 for a copy, and 1 for a noisy one."""
    training = torch.cat([TRAINING, TRAINING[:100], TRAINING[:50]])
    replay = training[400:500] + (0 if generated == "exact" else 1 / 127.5)
    found = find_copies(replay, training, None)
    assert found.by_ratio.flagged == 100
    assert found.repeated == 150
    # the first occurrence is named
    assert torch.equal(found.nearest, torch.arange(100))


def test_an_image_at_the_threshold_is_no_copy() -> None:
    """At 1 and 3 from the two training images the ratio is the threshold; at 0.9 and 3.1 it is below."""
    found = find_copies(torch.tensor([[1.0], [0.9]]), torch.tensor([[0.0], [4.0]]), None)
    assert found.ratio[0] == found.by_ratio.threshold
    assert found.by_ratio.flagged == 1


def test_zero_of_either_sign_is_one_image() -> None:
    training = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [5.0, 5.0]])
    assert find_copies(training[:1], training, None).repeated == 1


def test_indices_are_those_of_the_set_with_its_repetitions() -> None:
    training = torch.cat([TRAINING[:3], TRAINING[:3], TRAINING[3:]])
    found = find_copies(TRAINING[[10]], training, None)
    assert found.nearest.tolist() == [13]
    assert found.copied == ((13, 1),)
    assert found.pairs[0] == (0, 13, 0.0)


def test_fresh_draws_are_flagged_as_often_as_the_null_and_as_theory_says() -> None:
    """In the plane the ratio is below r with probability r^2 (d-dimensional points: r^d): 1/9 at the threshold."""
    uniform = [torch.rand(3000, 2, generator=seeded(seed), dtype=torch.float64) for seed in (1, 2, 3)]
    found = find_copies(uniform[0], uniform[1], uniform[2])
    assert found.by_ratio.share == pytest.approx(1 / 9, abs=0.02)
    assert found.by_ratio.null_share == pytest.approx(1 / 9, abs=0.02)
    assert found.by_ratio.excess is not None
    assert found.by_ratio.excess[1][0] < 0 < found.by_ratio.excess[1][1]
    high = find_copies(pixels(300, 6), TRAINING, HELD_OUT)
    assert high.by_ratio.flagged == 0
    assert high.by_ratio.null_flagged == 0


def test_the_relative_threshold_flags_one_in_a_hundred_fresh_draws() -> None:
    """Mean over 60 draws of everything; the null itself is below its own threshold one time less."""
    rates = []
    for i in range(60):
        draws = [torch.rand(n, 3, generator=seeded(10 * i + j)) for j, n in enumerate((200, 300, 199))]
        found = find_copies(draws[0], draws[1], draws[2]).by_relative
        assert found is not None
        rates.append(found.share)
        assert found.null_flagged == 1
    assert sum(rates) / 60 == pytest.approx(0.01, abs=0.003)


def test_a_small_null_gives_its_smallest_score_for_a_threshold() -> None:
    found = find_copies(HELD_OUT[100:], TRAINING, HELD_OUT[:50])
    assert found.by_relative is not None
    assert found.by_relative.null_flagged == 0
    scores = find_copies(HELD_OUT[:50], TRAINING, None).relative
    assert found.by_relative.threshold == pytest.approx(float(scores.min()), rel=1e-12)


# -- features ----------------------------------------------------------------------------------------


def test_the_histogram_counts_cosines_to_the_most_similar() -> None:
    """Lengths do not matter: the most similar by angle is not the nearest."""
    training = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    angles = torch.tensor([0.0, 0.3, 0.6, 1.5])
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([1.0, 4.0, 2.0, 0.1])[:, None]
    far = torch.tensor([[-1.0, -1.0], [0.0, 1.0]])
    found = find_copies(pixels(4, 5), TRAINING[:2], HELD_OUT[:2], features=(features, training, far)).histogram
    assert found is not None
    assert found.null is not None
    edges = torch.tensor(found.edges)
    assert len(edges) == 41
    assert edges[0] == pytest.approx(-0.75)
    assert edges[-1] == 1
    wanted = torch.zeros(40, dtype=torch.int64)
    for cosine in (1.0, torch.tensor(0.3).cos().item(), torch.tensor(0.6).cos().item(), torch.tensor(1.5).sin().item()):
        wanted[min(int((torch.tensor(cosine) >= edges).sum()) - 1, 39)] += 1
    assert list(found.generated) == wanted.tolist()
    assert found.null[0] == 1  # cos 135 degrees = -0.7071
    assert found.null[-1] == 1
    assert sum(found.null) == 2


def test_features_of_other_images_are_refused() -> None:
    x = normal(4, 3)
    with pytest.raises(ValueError, match="3 features for 4 generated images"):
        find_copies(x, TRAINING[:4, :3], None, features=(x[:3], x, None))
    with pytest.raises(ValueError, match="0 features for 4 held-out images"):
        find_copies(x, TRAINING[:4, :3], x, features=(x, x, None))


# -- what is handed on -------------------------------------------------------------------------------


def test_the_result_is_json_with_every_share_beside_its_null() -> None:
    generated = torch.cat([TRAINING[:5], pixels(20, 5)])
    names = [f"{i}.png" for i in range(400)]
    found = find_copies(generated, TRAINING, HELD_OUT, features=(generated, TRAINING, HELD_OUT))
    entry: dict[str, Any] = json.loads(json.dumps(found.to_json(names), allow_nan=False))
    values = entry["values"]
    assert list(values) == ["near-copies", "near-copies above null", "close copies", "close copies above null"]
    assert values["near-copies"]["value"] == 0.2
    assert values["near-copies"]["floor"] == 0
    assert values["near-copies"]["interval"] == pytest.approx([0.0683, 0.4070], abs=1e-4)  # 5 of 25, tables
    about = {"threshold": 1 / 3, "flagged": 5, "of": 25, "null_flagged": 0, "null_of": 300}
    assert values["near-copies"]["about"] == about
    assert values["near-copies above null"]["value"] == 0.2
    low, high = values["near-copies above null"]["interval"]
    assert 0.06 < low < 0.0683
    assert high == pytest.approx(0.4070, abs=1e-4)
    assert values["close copies"]["floor"] == pytest.approx(2 / 300)
    assert entry["details"]["copied"] == [[i, f"{i}.png", 1] for i in range(5)]
    assert entry["details"]["pairs"][4][:2] == [4, 4]
    assert len(entry["details"]["pairs"]) == 20
    assert sum(entry["details"]["histogram"]["generated"]) == 25
    assert sum(entry["details"]["histogram"]["null"]) == 300


def test_without_held_out_images_there_is_no_null() -> None:
    found = find_copies(pixels(30, 5), TRAINING, None)
    assert found.by_relative is None
    assert [value.name for value in found.values()] == ["near-copies"]
    assert found.values()[0].floor is None
    assert found.to_json()["details"]["histogram"] is None


def test_the_interval_of_the_excess_covers_it() -> None:
    """Exactly, by summing over both binomials: 16 generated images, 12 held out."""
    intervals = {}
    for p, q in ((0.1, 0.05), (0.3, 0.3), (0.02, 0.0)):
        covered = 0.0
        left, right = (torch.distributions.Binomial(n, torch.tensor(r).double()) for n, r in ((16, p), (12, q)))
        for i in range(17):
            for j in range(13):
                if (i, j) not in intervals:
                    excess = CopyTest(1 / 3, i, 16, j, 12).excess
                    assert excess is not None
                    intervals[i, j] = excess[1]
                low, high = intervals[i, j]
                if low <= p - q <= high:
                    weight = left.log_prob(torch.tensor(float(i))) + right.log_prob(torch.tensor(float(j)))
                    covered += float(weight.exp())
        assert 0.95 <= covered < 1.0 + 1e-9


def test_one_training_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two different"):
        find_copies(TRAINING[:3], TRAINING[:1].expand(5, -1), None)
