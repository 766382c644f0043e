"""What accelerate's launcher, its configuration or the environment says is followed, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_line import fails, grey, tree
from launches import environment
from robustdiff.commands import main
from robustdiff.training.processes import build_accelerator

COMMAND = ("train", "digits", "--network", "tiny", "--train-batch-size", "2", "--preview-images", "0", "--images", "8")
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISION = "ACCELERATE_MIXED_PRECISION"


@pytest.mark.parametrize(
    ("variables", "flags", "words"),
    [
        (
            {ACCUMULATION: "4"},
            [],
            ("accumulation_steps 4", "--gradient-accumulation-steps is 1", ACCUMULATION),
        ),
        ({ACCUMULATION: "4"}, ["--gradient-accumulation-steps", "2"], ("--gradient-accumulation-steps is 2",)),
        ({ACCUMULATION: "auto"}, [], ("gradient_accumulation_steps auto",)),
        ({PRECISION: "bf16"}, [], ("mixed_precision bf16", "--mixed-precision is no", "give the same here")),
        ({PRECISION: "fp16"}, ["--mixed-precision", "bf16"], ("mixed_precision fp16", "--mixed-precision is bf16")),
        ({PRECISION: "fp8"}, [], ("mixed_precision fp8",)),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], ("dynamo_backend INDUCTOR", "add --compile")),
        ({"ACCELERATE_DYNAMO_BACKEND": "eager"}, ["--compile"], ("dynamo_backend eager",)),
        ({"ACCELERATE_TORCH_DEVICE": "gpu0"}, [], ("ACCELERATE_TORCH_DEVICE gpu0 cannot be used here",)),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, [], ("ACCELERATE_TORCH_DEVICE meta cannot be used here",)),
        ({"ACCELERATE_USE_FSDP": "true"}, [], ("FSDP (ACCELERATE_USE_FSDP)", "--multi_gpu")),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], ("DeepSpeed", "--multi_gpu")),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, [], ("Megatron-LM", "--multi_gpu")),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], ("parallelism_config", "--multi_gpu")),
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, [], ("SageMaker", "--multi_gpu")),
        ({"ACCELERATE_USE_CPU": "maybe"}, [], ("ACCELERATE_USE_CPU is 'maybe'", "true or false")),
        ({"ACCELERATE_DEBUG_MODE": "2"}, [], ("ACCELERATE_DEBUG_MODE is '2'",)),
        ({"ACCELERATE_CPU_AFFINITY": ""}, [], ("ACCELERATE_CPU_AFFINITY is ''",)),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_one_line(variables, flags, words, here: Path, monkeypatch, capsys) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = fails(capsys, *COMMAND, *flags, "--dry-run")
    assert all(word in line for word in words), line
    assert tree(here) == {}


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "run"),
        ("evaluate", "run", "--reference", "digits"),
        ("attack", "run"),
        ("purify", "photos", "run", "-o", "clean"),
        ("corrupt", "photos", "dirty", "--poison", "run", "--poison-radius", "0.1"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({PRECISION: "bf16"}, ("mixed_precision bf16", "only training follows it: say no there")),
        ({PRECISION: "fp16"}, ("mixed_precision fp16",)),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ("dynamo_backend INDUCTOR",)),
        ({"ACCELERATE_TORCH_DEVICE": "gpu0"}, ("ACCELERATE_TORCH_DEVICE gpu0 cannot be used here",)),
        ({"ACCELERATE_USE_FSDP": "true"}, ("FSDP",)),
    ],
    ids=str,
)
def test_what_does_not_train_refuses_it_too(
    command, variables, words, here: Path, pipeline, monkeypatch, capsys
) -> None:
    """Its images would be those of float32, and nobody told."""
    for name, value in {**variables, ACCUMULATION: "4"}.items():  # which means nothing here
        monkeypatch.setenv(name, value)
    grey(here / "photos" / "1.png")
    (here / "run").symlink_to(pipeline)
    before = tree(here)
    line = fails(capsys, *command)
    assert all(word in line for word in words), line
    assert "compile" not in line
    assert tree(here) == before


@pytest.mark.parametrize("variables", [{}, {PRECISION: "no", ACCUMULATION: "4", "ACCELERATE_DYNAMO_BACKEND": "no"}])
def test_what_does_not_train_goes_on_where_it_can(variables, here: Path, pipeline: Path, monkeypatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main.main(["sample", str(pipeline), "-n", "1", "--steps", "1", "-o", "x"]) == 0


@pytest.mark.parametrize(
    ("variables", "settings"),
    [
        ({}, {}),
        ({ACCUMULATION: "1", PRECISION: "no", "ACCELERATE_DYNAMO_BACKEND": "no"}, {"gradient_accumulation_steps": 4}),
        ({ACCUMULATION: "4", PRECISION: "bf16"}, {"gradient_accumulation_steps": 4, "mixed_precision": "bf16"}),
        ({PRECISION: "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, {"mixed_precision": "bf16"}),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_DEBUG_MODE": "true", "ACCELERATE_USE_FSDP": "false"}, {}),
        ({"ACCELERATE_TORCH_DEVICE": "cpu"}, {}),
    ],
    ids=str,
)
def test_what_is_the_same_is_followed_once(variables, settings, monkeypatch) -> None:
    """The gradient is that of the loss: accelerate, told of four passes, would divide it by four."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accelerator = build_accelerator(**settings)
    assert accelerator.mixed_precision == settings.get("mixed_precision", "no")
    weight = torch.tensor(2.0, requires_grad=True)
    accelerator.backward(3 * weight)
    assert weight.grad == 3


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["mixed_precision: bf16", "dynamo_config: {dynamo_backend: INDUCTOR}"])
def test_entries_of_the_configuration_file_are_variables_too(entry: str, here: Path, tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    entries = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "'NO'",
        "num_processes": 1,
        "use_cpu": "true",
    }
    config.write_text("\n".join([*(f"{name}: {value}" for name, value in entries.items()), entry]) + "\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "robustdiff"]
    done = subprocess.run(
        [*launch, *COMMAND, "--dry-run"], capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("robustdiff")]
    assert len(ours) == 1
    assert ours[0].startswith("robustdiff: accelerate is set to ")
    assert tree(here) == {}
