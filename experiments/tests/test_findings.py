"""What is written by hand about the results is what the committed JSON says."""

import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
FOLDERS = {"ring": "worlds/mixture", "grid": "worlds/mixture", "gaussian": "worlds/invariance"}
MAIN = {"subspace": "frechet", "cifar10-cpu": "FD-squeezenet10_imagenet"}
SHORT = {"cifar": "cifar10-cpu", "noised": "gaussian-p0.9-s0.2", "outliers10": "outliers-q0.1"}

FINDINGS = """
| **plain** | # | # | # | # |
    plane clean plain, plane inlier-s0.1 plain, plane inlier plain, plane outliers plain
| **`paper`, half the radius** | # | # | # | **#** |
    plane clean paper-half, plane inlier-s0.1 paper-half, plane inlier paper-half, plane outliers paper-half
| `paper`, whole radius | # | # | # | # |
    plane clean paper, plane inlier-s0.1 paper, plane inlier paper, plane outliers paper
| `paper-random`, half the radius | # | # | # | # |
    plane clean paper-random-half, plane inlier-s0.1 paper-random-half
    plane inlier paper-random-half, plane outliers paper-random-half
| `paper-random`, whole radius | # | # | # | # |
    plane clean paper-random, plane inlier-s0.1 paper-random, plane inlier paper-random, plane outliers paper-random
| plain, label floor | # | # | # | # |
    plane clean label-floor, plane inlier-s0.1 label-floor, plane inlier label-floor, plane outliers label-floor
| plain, floor in quadrature | # | # | # | # |
    plane clean quadrature-floor, plane inlier-s0.1 quadrature-floor
    plane inlier quadrature-floor, plane outliers quadrature-floor
| plain on the clean part | - | - | # | # |
    plane inlier clean-subset, plane outliers clean-subset
told nothing and ends at # ± #, beside # ± # for training on the clean part alone
    plane outliers paper-half, plane outliers paper-half sd
    plane outliers clean-subset, plane outliers clean-subset sd
noise 0.2, `paper` has # and `paper-random` #; the paper's
    left by paper, left by paper-random
which is told its level**: # and # at 0.2, # and # at
    plane inlier paper-half, plane inlier label-floor, plane inlier-s0.1 paper-half, plane inlier-s0.1 label-floor
with inlier noise # against # for plain training, with outliers # against #;
    plane inlier adversarial-shift, plane inlier plain, plane outliers adversarial-shift, plane outliers plain
subspace # against # and # against #. Ties
    subspace inlier adversarial-shift, subspace inlier plain
    subspace outliers adversarial-shift, subspace outliers plain
distance to the plane from # to # and W2 from # to # (clean-trained #)
    plane inlier plain distance, plane inlier gated-low distance
    plane inlier plain, plane inlier gated-low, plane clean plain
Frechet from # to # (clean-trained #) and the energy off the subspace from # to #
    subspace inlier plain, subspace inlier gated-low, subspace clean plain
    subspace inlier plain off_subspace, subspace inlier gated-low off_subspace
does better**: plane # against the gate's #, subspace # against #
    plane inlier label-floor, plane inlier gated-low, subspace inlier label-floor, subspace inlier gated-low
a tie with the floor alone on the plane (#)
    plane inlier gated-low-floor
better on the subspace (# ± # against # ± #)
    subspace inlier gated-low-floor, subspace inlier gated-low-floor sd
    subspace inlier label-floor, subspace inlier label-floor sd
Plane: relabelling #, gate #, plain #, pseudo-Huber a tie with plain (# ± #)
    plane outliers relabelled, plane outliers gated-low, plane outliers plain
    plane outliers pseudo-huber, plane outliers pseudo-huber sd
pseudo-Huber most of all (# ± # against # ± # for plain), at # instead of # on clean data
    subspace outliers pseudo-huber, subspace outliers pseudo-huber sd
    subspace outliers plain, subspace outliers plain sd, subspace clean pseudo-huber, subspace clean plain
on clean data; relabelling #; the gate is a tie (#)
    subspace outliers relabelled, subspace outliers gated-low
Relabelling has # and #, pseudo-Huber # and #, plain # and # (grid
    ring outliers relabelled, grid outliers relabelled, ring outliers pseudo-huber, grid outliers pseudo-huber
    ring outliers plain, grid outliers plain
is of little use**: plane # against #, at # instead of # on clean data
    plane outliers gated-mid, plane outliers plain, plane clean gated-mid, plane clean plain
on clean data; subspace # against #, at # instead of #;
    subspace outliers gated-mid, subspace outliers plain, subspace clean gated-mid, subspace clean plain
m = 1 takes the error from # to #, m = 3 to #
    plane clean plain, plane clean constant-m1, plane clean constant-m3
with inlier noise # at a price of # on clean data; random signs of the same edge # at #
    plane inlier adversarial-c0.2-m3, plane clean adversarial-c0.2-m3
    plane inlier gated-c0.2-m5, plane clean gated-c0.2-m5
clean tenth reaches # on the plane (floor #) and # on the subspace, where the best of all others has #
    plane inlier clean-subset, plane clean plain floor
    subspace inlier clean-subset, subspace inlier gated-low-floor
exact score's W2 (# ± #; #), but leaves # between the modes where the exact score leaves #
    ring clean plain, ring clean plain sd, ring clean ideal, ring clean plain spurious, ring clean ideal spurious
reproduces #, the published adversarial setting #, the label floor #, the default gate #,
    ring outliers plain spurious, ring outliers adversarial-shift spurious
    ring outliers label-floor spurious, ring outliers preset spurious
the default gate #, pseudo-Huber #, the strong gate (c = 0.1, m = 10) #, with a label floor on top #
    ring outliers preset spurious, ring outliers pseudo-huber spurious
    ring outliers gated-low spurious, ring outliers gated-low-floor spurious
training on the clean part #, the middle band #.
    ring outliers clean-subset spurious, ring outliers gated-mid spurious
On the grid pseudo-Huber is best: # against #, strong gate #.
    grid outliers pseudo-huber spurious, grid outliers plain spurious, grid outliers gated-low spurious
come out at # of their width (default gate #, pseudo-Huber #, label floor #)
    ring clean gated-low spread, ring clean preset spread, ring clean pseudo-huber spread, ring clean label-floor spread
W2 rises from # to # on the clean ring and from # to # with outliers
    ring clean plain, ring clean gated-low, ring outliers plain, ring outliers gated-low
on the grid from # to # and from # to #.
    grid clean plain, grid clean gated-low, grid outliers plain, grid outliers gated-low
within a deviation of plain training (# clean, # with outliers)
    ring clean preset, ring outliers preset
wide as the modes: plain #, gate #, label floor #, both # (a tie), the clean tenth alone #.
    ring inlier plain, ring inlier gated-low, ring inlier label-floor, ring inlier gated-low-floor
    ring inlier clean-subset
on the clean grid # against #.
    grid clean gated-mid, grid clean plain
on the plane (# against #) and two
    plane clean preset, plane clean plain
on the subspace (# against #), more than
    subspace clean preset, subspace clean plain
in part: plane # against # (inlier) and # against # (outliers)
    plane inlier preset, plane inlier plain, plane outliers preset, plane outliers plain
(outliers), subspace # against # (inlier), a tie with outliers (#)
    subspace inlier preset, subspace inlier plain, subspace outliers preset
cleans more, and takes # instead of # on
    plane clean gated-strong, plane clean plain
the large direction (#) to #, predicted #.
    gaussian clean equivariance-m0.5 sd_large_true, gaussian clean equivariance-m0.5 sd_large
    gaussian clean equivariance-m0.5 sd_large_predicted
of it: # for m = 0.5 (predicted #), # for m = 2 (predicted #)
    gaussian clean invariance-m0.5 noise_gain, gaussian clean invariance-m0.5 noise_gain_predicted
    gaussian clean invariance-m2 noise_gain, gaussian clean invariance-m2 noise_gain_predicted
would end at # instead of 0.447, and those of `linear-gaussian` do; the perceptron ends at #,
    gaussian clean invariance-m0.5 sd_large_predicted, gaussian clean invariance-m0.5 sd_large
less far (# on the clean plane, control #), and far with outliers (#)
    plane clean invariance, plane clean plain-epsilon, plane outliers invariance
from # with 1,000 calls to # with 20,
    plane inlier plain w2@1000, plane inlier plain w2@20
goes from # to # with 50
    plane inlier gated-low w2@1000, plane inlier gated-low w2@50
five calls give # (gate) and # (plain)
    plane clean gated-low w2@5, plane clean plain w2@5
at sigma/alpha 0.09 plain #, gate #, trained on the clean part #;
    subspace inlier plain jacobian@0.09, subspace inlier gated-low jacobian@0.09
    subspace inlier clean-subset jacobian@0.09
at 0.15, above the gate, # and #.
    subspace inlier plain jacobian@0.15, subspace inlier gated-low jacobian@0.15
can be seen (#).
    subspace inlier adversarial-shift jacobian@0.09
at 0.03 gate #, plain #.
    subspace inlier gated-low jacobian@0.03, subspace inlier plain jacobian@0.03
relative error of at most # (T7)
    worst closed form
from mode to mode, it is # times above
    ring over the bound
for two fifths more error (# against #)
    digits half as long, digits plain
FD # against #, FD-resnet20 # against #; clean-trained # and #; plain #.
    cifar noised auto, cifar noised told
    cifar noised auto FD-resnet20_cifar10, cifar noised told FD-resnet20_cifar10
    cifar clean plain, cifar clean plain FD-resnet20_cifar10, cifar noised plain
Outliers: # (clean part #, plain #; 1,907
    cifar outliers10 auto, cifar outliers10 clean-subset, cifar outliers10 plain
lost pixels # (plain #), JPEG 15 # (#), blur of one pixel # (#)
    cifar missing auto, cifar missing plain, cifar jpeg auto, cifar jpeg plain, cifar blur auto, cifar blur plain
a mixture, two of three images dirty, # (#)
    cifar mixed auto, cifar mixed plain
(blur #, mixture #, clean #)
    cifar blur auto recall, cifar mixed auto recall, cifar clean plain recall
to the last digit** (#, three seeds)
    cifar clean auto
at this scale**: noised # (random) and # (adversarial), noise of the samples # and # against # (clean images #)
    cifar noised random, cifar noised adversarial, cifar noised random noise, cifar noised adversarial noise
    cifar noised plain noise, cifar noised plain noise floor
outliers # and #; clean # and #.
    cifar outliers10 random, cifar outliers10 adversarial, cifar clean random, cifar clean adversarial
Default: # on noised images, but # on clean ones
    cifar noised gated, cifar clean gated
m = 5): #, but # on clean images, # times plain training's, and # with outliers
    cifar noised gated-strong, cifar clean gated-strong, strong over plain, cifar outliers10 gated-strong
a hundredth of precision**: FD # to #, recall # to #.
    cifar noised auto, cifar noised auto-gated, cifar noised auto recall, cifar noised auto-gated recall
goes to #, noise # to # (with the gate from the start # and #)
    cifar noised fine-tuned, cifar noised plain noise, cifar noised fine-tuned noise
    cifar noised gated-strong, cifar noised gated-strong noise
gate against noise**: #,
    cifar noised label-floor
helps a little (# noised; # with outliers; # clean,
    cifar noised relabelled, cifar outliers10 relabelled, cifar clean relabelled
hardly helps (#)
    cifar noised shrunk
plain # with 10 calls, # with 50; on clean data # and #.
    cifar noised plain FD@10, cifar noised plain, cifar clean plain FD@10, cifar clean plain
"""
INDEX = """
CIFAR-10 noised, FD | # ± # | plain #, clean-trained # |
    cifar noised auto, cifar noised auto sd, cifar noised plain, cifar clean plain
each image's noise level | # ± # | # ± # |
    cifar noised auto, cifar noised auto sd, cifar noised told, cifar noised told sd
only takes | # ¹ | # |
    cifar noised auto-gated, cifar noised auto
change nothing: plane, W2 | # ± # | plain #, floor # |
    plane inlier adversarial-shift, plane inlier adversarial-shift sd, plane inlier plain, plane inlier plain floor
works against noise | # ± # | plain #, floor # |
    plane inlier gated-low, plane inlier gated-low sd, plane inlier plain, plane inlier plain floor
trains nothing, does better | # ± # | gate #, floor # |
    plane inlier label-floor, plane inlier label-floor sd, plane inlier gated-low, plane inlier plain floor
worth more than either | # ± # | floor # |
    plane inlier clean-subset, plane inlier clean-subset sd, plane inlier plain floor
price on a clean plane | # ± # | plain # |
    plane clean preset, plane clean preset sd, plane clean plain
price on a clean ring, W2 | # ± # | plain #, floor # |
    ring clean gated-low, ring clean gated-low sd, ring clean plain, ring clean plain floor
price on clean CIFAR-10, FD | # ¹ | plain #: # times |
    cifar clean gated-strong, cifar clean plain, strong over plain
`paper`, half the radius, W2 | # ± # | plain #, clean part # |
    plane outliers paper-half, plane outliers paper-half sd, plane outliers plain, plane outliers clean-subset
a tie with the label floor | # ± # | # ± # |
    plane inlier paper-half, plane inlier paper-half sd, plane inlier label-floor, plane inlier label-floor sd
a tie with plain | # ± # | plain # |
    plane clean paper-half, plane clean paper-half sd, plane clean plain
Outliers, plane: relabelling | # ± # | plain #, gate # |
    plane outliers relabelled, plane outliers relabelled sd, plane outliers plain, plane outliers gated-low
pseudo-Huber, Frechet | # ± # | plain #, floor # |
    subspace outliers pseudo-huber, subspace outliers pseudo-huber sd
    subspace outliers plain, subspace outliers plain floor
neither of the two, W2 | #, # | plain #, floor # |
    ring outliers relabelled, ring outliers pseudo-huber, ring outliers plain, ring outliers plain floor
not gone: ring | # ± # | plain #, clean part # |
    ring outliers gated-low spurious, ring outliers gated-low spurious sd
    ring outliers plain spurious, ring outliers clean-subset spurious
m = 0.5 | # ± # | predicted # |
    gaussian clean invariance-m0.5 noise_gain, gaussian clean invariance-m0.5 noise_gain sd
    gaussian clean invariance-m0.5 noise_gain_predicted
worst relative error | # |
    worst closed form
at equal quality: digits | # ± # | plain #,
    digits moved adversarial, digits moved adversarial sd, digits moved plain
little more than chance | # ± # | random #, clean # |
    poisoned, poisoned sd, poisoned at random, not poisoned
digits, Frechet | # ¹ | told #, plain #, floor # |
    told half, told rightly, told nothing, digits floor
"""


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _named(name: str, row: str) -> Any:
    return next(one["frechet"] for one in _read(name)["rows"] if one["row"] == row)


