"""OneTrainer: a file of concepts a stage; a concept is a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustdiff.audit.export.groups import Group, Stage, first_timestep, flow_sigma
from robustdiff.audit.export.trainer_files import FOLDERS, Exported, TrainerFiles, as_json, lists


class OneTrainer(TrainerFiles):
    """Its noise range is one of a run; so there is one file of concepts a level, all groups in each."""

    name = "onetrainer"
    title = "Nerogar/OneTrainer"
    read = "modules/util/config/ConceptConfig.py, commit 13dbd21; BaseConfig.py and ModelSetupNoiseMixin.py"
    needs_folders = True
    honours = (
        "A concept is a folder, of links or copies: the export makes them if it is told to, or you do, from the lists.",
        "min_noising_strength (training tab) is one number a run, not a concept's: so there is one file a stage.",
        "With a timestep shift of 1 or more its range starts at the level, or above.",
        "Lost: weights of single images (loss_weight and balancing are a concept's: of copies one is listed).",
    )

    def files(self, exported: Exported) -> Mapping[str, str]:
        """``1-from-LEVEL.concepts.json`` ..., and the lists."""
        made = dict(lists(exported))
        for stage in exported.stages:
            concepts = [self._concept(exported, group, group in stage.groups) for group in exported.groups]
            made[f"{stage.slug}.concepts.json"] = as_json(concepts)
        return made

    def _concept(self, exported: Exported, group: Group, enabled: bool) -> dict[str, Any]:
        return {
            "__version": 1,
            "name": group.title,
            "path": exported.beside(f"{FOLDERS}/{group.slug}"),
            "enabled": enabled,
            "include_subdirectories": True,
            "balancing": 1.0,
            "balancing_strategy": "REPEATS",
            "loss_weight": 1.0,
            "text": {"prompt_source": "sample"},
        }

    def run(self, exported: Exported, stage: Stage) -> Sequence[str]:
        """Two settings of the training tab."""
        if not stage.level:
            return (f"concepts {stage.slug}.concepts.json, min_noising_strength 0",)
        # int(1000 * strength) is the least place in its table: half a place more keeps it from falling one short
        table, flow = first_timestep(stage.level), math.ceil(1000 * flow_sigma(stage.level))
        return (
            f"concepts {stage.slug}.concepts.json, min_noising_strength {(table + 0.5) / 1000:g} for Stable Diffusion "
            f"1, 2, XL; {(flow + 0.5) / 1000:g} for flow matching",
        )
