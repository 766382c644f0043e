"""The one place that turns findings into sentences for people; no code reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from robustdiff.audit.finding import Action, Finding

if TYPE_CHECKING:  # whose methods call what is here
    from robustdiff.audit.result import AuditResult

ACTIONS = {
    Action.LEFT_OUT: "left out",
    Action.LEFT_OUT_AS_NOISE: "left out, no picture is left in them",
    Action.TRAINED_ABOVE: "trained above it",
    Action.TRAINED_ABOVE_OWN: "each trained above its own",
    Action.TRAINED_WHERE_HIDDEN: "trained at noise levels above {level:.3g}, where that no longer shows",
    Action.FILLED_IN: "filled in, and trained at noise levels above {level:.3g}, measured on {measured_on} images",
    Action.LESS_OFTEN: "used less often, the less the odder",
    Action.COUNTED_ONCE: "each picture counts once",
    Action.LEFT_ALONE: "too few to matter, left alone",
    Action.REPORTED: "reported only, training does nothing about it",
    Action.REGULARISED: "no image is clean, so that noise levels below {edge:.3g} are regularised instead",
    Action.TRAINED_BY_OTHER_PIXELS: "no image is whole, so that below they are trained by their other pixels",
    Action.TRAINED_EVERYWHERE: "no image is whole, so that they are trained at every noise level",
    Action.AS_SAID: "",
}
"""What training does, in the words of the plan."""


TOO_FEW = "damage: not looked for, too few images to compare"


def action_words(finding: Finding, regularise: tuple[float, float] | None) -> str:
    """What training does about a finding.

    Args:
        finding: One of a result.
        regularise: Noise levels that are regularised, of the same result.
    """
    edge = regularise[1] if regularise is not None else None
    done = [finding.action] if finding.otherwise is None else [finding.action, finding.otherwise]
    said = (ACTIONS[one].format(level=finding.level, measured_on=finding.measured_on, edge=edge) for one in done)
    return "; ".join(said)


def plan_rows(result: AuditResult) -> dict[str, str]:
    """What was found and what is done about it, by name, as the plan of a run and the model card say it."""
    said: dict[str, list[str]] = {}
    for one in result.findings:
        what, action = f"{one.count} images, {one.what}", action_words(one, result.regularise)
        said.setdefault(f"found {one.kind}", []).append(f"{what}: {action}" if action else what)
    rows = {name: "; ".join(texts) for name, texts in said.items()}
    rows["found clean"] = f"{int(result.clean.sum())} of {len(result)} images, trained at every noise level"
    used = result.lowest[result.weight > 0]
    if len(used) and (floor := float(used.min())) > 0:
        rows["not trained"] = f"noise levels below {floor:.3g}: sample with `sigma_floor` {floor:.3g}"
    return rows


def text(result: AuditResult) -> str:
    """The findings for a terminal, and what ``auto`` would do about them."""
    from robustdiff.audit.survey import FEWEST  # which holds a result

    rows = plan_rows(result)
    claimed = bool(result.groups) and bool(torch.stack(list(result.groups.values())).any(0).all())
    if result.trivial and result.regularise is None and not claimed:
        few = len(result) < FEWEST
        lines = [TOO_FEW if few else "damage: none stands apart; `auto` would train plainly"]
        del rows["found clean"]
    else:
        lines = ["damage, and what `auto` would do about it"]
    lines += [f"  {name}: {row}" for name, row in rows.items()]
    if (distance := result.signs.get("distance")) is not None:
        farthest = distance.argsort(descending=True)[:5].tolist()
        first = ", ".join(f"{result.names[place]} ({distance[place]:.2f})" for place in farthest)
        lines.append(f"farthest from the others in {result.features}, typical 1, not acted on: {first}")
    return "\n".join(lines)
