"""``metadata.jsonl``: the audit image by image, as the ``imagefolder`` of Hugging Face's datasets reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from robustdiff.audit.export.trainer_files import Exported, TrainerFiles


class Metadata(TrainerFiles):
    """One line an image: every number as it is, for loops that can use them (``Curriculum``)."""

    name = "metadata"
    title = "datasets' imagefolder"
    latent = False
    read = "image_dataset.mdx of huggingface/datasets"
    honours = (
        "Put metadata.jsonl into the folder of images: datasets gives its columns with every image.",
        "min_sigma: least noise level sigma/alpha at which the image is as good as a clean one.",
        "weight: how often it is used there, relative to others, 0 to 1; k equal images weigh 1/k each.",
        "group: what trainers that know groups only make of both; of copies one is listed, the others are left out.",
        "name: file_name once more, which imagefolder takes away. Curriculum.draw takes it.",
    )

    def files(self, exported: Exported) -> Mapping[str, str]:
        """The one file; nothing is rounded."""
        found = exported.found
        group = {place: group.title for group in exported.groups for place in group.places}
        rows = (
            {
                "file_name": name,
                "name": name,
                "min_sigma": found.min_sigma[place].item(),
                "weight": found.weight[place].item(),
                "group": group[place],
            }
            for place, name in enumerate(found.names)
        )
        return {"metadata.jsonl": "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)}
