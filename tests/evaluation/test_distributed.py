"""`robustdiff evaluate` on two processes: each has its share, one writes what one alone would, an error ends all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_UNET
from launches import LIMIT, launch, launched
from robustdiff.commands import main

N = 60

# `robustdiff`, telling which batches this process computes; one is broken or reads another reference if asked.
PROGRAM = """
import os, sys
from robustdiff.commands import main
from robustdiff.evaluation import distributed

rank = os.environ["RANK"]

def compute(extractor, images, batch_size, progress=None, starts=None, original=distributed.compute):
    with open(os.environ["COMPUTED"] + rank, "a") as file:
        file.write(f"{extractor.name} {len(images)} {list(starts or [])}\\n")
    if os.environ.get("BROKEN") == rank:
        raise OSError(5, "Input/output error", "weights.bin")
    return original(extractor, images, batch_size, progress, starts)

distributed.compute = compute
other = os.environ.get("OTHER") == rank
sys.exit(main.main([text.replace("reference.npy", "training.npy") if other else text for text in sys.argv[1:]]))
"""


class Features(torch.nn.Module):
    """A convolution and two statistics: 32 features."""

    def __init__(self) -> None:
        """Seeded weights."""
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.convolution = torch.nn.Conv2d(3, 16, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 32)."""
        x = self.convolution(x.float() / 255).relu()
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def images(count: int, seed: int) -> np.ndarray:
    """Smooth grey images."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(30, 220, (count, 4, 4)).repeat(2, 1).repeat(2, 2)
    return (coarse + random.normal(0, 5, coarse.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, real images, an extractor and the program."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, count, seed in (("training", N, 1), ("reference", 2 * N, 2), ("held_out", N, 3)):
        np.save(folder / f"{name}.npy", images(count, seed))
    (folder / "unet.json").write_text(json.dumps(TINY_UNET))
    torch.jit.script(Features()).save(str(folder / "small.pt"))
    (folder / "program.py").write_text(PROGRAM)
    flags = ["--images", "16", "--batch-size", "8", "--ddpm-num-steps", "100", "--ddpm-num-inference-steps", "10"]
    unet = ["--model-config-name-or-path", str(folder / "unet.json"), "--output-dir", str(folder / "run")]
    assert main.main(["train", str(folder / "training.npy"), *flags, *unet]) == 0
    return folder


def command(place: Path, out: Path, *more: str) -> list[str]:
    sets = ["--reference", str(place / "reference.npy"), "--held-out", str(place / "held_out.npy")]
    extractors = ["--extractor", "pixels", "--extractor", str(place / "small.pt")]
    drawing = ["-n", "20", "--steps", "10", "--batch-size", "16", "--few-step", "5", *more]
    return ["evaluate", str(place / "run"), *sets, *extractors, *drawing, "-o", str(out), "--cache", str(out / "cache")]


def results(folder: Path) -> dict[str, object]:
    """Every result without what no two runs share."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: {key: value for key, value in result.items() if key != "seconds"} for name, result in found.items()}


@pytest.mark.slow
def test_two_processes_share_the_features_and_find_what_one_finds(place: Path, tmp_path: Path) -> None:
    """The two of them first: one process then judges the same drawn images."""
    two, one = tmp_path / "two", tmp_path / "one"
    watch = {"WATCHED": str(two), "WATCH_LOG": str(tmp_path / "log"), "COMPUTED": str(tmp_path / "computed")}
    out = launch(str(place / "program.py"), *command(place, two), processes=2, folder=tmp_path, **watch)
    assert out.count("  FD-small  ") == 1  # printed once
    first, second = ((tmp_path / f"computed{rank}").read_text().splitlines() for rank in "01")
    # generated, reference, held-out, training and few-step images in batches of sixteen
    shares = [(20, [0], [16]), (120, [0, 16, 32, 48], [64, 80, 96, 112])]
    shares += [(60, [0, 16], [32, 48])] * 2 + [(20, [0], [16])]
    assert [line for line in first if "small" in line] == [f"small {count} {mine}" for count, mine, _ in shares]
    assert second == [f"small {count} {others}" for count, _, others in shares]  # pixels are the first one's alone
    assert {line.split(" ")[0] for line in (tmp_path / "log").read_text().splitlines()} == {"0"}
    assert len(list((two / "cache").glob("*.safetensors"))) == len(shares)

    shutil.copytree(two / "drawn", one / "drawn")
    assert main.main(command(place, one)) == 0
    assert len(results(one)) == 6
    assert results(two) == results(one)
    for path in (one / "cache").iterdir():
        assert torch.equal(load_file(path)["features"], load_file(two / "cache" / path.name)["features"])


@pytest.mark.slow
def test_a_process_that_fails_in_its_share_ends_all(place: Path, tmp_path: Path) -> None:
    arguments = command(place, tmp_path / "out")
    """The message is that process's, the other one says no more than that someone stopped, and nothing is kept."""
    more = {"COMPUTED": str(tmp_path / "computed"), "BROKEN": "1"}
    with launched(str(place / "program.py"), *arguments, folder=tmp_path, **more) as launcher:
        _, error = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode not in (0, None)
    ours = [line for line in error.splitlines() if line.startswith("robustdiff (process ")]
    assert sum("(process 1): cannot read or write weights.bin: Input/output error" in line for line in ours) == 1, error
    for line in ours:
        assert "(process 1)" in line or line.endswith("another process stopped: see its message"), error
    assert not list((tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("cache/*"))


@pytest.mark.slow
def test_processes_with_other_images_are_refused(place: Path, tmp_path: Path) -> None:
    """Or nobody would notice what is judged."""
    arguments = command(place, tmp_path / "out")
    more = {"COMPUTED": str(tmp_path / "computed"), "OTHER": "1"}
    with launched(str(place / "program.py"), *arguments, folder=tmp_path, **more) as launcher:
        _, error = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode not in (0, None)
    ours = [line for line in error.splitlines() if line.startswith("robustdiff (process ")]
    assert any("--reference or --extractor pixels: not all processes read the same images" in line for line in ours)
    assert all("not all processes" in line or "another process stopped" in line for line in ours), error
    assert not list((tmp_path / "out").glob("*.json"))
