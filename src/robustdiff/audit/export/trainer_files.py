"""What the files of one trainer are made of, and the registry in which command and documents find all trainers.

A trainer is one file in ``trainers/``, found by being there. It names the keys of its format as its authors do, with
where and when they were read; tests hold every file against them.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from robustdiff.audit.export.groups import ALL, HIGH, LEFT_OUT, Group, Stage, first_timestep, flow_sigma, groups, stages
from robustdiff.audit.result import AuditResult
from robustdiff.utils.errors import UsageError
from robustdiff.utils.words import counted

CAPTIONS = (".txt", ".caption")
"""Suffixes of the file beside an image that holds its caption."""
NO_CAPTION = "image"
"""Said of images that have none, where a trainer refuses them without."""
FOLDERS = "images"
"""The folder of links or copies, one folder a group in it."""


@dataclass(frozen=True, eq=False)
class Exported:
    """Everything that a trainer's files say.

    Attributes:
        found: The audit.
        root: The folder that its names are relative to, absolute.
        folder: Where the files will lie, absolute.
        vae: The autoencoder whose latents the levels are of; None: they are of pixels.
    """

    found: AuditResult
    root: Path
    folder: Path
    vae: str | None = None

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Images by least noise level; those left out last."""
        return groups(self.found)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The runs that train them, highest noise first."""
        return stages(self.groups)

    def name(self, place: int) -> str:
        """An image as the audit calls it."""
        return self.found.names[place]

    def path(self, place: int) -> Path:
        """Its file."""
        return self.root / self.name(place)

    def caption(self, place: int) -> str:
        """What the file beside it says, or "image"."""
        for suffix in CAPTIONS:
            beside = self.path(place).with_suffix(suffix)
            if beside.is_file():
                return beside.read_text(encoding="utf-8", errors="replace").strip() or NO_CAPTION
        return NO_CAPTION

    def size(self, place: int) -> tuple[int, int]:
        """Its width and height; nothing is decoded."""
        with Image.open(self.path(place)) as image:
            return image.size

    def beside(self, name: str) -> str:
        """The absolute path of another file of the export."""
        return str(self.folder / name)

    def captions(self, group: Group) -> str:
        """A JSON object of absolute paths, each with its ``caption``: sd-scripts' metadata, ai-toolkit's data set."""
        return as_json({str(self.path(place)): {"caption": self.caption(place)} for place in group.places})


class TrainerFiles(ABC):
    """A trainer's own configuration files.

    Attributes:
        name: As ``export`` takes it.
        title: As its authors call it.
        read: Which of its files tell the format, and the version that was read.
        needs_folders: Whether it takes folders only, no lists.
        latent: Whether it trains on latents of an autoencoder.
        honours: What it can keep to today, and what is lost, in lines for people.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    read: ClassVar[str]
    needs_folders: ClassVar[bool] = False
    latent: ClassVar[bool] = True
    honours: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def files(self, exported: Exported) -> Mapping[str, str]:
        """Texts of its files by their names.

        Args:
            exported: What they say.
        """

    def run(self, exported: Exported, stage: Stage) -> Sequence[str]:
        """How a stage is run, in lines for people; empty if the trainer has no stages."""
        return ()

    def notes(self, exported: Exported) -> str:
        """What the files are, the units of every number, and how to use them."""
        lines = [
            f"robustdiff export: {self.title}",
            f"Format as in {self.read}.",
            f"Images: {exported.root}",
            "",
            "Levels are sigma/alpha, the noise level of the diffusion process. Of flow matching s = c / (1 + c) for a",
            "level c; that s has any shift already in it.",
            _where(exported.vae),
            "",
            *(line for text in self.honours for line in textwrap.wrap(f"* {text}", 110, subsequent_indent="  ")),
            "",
            "Groups:",
            *(f"  {group.slug}: {counted(len(group.places), 'image')}, {group.title}" for group in exported.groups),
        ]
        if holed := int(exported.found.has_missing.sum()):
            lines.append(f"  {holed} of those left out have lost pixels, which no trainer here fills in.")
        if exported.stages and self.run(exported, exported.stages[0]):
            lines += ["", "Stages, each going on from the one before; how long each should be was not measured:"]
            for stage in exported.stages:
                lines += [f"  {stage.slug}: {units(stage.level)}", *(f"    {x}" for x in self.run(exported, stage))]
        return "\n".join(lines) + "\n"


def _where(vae: str | None) -> str:
    """What levels are of."""
    if vae is None:
        return "They are of images in [-1, 1], at the size that was looked at; for latents of an autoencoder too low."
    return f"They are of the latents of {vae}, measured with white noise on clean images of the set."


def units(level: float) -> str:
    """A level in every unit, for comments."""
    if not level:
        return "every noise level"
    return (
        f"sigma/alpha >= {level:g}; flow matching: s = c / (1 + c) >= {flow_sigma(level):.4g}, shift included; "
        f"timestep >= {first_timestep(level)} of 1000 in Stable Diffusion 1, 2, XL"
    )


def as_json(value: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    """Readable JSON; names that are no text are escaped."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def quoted(text: str | Path) -> str:
    """A string as TOML and YAML read it."""
    return json.dumps(str(text), ensure_ascii=False)


def trainers() -> Mapping[str, TrainerFiles]:
    """Every trainer there is, by name."""
    package = importlib.import_module("robustdiff.audit.export.trainers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    kinds = [kind() for kind in TrainerFiles.__subclasses__() if kind.__module__.startswith(package.__name__)]
    return {kind.name: kind for kind in sorted(kinds, key=lambda kind: kind.name)}


def trainer(name: str) -> TrainerFiles:
    """The trainer of a name.

    Raises:
        UsageError: If there is none.
    """
    known = trainers()
    if name not in known:
        raise UsageError(f"`export` {name!r} is no trainer there is a format for: use one of {', '.join(known)}")
    return known[name]


def lists(exported: Exported, kinds: Sequence[str] = (ALL, HIGH, LEFT_OUT)) -> dict[str, str]:
    """A text file a group with the names of its images, one a line."""
    return {
        f"{group.slug}.txt": "".join(f"{exported.name(place)}\n" for place in group.places)
        for group in exported.groups
        if group.kind in kinds
    }
