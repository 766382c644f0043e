"""Levels of pixels as latents have them: against encoders whose answer to noise is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from audits import save
from helpers import seeded
from robustdiff.audit import AuditResult, in_latents
from robustdiff.audit.export.write import Export
from robustdiff.utils.errors import UsageError

IMAGES = torch.rand(8, 3, 64, 64, generator=seeded(0)) * 2 - 1


def audit(min_sigma: list[float], noise_std: list[float]) -> AuditResult:
    clean = AuditResult.of_clean(len(min_sigma))
    floor, noise = (torch.tensor(x, dtype=torch.float64) for x in (min_sigma, noise_std))
    return replace(clean, min_sigma=floor, noise_std=noise, regularise=(0.1, 0.4))


def test_a_linear_encoder_scales_levels() -> None:
    made = in_latents(audit([0.0, 0.1, 0.3, 0.5], [0.0, 0.1, 0.0, 0.2]), lambda x: 3 * x - 1, IMAGES, seeded(1))
    torch.testing.assert_close(made.min_sigma, torch.tensor([0.0, 0.3, 0.9, 1.5]).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(made.noise_std, torch.tensor([0.0, 0.3, 0.0, 0.6]).double(), rtol=0.01, atol=0)
    assert made.regularise == pytest.approx((0.3, 1.2), rel=0.01)


def test_an_average_of_pixels_answers_less_and_a_root_answers_faint_noise_most() -> None:
    found = audit([0.05, 0.1, 0.2, 0.4], [0.05, 0.1, 0.0, 0.0])
    pooled = in_latents(found, lambda x: torch.nn.functional.avg_pool2d(x, 4), IMAGES, seeded(1))
    torch.testing.assert_close(pooled.min_sigma, found.min_sigma / 4, rtol=0.02, atol=0)
    flat = torch.zeros_like(IMAGES)
    rooted = in_latents(found, lambda x: x.abs().sqrt(), flat, seeded(1))
    known = (found.min_sigma * (2 / torch.pi) ** 0.5).sqrt()  # E|n| = sqrt(2 / pi)
    torch.testing.assert_close(rooted.min_sigma, known, rtol=0.02, atol=0)
    assert (rooted.min_sigma >= rooted.noise_std).all()


def test_a_clean_set_stays_as_it_is_and_one_level_is_enough() -> None:
    clean = AuditResult.of_clean(3)
    assert in_latents(clean, lambda x: pytest.fail("asked"), IMAGES) is clean
    one = in_latents(replace(audit([0.2, 0.0], [0.2, 0.0]), regularise=None), lambda x: 2 * x, IMAGES, seeded(1))
    assert one.min_sigma.tolist() == pytest.approx([0.4, 0.0], rel=0.01)


def test_an_encoder_that_does_not_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="`encode` answers noise"):
        in_latents(audit([0.2], [0.2]), lambda x: x * 0, IMAGES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        pixels = torch.randint(0, 256, (40 + number, 64, 3), generator=seeded(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / name)
    found = replace(AuditResult.of_clean(12, names), min_sigma=torch.tensor([0.0] * 8 + [0.1] * 4).double())
    save(found, tmp_path / "audit", tmp_path / "photos")
    return tmp_path / "photos"


def autoencoder(folder: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=2.0,
        shift_factor=0.5,
    )
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.mark.parametrize("inside", ["", "vae"], ids=["the autoencoder", "a pipeline"])
def test_an_export_takes_the_autoencoder_of_the_model(photos: Path, tmp_path: Path, inside: str) -> None:
    vae = autoencoder(tmp_path / "model" / inside)
    folder = tmp_path / "audit"
    assert "too low for latents: name the model's autoencoder" in Export("kohya", str(photos), str(folder)).write()
    assert "too low for latents" not in Export("metadata", str(photos), str(folder)).write()
    said = Export("kohya", str(photos), str(folder), vae=str(tmp_path / "model")).write()
    assert "too low" not in said
    level = float(next((folder / "export-kohya").glob("from-*.json")).stem.removeprefix("from-"))

    generator, moved = seeded(7), []
    for number in range(8):
        pixels = Image.open(photos / f"{number}.png").convert("RGB").tobytes()
        x = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(1, 40 + number, 64, 3)[:, :40]
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            clean, noisy = (
                (vae.encode(each).latent_dist.mean - 0.5) * 2.0
                for each in (x, x + 0.1 * torch.randn(x.shape, generator=generator))
            )
        moved.append((noisy - clean).square().mean())
    assert level == pytest.approx(torch.stack(moved).mean().sqrt().item(), rel=0.05)
    assert f"of the latents of {tmp_path / 'model'}" in (folder / "export-kohya" / "notes.txt").read_text()


def test_what_is_no_autoencoder_is_said_in_one_line(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`export_vae` .*: no AutoencoderKL of diffusers") as error:
        Export("kohya", str(photos), str(tmp_path / "audit"), vae=str(photos))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="`export_vae` nowhere: there is no such folder"):
        Export("kohya", str(photos), str(tmp_path / "audit"), vae="nowhere")
    vae = autoencoder(tmp_path / "model")
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UsageError, match=r"`export_vae` .*pickled: no AutoencoderKL of diffusers"):
        Export("kohya", str(photos), str(tmp_path / "audit"), vae=str(tmp_path / "pickled"))
    for path in photos.glob("*.png"):
        Image.new("RGB", (6, 6)).save(path)
    with pytest.raises(UsageError, match="`export_vae` needs images of 8 pixels at least"):
        Export("kohya", str(photos), str(tmp_path / "audit"), vae=str(tmp_path / "model")).write()