def _left(method: str) -> float:
    """Share of the damage by noise of 0.2 on the plane that a method leaves."""
    clean, noised = number("plane clean plain"), number("plane inlier plain")
    return (number(f"plane inlier {method}") - clean) / (noised - clean)


def _attacked(row: str, key: str) -> list[float]:
    return [run[key] for run in _read(row)["runs"].values()]


def _others() -> Mapping[str, float]:
    """What does not stand in a row of the paper's experiments, by the name that the tables above give it."""
    poison = {row: _named("poisoning", f"plain on {row}") for row in ("poisoned", "random", "clean")}
    ring = _read("attacked/ring-plain")
    forms = [_read(f"worlds/linear-gaussian/{path.stem}") for path in (RESULTS / "worlds/linear-gaussian").iterdir()]
    digits = {row: _attacked(f"attacked_digits/digits-{row}", "pgd_start") for row in ("adversarial", "plain")}
    return {
        "worst closed form": max(form["values"]["relative_error"]["mean"] for form in forms),
        "ring over the bound": statistics.fmean(_attacked("attacked/ring-plain", "random")) / ring["bound"],
        "digits half as long": statistics.fmean(_attacked("attacked_digits/digits-plain-half", "error")),
        "digits plain": statistics.fmean(_attacked("attacked_digits/digits-plain", "error")),
        "digits moved adversarial": statistics.fmean(digits["adversarial"]),
        "digits moved adversarial sd": statistics.stdev(digits["adversarial"]),
        "digits moved plain": statistics.fmean(digits["plain"]),
        "left by paper": _left("paper"),
        "left by paper-random": _left("paper-random"),
        "strong over plain": number("cifar clean gated-strong") / number("cifar clean plain"),
        "poisoned": poison["poisoned"]["mean"],
        "poisoned sd": poison["poisoned"]["deviation"],
        "poisoned at random": poison["random"]["mean"],
        "not poisoned": poison["clean"]["mean"],
        "told half": _named("wrong_levels", "told half")[0],
        "told rightly": _named("wrong_levels", "told")[0],
        "told nothing": _named("wrong_levels", "plain")[0],
        "digits floor": float(_read("wrong_levels")["protocol"]["floor"].split()[0]),
    }


