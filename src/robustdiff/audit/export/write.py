"""Write the files of a trainer into the folder of an audit: whole or not at all, never into the data."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from robustdiff.audit.export.autoencoder import clean_images, encoder
from robustdiff.audit.export.groups import LEFT_OUT, Group
from robustdiff.audit.export.trainer_files import CAPTIONS, FOLDERS, Exported, trainer
from robustdiff.audit.files import check_outside, source_of
from robustdiff.audit.latents import in_latents
from robustdiff.audit.result import AuditResult
from robustdiff.data.sources.base import Files
from robustdiff.data.sources.open import open_source
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import DataError, UsageError
from robustdiff.utils.words import counted

NOTES = "notes.txt"
"""Every export has it; it says what the files are."""
FOUND = "found.json"


class Export:
    """What an audit found, as files of one trainer, in ``FOLDER/export-NAME``.

    Args:
        name: Of the trainer.
        data: The folder of images.
        output: The folder of its audit, or where that will be.
        files: Whether there are folders of images: ``list`` for none, of ``link`` or ``copy``.
        vae: The autoencoder that the model works in: levels become those of its latents. Default: of pixels.
        split: As :func:`open_source` takes it.

    Raises:
        UsageError: If there is no such trainer, or ``data`` has no files; before anything is looked at.
    """

    def __init__(
        self,
        name: str,
        data: str,
        output: str,
        files: str = "list",
        vae: str | None = None,
        split: str | None = None,
    ) -> None:
        """Check what can be checked at once."""
        self._trainer, self._files, self._data, self._vae = trainer(name), files, data, vae
        check_outside(data, output)
        self._encoder = None if vae is None else encoder(vae)
        try:
            read = open_source(data, split=split).read
        except UsageError as error:
            raise UsageError(f"{data}: {error}") from None
        if not isinstance(read, Files):
            raise DataError(f"`export` {name}: {data} is no folder of image files, which trainers read")
        self._root, self._known = read.folder.absolute(), set(read.names)
        self._audit = Path(output).expanduser().absolute()

    @property
    def audited(self) -> bool:
        """Whether the folder holds an audit that can be used as it is."""
        return (self._audit / FOUND).is_file()

    def write(self) -> str:
        """Write the files; returns what there is to say.

        Raises:
            DataError: If there is no audit of these images, or the folder holds something else.
        """
        exported = Exported(self._found(), self._root, self._audit / f"export-{self._trainer.name}", self._vae)
        folder = exported.folder
        if folder.exists() and not (folder / NOTES).is_file():
            raise DataError(f"{folder}: exists and is no export; remove it yourself")
        texts = {**self._trainer.files(exported), NOTES: self._trainer.notes(exported)}
        with atomic_io.new_folder(folder) as unfinished:
            for name, text in texts.items():
                path = unfinished / name
                path.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")
            if self._files != "list":
                self._fill(exported, unfinished / FOLDERS)
        counts = ", ".join(f"{len(group.places)} {group.title}" for group in exported.groups)
        said = f"{folder}: {counted(len(texts), 'file')} for {self._trainer.title}; {counts}; begin with {NOTES}"
        if self._trainer.needs_folders and self._files == "list":
            said += f"\n{self._trainer.title} reads folders: add `export_files` link, or copy, to make them there"
        if self._trainer.latent and self._vae is None and len(exported.stages) > 1:
            said += "\nlevels are of pixels, and too low for latents: name the model's autoencoder with `export_vae`"
        return said

    def _found(self) -> AuditResult:
        if not self.audited:
            raise DataError(
                "`export` needs what is said of every image: images of one size (`resolution`), 64 at least"
            )
        source = source_of(self._audit)
        if source is None:
            raise DataError(f"{self._audit}: no audit.json tells what its found.json is of; choose another folder")
        if Path(source).expanduser().resolve() != Path(self._data).expanduser().resolve():
            raise DataError(
                f"{self._audit} is an audit of {source}, not of {self._data}: choose another folder, or look again "
                "with `overwrite`"
            )
        found = AuditResult.load(self._audit)
        missing = [name for name in found.names if name not in self._known]
        if missing:
            raise DataError(
                f"{self._audit} is an audit of other images: {missing[0]} is not in {self._data} "
                f"({len(missing)} of {len(found)} are not); look again with `overwrite`"
            )
        if self._encoder is not None:
            encode, across = self._encoder
            images = clean_images(found, [self._root / name for name in found.names], across)
            found = in_latents(found, encode, images, torch.Generator().manual_seed(0))
        return found

    def _fill(self, exported: Exported, folder: Path) -> None:
        """A folder a group with its images and the captions beside them, under their own relative names."""
        for group in exported.groups:
            for name, file in _files(exported, group).items():
                there = folder / group.slug / name
                there.parent.mkdir(parents=True, exist_ok=True)
                if self._files == "link":
                    there.symlink_to(file)
                else:
                    shutil.copyfile(file, there)


def _files(exported: Exported, group: Group) -> Mapping[str, Path]:
    """Images of a group and what stands beside them, by relative name; nothing of those left out."""
    if group.kind == LEFT_OUT:
        return {}
    made = {}
    for place in group.places:
        name, path = Path(exported.name(place)), exported.path(place)
        made[name.as_posix()] = path
        for suffix in CAPTIONS:
            if path.with_suffix(suffix).is_file():
                made[name.with_suffix(suffix).as_posix()] = path.with_suffix(suffix)
    return made
