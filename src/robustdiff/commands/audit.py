"""`robustdiff audit`: what is wrong with a set of images."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from robustdiff.commands.flags import Say
from robustdiff.utils.errors import UsageError
from robustdiff.utils.options import (
    HubConfig,
    ImageColumn,
    OptionalInt,
    OptionalText,
    Settings,
    Split,
    ValueRange,
    check_given,
    check_resolution,
    require,
)

STDOUT = "-"
WIDTH = 120
"""Columns of the table where no terminal says how many it has."""


@dataclass(frozen=True)
class AuditConfig(Settings):
    """Look at every image before training: bad files, sizes, duplicates, noise, and damage; nothing is changed.

    Exit status: 0 looked, whatever was found; 2 wrong usage, or nothing to look at; 130 stopped by Ctrl-C, 143 by
    SIGTERM.
    """

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Any source of images that `robustdiff train` takes; mixed sizes and bad files are reported, not refused."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for index.html (what was found, in pictures), images.csv and, with pyarrow, images.parquet (a row for each
    file), audit.json and found.json (every image), worst.png (the twenty noisiest) and a sheet of each damage,
    clean.txt (names), and noise.csv, as `robustdiff train --noise-levels` takes it. Default: print only."""
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """File for everything as JSON, replaced if it is there; - is standard output, with nothing else there."""
    resolution: OptionalInt = None
    """Resize the shorter side to this many pixels and crop the centre square first; resizing hides noise.
    Default: images as they are."""
    split: Split = None
    dataset_config_name: HubConfig = None
    image_column: ImageColumn = None
    value_range: ValueRange = None
    extractor: OptionalText = None
    """Look for foreign pictures too: the farthest from the others in these features, as --extractor of
    `robustdiff evaluate` takes them. They are shown, and not acted on."""
    overwrite: bool = False
    """Replace the audit that FOLDER holds."""
    export: Annotated[str | None, arg(metavar="TRAINER")] = None
    """Write what was found as configuration files of a trainer, into FOLDER/export-TRAINER: metadata (datasets'
    imagefolder), kohya, onetrainer, simpletuner or ai-toolkit. An audit that FOLDER holds already is used as it is."""
    export_files: Literal["list", "link", "copy"] | None = None
    """With --export: folders of links to the images, or of copies, one a group, beside the files (never in DATA).
    Default: list, no folders."""
    export_vae: Annotated[str | None, arg(metavar="VAE")] = None
    """With --export, for models that work on latents: their autoencoder, a folder of diffusers' AutoencoderKL or of a
    pipeline that has one (or its name on the hub). Levels become those of its latents. Default: they are of pixels."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        check_given(
            self, "data", "output", "split", "dataset_config_name", "image_column", "value_range", "extractor", "json"
        )
        check_given(self, "export", "export_vae")
        self.check_choices()
        check_resolution(self.resolution)
        require(
            self.json in (None, STDOUT) or not Path(str(self.json)).is_dir(),
            f"`json` {self.json} is a folder: name a file in it, or - for standard output",
        )
        require(self.output is not None or not self.overwrite, "`overwrite` does nothing without `output`: add it")
        require(self.output is not None or self.export is None, "`export` needs the folder of the audit: add `output`")
        require(self.json is None or self.export is None, "`json` says what is found, `export` reads it: two commands")
        for name in ("export_files", "export_vae"):
            require(self.export is not None or getattr(self, name) is None, f"`{name}` does nothing without `export`")


def _nothing(text: str) -> None:
    """Says nothing: standard output is for JSON alone."""


def run(config: AuditConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    if config.export is None or config.output is None:
        return look(config, say)
    from robustdiff.audit.export.write import Export

    files = config.export_files or "list"
    export = Export(config.export, config.data, config.output, files, config.export_vae, config.split)
    if config.overwrite or not export.audited:
        look(config, say)
    else:
        say(f"{config.output}: the audit that is there is used as it is; `overwrite` looks again")
    say(export.write())
    return 0


def look(config: AuditConfig, say: Say) -> int:
    """Look at the images, say what was found and write it; returns the exit status."""
    import torch

    from robustdiff.audit.file_rows import report
    from robustdiff.audit.file_summary import with_jpeg_quality
    from robustdiff.audit.files import check_output, write_audit, write_overview
    from robustdiff.audit.overview import Overview
    from robustdiff.audit.result import AuditResult
    from robustdiff.audit.run import audit
    from robustdiff.audit.statistics import image_statistics
    from robustdiff.data.dataset import load_images
    from robustdiff.data.decode import FIRST_FRAME
    from robustdiff.data.doubts import Doubts
    from robustdiff.data.sources.open import open_source
    from robustdiff.utils.atomic_io import read_only, write_json
    from robustdiff.utils.resources import free_memory

    if config.json == STDOUT:
        say = _nothing
    elif config.json is not None and (there := read_only(Path(config.json).absolute().parent)):
        raise UsageError(f"`json` {config.json}: {there} is read-only; name a file elsewhere")
    if config.output is not None:
        check_output(config.data, config.output, overwrite=config.overwrite)
    extractor = None
    if config.extractor is not None:
        from robustdiff.evaluation.extractors import open_extractor
        from robustdiff.evaluation.features import extract

        extractor = open_extractor(config.extractor)
    options: dict[str, Any] = {
        "split": config.split,
        "config": config.dataset_config_name,
        "image_column": config.image_column,
        "value_range": config.value_range,
    }
    try:
        source = open_source(config.data, **options)
    except UsageError as error:  # as load_images words it
        raise UsageError(f"{config.data}: {error}") from None
    statistics = image_statistics(source, data=config.data, resolution=config.resolution, memory=free_memory() // 2)
    say(statistics.text())
    several = len({record.size for record in statistics.records}) > 1
    if statistics.images is not None or several or not statistics.records:  # else load_images does it
        doubts = Doubts(config.data, source)
        if statistics.images is not None and FIRST_FRAME not in statistics.notes:
            for place in range(len(statistics.images)):
                doubts.look(statistics.images.images[place].numpy())
        else:
            doubts.look_through(statistics.notes, config.resolution)
        doubts.say(len(statistics.records), statistics.notes)
    result: AuditResult | None = None
    pixels: Any = None
    if statistics.records and not several:
        images = statistics.images
        if images is None:  # which warns too
            images = load_images(config.data, resolution=config.resolution, max_bad_fraction=1.0, **options)
        features = None
        if extractor is not None:
            known = extract(extractor, images, cache=None)
            features = known.extractor.name, known.values
        result = with_jpeg_quality(audit(images, features=features), statistics.records)
        pixels = images.images
        say(result.summary())
    overview = Overview(statistics, result)
    say(f"\n{overview.text(shutil.get_terminal_size((WIDTH, 24)).columns)}\n")
    if config.output is not None:
        write = partial(write_overview, overview, lambda places: torch.stack([pixels[place] for place in places]))
        write_audit(statistics, config.output, overwrite=config.overwrite, also=write)
        say(f"{config.output}: {', '.join(sorted(path.name for path in Path(config.output).iterdir()))}")
        say(f"look at {Path(config.output) / 'index.html'}")
    if config.json == STDOUT:
        print(json.dumps(report(overview), allow_nan=False))
    elif config.json is not None:
        Path(config.json).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(config.json), report(overview))
        say(config.json)
    return 0