def number(reference: str) -> float:
    """The number that a reference names.

    ``place dirt method [measure] [sd | floor]``: by default the mean of the main measure. ``w2@20``: the error with 20
    network calls; ``jacobian@0.1``: the norm at the measured noise level nearest to 0.1.
    """
    place, dirt, method, *rest = (SHORT.get(word, word) for word in reference.split())
    of = rest.pop() if rest and rest[-1] in ("sd", "floor") else "mean"
    measure = rest[0] if rest else MAIN.get(place, "w2")
    folder = "images/cifar10-cpu-old-sampler" if place == "cifar10-cpu" else FOLDERS.get(place, f"worlds/{place}")
    row = _read(f"{folder}/{place}-{dirt}-{method}")
    name, _, level = measure.partition("@")
    if name == "jacobian":
        levels = row["curves"]["jacobian_levels"]
        nearest = min(range(len(levels)), key=lambda i: abs(math.log(levels[i] / float(level))))
        return float(row["curves"]["jacobian"][nearest])
    if level:
        return float(row["curves"]["error_by_calls"][row["curves"]["calls"].index(int(level))])
    return float(row["floor"][name]["mean"] if of == "floor" else row["values"][name][of])


def entries(table: str) -> list[tuple[str, list[str]]]:
    """Phrases, and what their numbers are."""
    found: list[tuple[str, list[str]]] = []
    for line in table.strip("\n").split("\n"):
        if line.startswith("    "):
            found[-1][1].extend(line.strip().split(", "))
        else:
            found.append((line, []))
    return found


