"""The experiment that attacks a classifier behind purification: its numbers against others, and what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from helpers import experiment
from pipelines import SMALL
from robustdiff.data.dataset import ImageDataset


class Thirds(torch.nn.Module):
    """Which third of the height is the brightest: something that small pushes can change."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    @torch.jit.export
    def logits(self, images: Tensor) -> Tensor:
        """Logits, (B, 3), of images in [0, 1]."""
        return 40.0 * torch.stack([part.flatten(1).mean(1) for part in images.split([3, 2, 3], dim=2)], dim=1)


@pytest.fixture
def purified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = experiment("purified_cifar10")
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **SMALL)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(tmp_path / "model")
    torch.jit.script(Thirds()).save(str(tmp_path / "thirds.pt"))
    images = torch.randint(90, 166, (6, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    labels = Thirds().logits(images / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    found = ImageDataset("here", images, [str(i) for i in range(6)], (), {}, ("top", "middle", "bottom"), labels)
    monkeypatch.setattr(module, "load_images", lambda *_, **__: found)
    return module


def run(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict:
    arguments = ["--data", "here", "--model", str(folder / "model"), "--classifier", str(folder / "thirds.pt")]
    arguments += ["--output", str(folder / "out.json"), "--device", "cpu", "--batch-size", "4", *flags]
    arguments += ["--calls", "2", "--steps", "4", "--eot", "2", "--verdicts", "3"]
    monkeypatch.setattr(sys, "argv", ["purified_cifar10.py", *arguments])
    module.main()
    return json.loads((folder / "out.json").read_text())


def test_accuracy_with_and_without_purification(
    purified: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objectives = []
    attack = purified.PGD.__call__

    def watched(self, objective, *arguments, **settings):
        objectives.append((getattr(objective, "fresh", None), getattr(objective, "terms", None), self.keep, self.steps))
        return attack(self, objective, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(purified.PGD, "__call__", watched)
        found = run(purified, tmp_path, monkeypatch, "-n", "4", "--strengths", "0.02", "0.5")
    assert objectives == [(None, 1, "best", 4)] + 2 * [(False, 2, "best", 4), (True, 2, "last", 4)]
    assert [parts["0"]["images"] for parts in found["rows"].values()] == [4, 4, 4]
    bare = found["rows"][purified.ALONE]["0"]["right"]
    assert bare["clean"] == [3, 3]  # one label is wrong
    assert bare["attacked"][0] < bare["random"][0]
    for strength in ("0.02", "0.5"):
        right = found["rows"][strength]["0"]["right"]
        assert right.keys() == {"clean", "random", "transferred", "fixed", "fresh"}
        assert all(every <= mean <= 4 for mean, every in right.values())
    weak = found["rows"]["0.02"]["0"]["right"]
    assert weak["fixed"][0] < weak["clean"][0]
    assert weak["fresh"][0] < weak["clean"][0]
    assert "| classifier alone | 4 | 75.0 |" in capsys.readouterr().out
    # more images: what is there stays as it is
    more = run(purified, tmp_path, monkeypatch, "-n", "6", "--strengths", "0.02")
    assert {name: parts["0"] for name, parts in more["rows"].items()} == {
        name: parts["0"] for name, parts in found["rows"].items()
    }
    assert more["rows"]["0.02"]["4"]["images"] == 2
    with pytest.raises(SystemExit, match="of other settings"):
        run(purified, tmp_path, monkeypatch, "--seed", "1")


def test_what_has_no_logits_is_refused(purified: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "thirds.pt"))
    with pytest.raises(SystemExit, match="no method `logits`"):
        run(purified, tmp_path, monkeypatch)
