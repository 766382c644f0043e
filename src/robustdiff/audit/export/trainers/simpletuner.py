"""SimpleTuner: one data loader configuration a stage, whose data sets list their images in JSON Lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustdiff.audit.export.groups import Group, Stage, flow_sigma
from robustdiff.audit.export.trainer_files import Exported, TrainerFiles, as_json

TIMESTEPS = 100
"""How many timesteps stand for a range of flow matching."""


class SimpleTuner(TrainerFiles):
    """It has no noise range for a data set, and one of a run for flow matching only."""

    name = "simpletuner"
    title = "bghira/SimpleTuner"
    read = "DATALOADER.md, commit 04265fc; simpletuner/helpers/metadata/backends/parquet.py"
    honours = (
        "Lists, no folders: its parquet metadata backend skips images that its table (here JSON Lines) has not.",
        "Flow matching: flow_custom_timesteps is one list a run, not a data set's: one configuration a stage.",
        "Stable Diffusion 1, 2, XL: nothing bounds its range from below: run the last stage only.",
        "timestep_sampling_offset and timestep_bias_... shift how often a level comes; they are not used here.",
        "Lost: weights of single images (repeats is whole, 0 = once: of copies one is listed).",
        "Set resolution and crop as you would without; those here are for 1 megapixel.",
    )

    def files(self, exported: Exported) -> Mapping[str, str]:
        """``all-levels.jsonl`` and so on, and ``1-from-LEVEL.multidatabackend.json`` ... ."""
        made = {f"{group.slug}.jsonl": self._table(exported, group) for group in exported.groups}
        for stage in exported.stages:
            sets = [self._data_set(exported, group, group in stage.groups) for group in exported.groups]
            cache = {
                "id": "text-embeds",
                "dataset_type": "text_embeds",
                "default": True,
                "type": "local",
                "cache_dir": "cache/text/robustdiff",
            }
            made[f"{stage.slug}.multidatabackend.json"] = as_json([*sets, cache])
        return made

    def _table(self, exported: Exported, group: Group) -> str:
        lines = []
        for place in group.places:
            width, height = exported.size(place)
            row = {"filename": exported.name(place), "caption": exported.caption(place)}
            lines.append(json.dumps({**row, "width": width, "height": height}) + "\n")
        return "".join(lines)

    def _data_set(self, exported: Exported, group: Group, enabled: bool) -> dict[str, Any]:
        return {
            "id": group.slug.replace("from", "sigma-over-alpha-from"),
            "type": "local",
            "dataset_type": "image",
            "disabled": not enabled,
            "instance_data_dir": str(exported.root),
            "caption_strategy": "parquet",
            "metadata_backend": "parquet",
            "parquet": {
                "path": exported.beside(f"{group.slug}.jsonl"),
                "filename_column": "filename",
                "caption_column": "caption",
                "width_column": "width",
                "height_column": "height",
                "identifier_includes_extension": True,
            },
            "cache_dir_vae": f"cache/vae/robustdiff-{group.slug}",
            "resolution": 1024,
            "resolution_type": "pixel_area",
            "minimum_image_size": 0,
            "crop": False,
            "repeats": 0,
            "delete_unwanted_images": False,
            "delete_problematic_images": False,
        }

    def run(self, exported: Exported, stage: Stage) -> Sequence[str]:
        """Its file, and a list of timesteps, s times 1000."""
        file = f"--data_backend_config {stage.slug}.multidatabackend.json"
        if not stage.level:
            return (file,)
        lowest = math.ceil(1000 * flow_sigma(stage.level))
        step = (1000 - lowest) / (TIMESTEPS - 1)
        listed = sorted({math.ceil(lowest + number * step - 1e-6) for number in range(TIMESTEPS)})
        return (file, f"flow matching: --flow_custom_timesteps={','.join(map(str, listed))}")
