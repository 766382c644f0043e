"""`robustdiff corrupt`: write a dirty copy of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustdiff.attacks.config import CorruptConfig
from robustdiff.commands.console import quiet_libraries
from robustdiff.commands.flags import Say
from robustdiff.utils.words import counted


def run(config: CorruptConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.data.corruption import check_corruptions
    from robustdiff.data.dataset import load_images
    from robustdiff.data.image_folder import write_dirty_copy

    settings: dict[str, Any] = {
        "resolution": config.resolution,
        "max_bad_fraction": config.max_bad_fraction,
        "max_memory": None if config.max_memory_gib is None else int(config.max_memory_gib * 2**30),
        "split": config.split,
        "config": config.dataset_config_name,
        "image_column": config.image_column,
        "value_range": config.value_range,
    }
    poison = None
    if config.poison is None:
        images = load_images(config.source, **settings)
    else:
        from robustdiff.attacks.poisoning import load_poison

        quiet_libraries()
        images, poison = load_poison(config, **settings)
    corruptions, target = check_corruptions(config.corrupt), Path(config.destination)
    manifest = write_dirty_copy(images, target, corruptions, config.seed, overwrite=config.overwrite, poison=poison)
    hit = sum(bool(image["corruptions"] or image.get("poison")) for image in manifest["images"])
    say(f"{config.destination}: {counted(len(images), 'image')}, {hit} of them dirty (see manifest.json)")
    return 0
