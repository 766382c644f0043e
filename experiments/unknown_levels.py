"""Images of unknown noise in worlds of known truth: what `--auto` recovers, beside being told, rightly and wrongly.

    python -m experiments.unknown_levels --output experiments/results/unknown_levels.json    # about 3 minutes, one core

Worlds: Gaussian images of 8 x 8 pixels, smooth and rough, and draws of the 16-dimensional subspace world of digits.
Noise is added to shares of the images that nobody is told; the audit of `--auto` (`robustdiff.audit.run`) looks at
the images. What training then makes of its answer is not trained but computed: the best linear denoiser at every level
(docs/explanation/theory.md, T13; T6 for the regulariser) and the variance that DDIM generates with it. So the only
chance is in the images and the audit. The distance is the squared Frechet distance of the generated covariance to the
true one; there is no sampling in it, so the floor is what the same steps make of the true denoiser.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from experiments.paper import linear
from experiments.paper.worlds import LinearGaussian, Subspace
from robustdiff.audit.result import AuditResult
from robustdiff.audit.run import audit
from robustdiff.data.dataset import load_images

RESULT = Path(__file__).parent / "results" / "unknown_levels.json"
COUNT, CALLS, SEEDS = 4000, 250, (0, 1, 2)
MIXTURES: Mapping[str, Mapping[float, float]] = {
    "90 % at 0.2": {0.0: 0.1, 0.2: 0.9},
    "30 % clean, 20 % at 0.05, 20 % at 0.1, 30 % at 0.2": {0.0: 0.3, 0.05: 0.2, 0.1: 0.2, 0.2: 0.3},
    "25 % clean, the rest anywhere from 0.05 to 0.4": {0.0: 0.25},
    "all at 0.2": {0.2: 1.0},
    "all clean": {0.0: 1.0},
}
"""Shares by noise level; what is missing from 1 has levels drawn log-uniformly."""
ANYWHERE = (0.05, 0.4)
POWERS = {"Gaussian": 2.0, "Gaussian, rough": 1.0}
"""Variance falls as (1 + f^2)^-power: the smallest is .0009, or .032, as much as white noise of .18 would add."""
STRENGTH = 5.0
"""m of the regulariser that `--auto` falls back on."""
FLIPPED = 0.2

Levels = tuple[Tensor, Tensor]


def worlds() -> dict[str, tuple[LinearGaussian | Subspace, Tensor]]:
    """By name: the world, and all eigenvalues of its covariance, float64, shape (64,)."""
    side = 8
    frequency = torch.arange(side, dtype=torch.float64)
    square = (1 + frequency[:, None].square() + frequency.square()).flatten()
    place = (torch.arange(side, dtype=torch.float64) + 0.5)[:, None]
    wave = torch.cos(torch.pi / side * place * frequency)
    wave = wave / wave.norm(dim=0)
    found: dict[str, tuple[LinearGaussian | Subspace, Tensor]] = {}
    for name, power in POWERS.items():
        spectrum = square**-power
        variances = spectrum / spectrum.mean() * 0.25
        found[name] = LinearGaussian(variances, torch.kron(wave, wave)), variances
    digits = load_images("digits")
    subspace = Subspace(digits.x0(slice(0, len(digits))), 16, smoothing=0.5)
    rest = torch.zeros(64 - 16, dtype=torch.float64)
    return found | {"subspace": (subspace, torch.cat([subspace.variances, rest]))}


def draw(world: LinearGaussian | Subspace, mixture: Mapping[float, float], seed: int) -> tuple[Tensor, Tensor]:
    """Images, (N, 1, H, W), and the noise level of each, float64, shape (N,)."""
    generator = torch.Generator().manual_seed(seed)
    x0 = world.sample(COUNT, generator)
    levels = torch.cat([torch.full((round(share * COUNT),), level).double() for level, share in mixture.items()])
    low, high = ANYWHERE
    others = low * (high / low) ** torch.rand(COUNT - len(levels), generator=generator, dtype=torch.float64)
    levels = torch.cat([levels, others])[torch.randperm(COUNT, generator=generator)]
    side = round((x0[0].numel()) ** 0.5)
    x0 = x0.reshape(COUNT, 1, side, side)
    return x0 + (levels[:, None, None, None] * torch.randn(x0.shape, generator=generator)).float(), levels


def sampler() -> Tensor:
    """alpha_bar at the levels that DDIM visits, then 1; shape (CALLS + 1,)."""
    scheduler = DDPMScheduler()
    last = len(scheduler.alphas_cumprod)
    visited = torch.arange(last, 0, -(last // CALLS)) - 1
    return torch.cat([scheduler.alphas_cumprod.double()[visited], torch.ones(1).double()])


def generated(v: Tensor, noise: Tensor, trust: AuditResult) -> Tensor:
    """Variance per direction that the sampler generates, shape (d,), after training on a plan.

    Args:
        v: Eigenvalues of the clean covariance, (d,).
        noise: The true level of each image, (N,).
        trust: What training believes, image by image.
    """
    alpha_bar = sampler()
    level = ((1 - alpha_bar) / alpha_bar).sqrt()[:-1]
    weight = (trust.weight * (level[:, None] > trust.min_sigma)).double()
    if trust.regularise is not None:
        low, high = trust.regularise
        m = torch.where((level >= low) & (level <= high), STRENGTH, 0.0)
        dirt = float((trust.weight * noise.square()).sum() / trust.weight.sum())
        return linear.ddim_variance(alpha_bar, linear.optimum(alpha_bar[:-1], v + dirt, m))
    trained = weight.sum(1) > 0
    floor = float(level[trained].min())  # lower levels have no image: label floor, as the plan of a run says
    asked = level.clamp(min=floor)
    weight = torch.where(trained[:, None], weight, weight[trained][-1])
    alpha_asked = 1 / (1 + asked.square())
    w = linear.levelled_optimum(alpha_asked, v, noise, trust.noise_std, weight)
    # the state is rescaled to the signal scale of the level asked for, and the answer is an image
    sigma, sigma_asked = (1 - alpha_bar[:-1]).sqrt(), (1 - alpha_asked).sqrt()
    image = 1 - sigma_asked[:, None] * w  # x0_hat over y = x_t / alpha
    return linear.ddim_variance(alpha_bar, (1 - image) / sigma[:, None])


def frechet(v: Tensor, w: Tensor) -> float:
    """Squared Frechet distance of Gaussians of one mean and one eigenbasis."""
    return float((v.sqrt() - w.sqrt()).square().sum())


def believing(levels: Tensor) -> AuditResult:
    """The plan of a run that is told these levels."""
    return replace(AuditResult.of_clean(len(levels)), noise_std=levels, min_sigma=levels)


def wrong(levels: Tensor, seed: int) -> dict[str, Tensor]:
    """What a run may wrongly be told."""
    generator = torch.Generator().manual_seed(seed + 1000)
    flip = torch.rand(len(levels), generator=generator) < FLIPPED
    noisy = levels > 0
    usual = float(levels[noisy].median())
    flipped = torch.where(flip, torch.where(noisy, 0.0, usual), levels)
    return {
        "told half": levels * 0.5,
        "told 0.9 of it": levels * 0.9,
        "told 1.1 times": levels * 1.1,
        "told twice": levels * 2,
        "20 % of the flags flipped": flipped,
    }


def rows() -> list[dict[str, Any]]:
    """Every world, mixture and seed."""
    found = []
    for name, (world, v) in worlds().items():
        for mixture, shares in MIXTURES.items():
            for seed in SEEDS:
                started = time.perf_counter()
                images, noise = draw(world, shares, seed)
                auto = audit(images)
                plans = {"plain": believing(torch.zeros_like(noise)), "told": believing(noise), "auto": auto}
                if bool((noise > 0).any()):
                    plans |= {what: believing(levels) for what, levels in wrong(noise, seed).items()}
                true = generated(v, torch.zeros_like(noise), believing(torch.zeros_like(noise)))
                results = {"floor": true} | {what: generated(v, noise, plan) for what, plan in plans.items()}
                called = torch.ones_like(noise) > 0 if auto.regularise else auto.noise_std > 0
                error = (auto.noise_std - noise)[noise > 0]
                found.append(
                    {
                        "world": name,
                        "mixture": mixture,
                        "seed": seed,
                        "missed": int(((noise > 0) & ~called).sum()),
                        "false": int(((noise == 0) & called).sum()),
                        "noisy": int((noise > 0).sum()),
                        "regularised": auto.regularise is not None,
                        "level_error": None
                        if auto.regularise or not len(error)
                        else float(error.square().mean().sqrt()),
                        "frechet": {what: frechet(v, w) for what, w in results.items()},
                        "spread": {what: float((w.sum() / v.sum()).sqrt()) for what, w in results.items()},
                        "seconds": round(time.perf_counter() - started, 1),
                    }
                )
                print(json.dumps(found[-1]), flush=True)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """In markdown: mean distance over the seeds, and what share of noisy images was missed, of clean ones accused."""
    methods = list(max((row["frechet"] for row in found), key=len))
    lines = [f"| world | noise | missed | false | {' | '.join(methods)} |", f"|:--|:--|--:|--:|{'--:|' * len(methods)}"]
    for world, mixture in dict.fromkeys((row["world"], row["mixture"]) for row in found):
        same = [row for row in found if (row["world"], row["mixture"]) == (world, mixture)]
        noisy, missed, false = (sum(row[key] for row in same) for key in ("noisy", "missed", "false"))
        clean = COUNT * len(same) - noisy
        cells = [f"{missed / noisy:.1%}" if noisy else "-", f"{false / clean:.1%}" if clean else "-"]
        for method in methods:
            values = [row["frechet"][method] for row in same if method in row["frechet"]]
            mark = "*" if method == "auto" and any(row["regularised"] for row in same) else ""
            cells.append(f"{statistics.fmean(values):.4f}{mark}" if values else "-")
        lines.append(f"| {world} | {mixture} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n\\* all called noisy: regularised.\n"


def main() -> None:
    """Print every row as it comes; write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    found = rows()
    print(table(found))
    if arguments.output:
        protocol = {"images": COUNT, "calls": CALLS, "seeds": list(SEEDS), "anywhere": list(ANYWHERE), "m": STRENGTH}
        arguments.output.write_text(json.dumps({"protocol": protocol, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
