"""sd-scripts of kohya-ss: metadata files of absolute paths, and one data set configuration a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robustdiff.audit.export.groups import LEFT_OUT, Stage, first_timestep
from robustdiff.audit.export.trainer_files import Exported, TrainerFiles, lists, quoted, units
from robustdiff.utils.words import counted


class Kohya(TrainerFiles):
    """Its noise range is one of a run, for Stable Diffusion 1, 2 and XL; so there is one run a level."""

    name = "kohya"
    title = "kohya-ss/sd-scripts"
    read = "config_README-en.md, commit 063ef10; library/config_util.py and train_util.py"
    honours = (
        "Lists, no folders: subsets of its fine-tuning kind, metadata_file holds absolute paths and captions.",
        "--min_timestep is one number a run, not a subset's: so there is one configuration a stage.",
        "Its Flux scripts draw timesteps without asking for --min_timestep: there run the last stage only.",
        "Lost: weights of single images (num_repeats is whole: of copies one is listed).",
        "Set the resolution as you would without; it is not written here.",
    )

    def files(self, exported: Exported) -> Mapping[str, str]:
        """``all-levels.json`` and so on, and ``1-from-LEVEL.toml`` ... ."""
        made = {f"{group.slug}.json": exported.captions(group) for group in exported.groups if group.kind != LEFT_OUT}
        for stage in exported.stages:
            made[f"{stage.slug}.toml"] = self._stage(exported, stage)
        return made | lists(exported, (LEFT_OUT,))

    def _stage(self, exported: Exported, stage: Stage) -> str:
        lines = [
            f"# robustdiff, stage {stage.number} of {len(exported.stages)}: {units(stage.level)}",
            *(f"# {line}" for line in self.run(exported, stage)),
            "[general]",
            "enable_bucket = true",
            "",
            "[[datasets]]",
        ]
        for group in stage.groups:
            lines += [
                "",
                f"  # {group.title}: {counted(len(group.places), 'image')}",
                "  [[datasets.subsets]]",
                f"  metadata_file = {quoted(exported.beside(f'{group.slug}.json'))}",
                "  num_repeats = 1",
            ]
        return "\n".join(lines) + "\n"

    def run(self, exported: Exported, stage: Stage) -> Sequence[str]:
        """Its flags."""
        first = first_timestep(stage.level)
        return (f"--dataset_config {stage.slug}.toml" + (f" --min_timestep {first}" if first else ""),)