def pattern(phrase: str) -> str:
    return re.escape(phrase).replace("\\#", r"(-?\d[\d,]*(?:\.\d+)?)")


def differences(text: str, phrase: str, numbers: list[float]) -> list[str]:
    """Where the text says something else than the numbers, to the decimals that it shows."""
    found = re.findall(pattern(phrase), text)
    assert len(found) == 1, f"{phrase!r} stands {len(found)} times in the text"
    said = [found[0]] if isinstance(found[0], str) else list(found[0])
    assert len(said) == len(numbers), phrase
    true = [f"{x:,.{len(word.partition('.')[2])}f}" for word, x in zip(said, numbers, strict=True)]
    return [f"{word} is {x}" for word, x in zip(said, true, strict=True) if word != x]


def text_of(name: str) -> str:
    return " ".join((ROOT / name).read_text().split())


@pytest.mark.parametrize(("document", "table"), [("findings", FINDINGS), ("README", INDEX)])
def test_the_text_says_what_the_results_say(document: str, table: str) -> None:
    text, others, wrong = text_of(f"experiments/{document}.md"), _others(), {}
    for phrase, references in entries(table):
        numbers = [others[name] if name in others else number(name) for name in references]
        if differ := differences(text, phrase, numbers):
            wrong[phrase] = differ
    assert not wrong


