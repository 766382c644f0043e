"""The one place that turns findings into sentences for people; no code reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from robustdiff.audit.finding import Action, Finding, Unasked
from robustdiff.utils.words import counted

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

BRIEFLY = {
    Action.LEFT_OUT: "left out",
    Action.LEFT_OUT_AS_NOISE: "left out",
    Action.TRAINED_ABOVE: "trained above noise level {level}",
    Action.TRAINED_ABOVE_OWN: "each trained above its own noise",
    Action.TRAINED_WHERE_HIDDEN: "trained above noise level {level}",
    Action.FILLED_IN: "filled in, trained above noise level {level}",
    Action.LESS_OFTEN: "used less often",
    Action.COUNTED_ONCE: "each picture counts once",
    Action.LEFT_ALONE: "left alone",
    Action.REGULARISED: "regularised below noise level {edge}",
    Action.REPORTED: "reported only",
    Action.TRAINED_BY_OTHER_PIXELS: "below that by their other pixels",
    Action.TRAINED_EVERYWHERE: "the least damaged at every level",
    Action.AS_SAID: "",
}
"""The same where a line must do."""
WHY = {
    Unasked.TOO_FEW: "fewer than 64 pictures to compare",
    Unasked.TOO_SMALL: "images are too small for it",
    Unasked.CHANNELS: "images are neither grey nor RGB",
}
"""Why kinds were not looked for."""
NONE_CLEAN = "what all images have in common is not seen, they are compared with the least damaged"


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


def briefly(findings: Iterable[Finding], regularise: tuple[float, float] | None) -> str:
    """What training does about the images of one kind, in a few words."""
    edge, said = "its own" if regularise is None else f"{regularise[1]:.3g}", []
    for one in findings:
        level = "of its own" if one.level is None else f"{one.level:.3g}"
        for action in (one.action, one.otherwise):
            said += [] if action is None else [BRIEFLY[action].format(level=level, edge=edge)]
    return "; ".join(filter(None, dict.fromkeys(said)))


def not_asked(result: AuditResult, why: Unasked) -> str:
    """Which kinds were not looked for, and why: those of one reason."""
    return f"{', '.join(name for name, one in result.unasked.items() if one is why)} ({WHY[why]})"


def blind(result: AuditResult) -> Unasked | None:
    """Why images that nothing was found of were not looked at: too few, or too small for all kinds; None if they were.

    What repairs is measured in each image, and does not count.
    """
    from robustdiff.audit.detector import registered_detectors  # which decide with findings

    if Unasked.TOO_FEW in result.unasked.values():
        return Unasked.TOO_FEW
    told = {kind.name for kind in registered_detectors() if kind.strengths and not kind.repairs}
    return Unasked.TOO_SMALL if result.unasked and told <= result.unasked.keys() else None


def none_clean(result: AuditResult) -> bool:
    """Whether no image is clean, those that are trained at every noise level for want of better ones included."""
    instead = any(one.otherwise is Action.TRAINED_EVERYWHERE for one in result.findings)
    return bool(result.findings) and (instead or not bool(result.clean.any()))


def plan_rows(result: AuditResult) -> dict[str, str]:
    """What was found and what is done about it, by name, as the plan of a run and the model card say it."""
    said: dict[str, list[str]] = {}
    for one in result.findings:
        what, action = f"{counted(one.count, 'image')}, {one.what}", action_words(one, result.regularise)
        said.setdefault(f"found {one.kind}", []).append(f"{what}: {action}" if action else what)
    rows = {name: "; ".join(texts) for name, texts in said.items()}
    rest = f"{int(result.clean.sum())} of {len(result)} images"
    if why := blind(result):
        rows["not looked for"] = f"{not_asked(result, why)}: {rest} are trained at every noise level, as they are"
    else:
        rows["found clean"] = f"{rest}, trained at every noise level"
    if none_clean(result):
        rows["none clean"] = NONE_CLEAN
    used = result.lowest[result.weight > 0]
    if len(used) and (floor := float(used.min())) > 0:
        rows["not trained"] = f"noise levels below {floor:.3g}: sample with `sigma_floor` {floor:.3g}"
    return rows


def text(result: AuditResult) -> str:
    """The findings for a terminal, and what ``auto`` would do about them."""
    rows = plan_rows(result)
    claimed = bool(result.groups) and bool(torch.stack(list(result.groups.values())).any(0).all())
    if result.trivial and result.regularise is None and not claimed:
        few = rows.pop("not looked for", None)
        lines = [f"damage, not looked for: {few}" if few else "damage: none stands apart; `auto` would train plainly"]
        rows.pop("found clean", None)
    else:
        lines = ["damage, and what `auto` would do about it"]
    lines += [f"  {name}: {row}" for name, row in rows.items()]
    distance = result.signs.get("distance")
    if distance is not None and bool(distance.any()):
        farthest = distance.argsort(descending=True)[:5].tolist()
        first = ", ".join(f"{result.names[place]} ({distance[place]:.2f})" for place in farthest)
        lines.append(f"farthest from the others in {result.features}, typical 1, not acted on: {first}")
    return "\n".join(lines)
