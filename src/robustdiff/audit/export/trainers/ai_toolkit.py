"""ai-toolkit of ostris: JSON files of absolute paths, and the ``datasets`` and ``train`` of a job a stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from robustdiff.audit.export.groups import LEFT_OUT, Stage, first_timestep, flow_sigma
from robustdiff.audit.export.trainer_files import Exported, TrainerFiles, lists, quoted, units
from robustdiff.utils.words import counted


class AiToolkit(TrainerFiles):
    """Its noise range is one of a run, counted from the noisiest; so there is one file a level."""

    name = "ai-toolkit"
    title = "ostris/ai-toolkit"
    read = "toolkit/config_modules.py, data_loader.py, commit 008a1f6; BaseSDTrainProcess.py; config/examples"
    honours = (
        "Lists, no folders: dataset_path is a JSON file of absolute paths with captions.",
        "max_denoising_steps is one number a run, not a data set's, counted from the noisiest: one file a stage.",
        "It bounds levels only with timestep_type linear (others fill its table otherwise) and content_or_style "
        "balanced, both written here.",
        "Lost: weights of single images (loss_multiplier is a data set's: of copies one is listed).",
    )

    def files(self, exported: Exported) -> Mapping[str, str]:
        """``all-levels.json`` and so on, and ``1-from-LEVEL.yaml`` ... ."""
        made = {f"{group.slug}.json": exported.captions(group) for group in exported.groups if group.kind != LEFT_OUT}
        for stage in exported.stages:
            made[f"{stage.slug}.yaml"] = self._stage(exported, stage)
        return made | lists(exported, (LEFT_OUT,))

    def _stage(self, exported: Exported, stage: Stage) -> str:
        lines = [
            f"# robustdiff, stage {stage.number} of {len(exported.stages)}: {units(stage.level)}",
            "# Two keys of config.process[0]: put them there, beside your own keys of train.",
            "datasets:",
        ]
        for group in stage.groups:
            lines += [
                f"  # {group.title}: {counted(len(group.places), 'image')}",
                f"  - dataset_path: {quoted(exported.beside(f'{group.slug}.json'))}",
                "    num_repeats: 1",
                "    loss_multiplier: 1.0",
            ]
        lines += ["train:"]
        if stage.level:
            flow, table = math.floor(1000 * (1 - flow_sigma(stage.level))), 1000 - first_timestep(stage.level)
            lines += [
                f"  max_denoising_steps: {flow}  # flow matching; {table} for Stable Diffusion 1, 2, XL",
                "  timestep_type: linear",
                "  content_or_style: balanced",
            ]
        else:
            lines += ["  max_denoising_steps: 1000  # every noise level"]
        return "\n".join(lines) + "\n"

    def run(self, exported: Exported, stage: Stage) -> Sequence[str]:
        """Where its keys go."""
        return (f"your job with datasets and train of {stage.slug}.yaml",)