def test_every_finding_of_the_index_is_held_against_the_results() -> None:
    text = (ROOT / "experiments" / "README.md").read_text()
    rows = [line for line in text.split("| finding |")[1].split("\n\n")[0].splitlines()[2:] if line]
    for row, (phrase, _) in zip(rows, entries(INDEX), strict=True):
        assert re.search(pattern(phrase), row), row


def test_a_wrong_number_a_lost_phrase_and_one_said_twice_are_seen() -> None:
    assert differences("plain 0.21, gate 19,069", "plain #, gate #", [0.2149, 19069.4]) == []
    assert differences("plain 0.22, gate 19,069", "plain #, gate #", [0.2149, 19070.0]) == [
        "0.22 is 0.21",
        "19,069 is 19,070",
    ]
    for text in ("nothing", "plain 1, plain 2"):
        with pytest.raises(AssertionError, match=r"stands [02] times"):
            differences(text, "plain #", [1.0])


def test_the_gate_took_a_quarter_more_time_on_the_digits_and_no_document_says_otherwise() -> None:
    seconds = _read("digits_demo")["training_seconds"]
    assert f"{seconds['robust'] / seconds['plain']:.2f}" == "1.26"
    for name in ("README.md", "experiments/README.md", "experiments/findings.md"):
        assert set(re.findall(r"(1\.2\d) times the training", text_of(name))) <= {"1.26"}, name
