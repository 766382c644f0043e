"""One dataclass per command: every setting with its unit and default, checked before anything heavy is imported.

Longer than most files, so that every flag of every command stands in one place.

Standard library and tyro's annotations only, so that ``robustdiff --help`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, UseAppendAction, arg

from robustdiff.corruption import Corruption

MAX_SEED = 2**32 - 1
"""torch's CPU generators use the low 32 bits only: a larger seed would repeat a smaller one."""
MAX_SIDE, MAX_BATCH, MAX_WORKERS = 2**16, 2**20, 1024
"""Larger numbers are slips of the pen that would only be noticed when memory is gone."""
AutoPart = Literal["holes", "noise", "blur", "jpeg", "outliers", "duplicates", "regulariser"]
"""What ``--auto`` looks for and acts on."""
AUTO_PARTS: tuple[AutoPart, ...] = get_args(AutoPart)
FROM_CORRUPT = "corrupt"
"""``--noise-levels``: not a file, but the dirt that the run itself adds."""
OptionalText = Annotated[str | None, arg(metavar="TEXT")]
OptionalInt = Annotated[int | None, arg(metavar="INT")]
OptionalFloat = Annotated[float | None, arg(metavar="NUMBER")]
OptionalGiB = Annotated[float | None, arg(metavar="GIB")]


class UsageError(ValueError):
    """Something the user can mend; the message is one line that names the flag and the remedy."""


class RobustdiffWarning(UserWarning):
    """Something went wrong that training survives; the message is one line."""


def parse_count(text: str, flag: str) -> int:
    """A count with an optional suffix: ``"500k"``, ``"1.5M"``, ``"20000"``.

    Args:
        text: The number; k = thousand, M = million.
        flag: Named in the error.

    Raises:
        UsageError: If it is no positive whole number.
    """
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1 and abs(value - round(value)) < 1e-6):
        raise UsageError(f"{flag} {text!r} is not a positive number of images such as 20000, 500k or 1.5M")
    return round(value)


def parse_gate(text: str) -> tuple[float, float]:
    """``"LOW:HIGH"`` in units of sigma/alpha, for example ``0:0.3`` or ``0.5:inf``.

    Raises:
        UsageError: If it is not two ordered numbers.
    """
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high:
        raise UsageError(f"--gate {text!r} is not LOW:HIGH with 0 <= LOW <= HIGH, for example --gate 0:0.3")
    return low, high


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _check_given(config: object, *names: str) -> None:
    """Of these fields none is an empty text; ``data`` and ``run`` are positional."""
    for name in names:
        flag = name.upper() if name in ("data", "run") else "--" + name.replace("_", "-")
        _require(getattr(config, name) != "", f"{flag} is empty: give a name, or leave the flag out")


def _check_resolution(side: int | None) -> None:
    _require(side is None or 1 <= side <= MAX_SIDE, f"--resolution must be in 1 .. {MAX_SIDE} pixels")


def _check_bad_fraction(share: float) -> None:
    _require(0 <= share <= 1, "--max-bad-fraction must be between 0 and 1")


def _check_extractors(names: tuple[str, ...]) -> None:
    _require("" not in names, "--extractor is empty: name one, or leave the flag out")
    twice = [name for name in names if names.count(name) > 1]
    _require(not twice, f"--extractor {twice[0] if twice else ''} is given twice: leave one out")


def _check_memory(gib: float | None) -> None:
    good = gib is None or (math.isfinite(gib) and gib >= 0)
    _require(good, f"--max-memory-gib {gib} must be a finite number, 0 or more")


def check_corruptions(specs: tuple[str, ...]) -> tuple[Corruption, ...]:
    """The parsed ``--corrupt`` specs.

    Raises:
        UsageError: With the flag's name, if one cannot be parsed.
    """
    try:
        return tuple(Corruption.parse(spec) for spec in specs)
    except ValueError as error:
        raise UsageError(f"--corrupt {error}") from None


@dataclass(frozen=True)
class TrainConfig:
    """Train a diffusion model on a folder of images; the output folder is an ordinary diffusers pipeline.

    Those flag names of diffusers' train_unconditional.py that have a meaning here work too, with dashes or underscores.
    """

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder of images (searched recursively), a .npy or .npz array, a parquet file or folder, a data set of Hugging
    Face (saved folder or hub id), the CIFAR-10, CelebA or LSUN folder as published, or `digits` (scikit-learn's)."""
    output_dir: OptionalText = None
    """Run folder. Default: runs/NAME-OF-DATA."""
    images: str = "500k"
    """Length of training, in images seen (20000, 500k, 1.5M)."""
    num_epochs: OptionalInt = None
    """Length of training, in passes over the data; instead of --images."""
    seed: int = 0
    """Rules the order of data, the initial weights and every random draw; a whole number >= 0."""

    # -- data --
    split: OptionalText = None
    """Part of a data set that comes in parts (train, test ..., or all). Default: train."""
    dataset_config_name: OptionalText = None
    """Configuration of a hub data set that has several."""
    image_column: OptionalText = None
    """Column of a table that holds the images. Default: the only one that can."""
    label_column: OptionalText = None
    """Column of a table that holds the class labels. Default: the only one declared so, or called label, class ..."""
    class_conditional: bool = False
    """Train on class labels too (folder names, or the label column), to draw images class by class."""
    resolution: OptionalInt = None
    """Resize the shorter side to this many pixels and crop the centre square. Default: images as they are."""
    channels: Literal[1, 3] | None = None
    """1 = grey, 3 = RGB. Default: grey if every image is."""
    random_flip: bool = False
    """Mirror each image left-right with probability 1/2."""
    corrupt: UseAppendAction[tuple[str, ...]] = ()
    """Dirty the training images, for experiments: KIND:NAME=VALUE,... (repeatable; kinds: see `robustdiff corrupt -h`).
    Per image, frozen, a function of (seed, index) alone; in the [-1, 1] range, unclipped."""
    clean_subset: bool = False
    """Train only on the images that --corrupt does not hit: what knowing the clean ones is worth, for experiments."""
    max_bad_fraction: float = 0.01
    """Largest share of unreadable images that is skipped rather than an error, 0 to 1."""
    max_memory_gib: OptionalGiB = None
    """Hold the decoded images if they take at most this much, else decode them at every use; 0 = always the latter.
    Default: half of the free memory, divided by the processes on this machine."""
    dataloader_num_workers: OptionalInt = None
    """Worker processes that decode and dirty images ahead, 0 = none. Default: 0 if images are held, else up to 4."""

    # -- objective --
    auto: bool = False
    """Find out which images are noisy, blurred, compressed, holed, odd or copies, and train each only where it can be
    trusted: on clean images plain training, else plain training of what is right in each (docs/audit.md)."""
    auto_without: UseAppendAction[tuple[AutoPart, ...]] = ()
    """A part that --auto leaves out (repeatable)."""
    noise_levels: OptionalText = None
    """Gaussian noise that each image carries, above which only it is then trained: a CSV of NAME,SIGMA (sigma in the
    [-1, 1] range, at the size that is trained; images not named are clean), a JSON object, the manifest.json of
    `robustdiff corrupt`, or the word `corrupt`: as --corrupt gaussian adds it. Default: nothing is known."""
    preset: Literal["paper", "gated", "plain"] | None = None
    """Objective settings to start from; the flags of this group override single ones. gated: random perturbation at low
    noise levels only (2 forward passes there); paper: the published adversarial settings; plain: no regulariser.
    Default: gated; with --auto plain, or a gate below the noise if every image has some."""
    objective: Literal["robust", "invariance", "input-perturbation", "pseudo-huber"] = "robust"
    """robust: equivariance. The others are what it is compared with."""
    perturbation: Literal["none", "random", "adversarial"] | None = None
    """Direction of the perturbation; none is plain training. Default: the preset's."""
    strength: OptionalFloat = None
    """lambda, weight of the regulariser, >= 0. Default: the preset's."""
    gate: OptionalText = None
    """Regularise only where LOW <= sigma/alpha <= HIGH, as LOW:HIGH; `0:inf` is everywhere. Default: the preset's."""
    radius_exponent: OptionalFloat = None
    """Power, >= 0, of the noise scale sigma (0 to 1) in the radius of the perturbation. Default: the preset's."""
    radius_scale: OptionalFloat = None
    """Factor of the radius, in units of the unit-variance noise eps, >= 0. Default: the preset's."""
    radius_floor: OptionalFloat = None
    """Least radius, in units of eps, >= 0. Default: the preset's."""
    radius_factor: Literal["uniform", "one"] | None = None
    """Factor of the radius drawn per image: uniform on [0, 1], or always one. Default: the preset's."""
    attack_steps: OptionalInt = None
    """Steps of the adversarial perturbation, >= 1; each costs a forward and an input-gradient pass. Default: 1."""
    attack_step_size: OptionalFloat = None
    """Step of the adversarial perturbation, in units of the radius, > 0. Default: 1 for one step, else 2.5 / steps."""
    inner: Literal["shift", "residual"] | None = None
    """What the adversarial perturbation ascends. Default: shift (the paper's)."""
    gradient: Literal["both", "perturbed", "clean"] | None = None
    """Branch of the regulariser that trains the network. Default: both."""

    # -- network and process --
    network: Literal["tiny", "small", "medium", "base", "large"] | None = None
    """Preset network (UNet2DModel). Default: by image size."""
    model_config_name_or_path: OptionalText = None
    """JSON file or folder with a UNet2DModel configuration, instead of --network."""
    init_from: OptionalText = None
    """Folder or hub id of a pipeline built on UNet2DModel: fine-tune it, with its own network and scheduler."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the network predicts. Default: epsilon, or that of --init-from."""
    ddpm_num_steps: OptionalInt = None
    """Noise levels T of the process. Default: 1000, or those of --init-from."""
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] | None = None
    """Noise schedule. Default: linear, or that of --init-from."""
    rescale_betas_zero_snr: bool = False
    """End the schedule in pure noise; needs --prediction-type v_prediction or sample."""

    # -- optimisation --
    train_batch_size: Annotated[int, arg(aliases=["--batch-size"])] = 64
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimiser step."""
    learning_rate: OptionalFloat = None
    """Peak learning rate of AdamW, > 0. Default: the network's (1e-3 tiny ... 1e-4 large), 1e-4 with --init-from."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "cosine"
    """Learning-rate schedule, in optimiser steps, right under accumulation."""
    lr_warmup_steps: OptionalInt = None
    """Optimiser steps of linear warm-up. Default: 5 % of the run, at most 500."""
    adam_beta1: float = 0.9
    """AdamW beta1, 0 to 1."""
    adam_beta2: float = 0.999
    """AdamW beta2, 0 to 1."""
    adam_weight_decay: float = 1e-6
    """AdamW weight decay, >= 0."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon, > 0."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm, > 0."""
    use_ema: bool = True
    """Save and sample an exponential moving average of the weights."""
    ema_max_decay: float = 0.9999
    """Cap of the moving average's decay per optimiser step, 0 to 1; it warms up as (1 + step) / (10 + step)."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the network's arithmetic; images, noise and loss stay float32."""
    compile: bool = False
    """Compile the network with torch.compile."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When loss or gradient is not finite: stop, or skip the step and count it (10 in a row stop all the same)."""

    # -- run --
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    resume_from_checkpoint: OptionalText = None
    """Go on from this checkpoint: `latest`, or a name such as step-1000."""
    overwrite: Annotated[bool, arg(aliases=["--overwrite-output-dir"])] = False
    """Delete the run that the output folder holds and start anew."""
    dry_run: bool = False
    """Print the resolved plan and stop; writes nothing."""
    checkpointing_steps: OptionalInt = None
    """Optimiser steps between checkpoints and previews. Default: a tenth of the run."""
    checkpoints_total_limit: int = 2
    """Newest checkpoints kept, >= 1."""
    logging_steps: int = 50
    """Optimiser steps between lines of metrics.jsonl."""
    preview_images: int = 16
    """Images per preview grid; 0 = none."""
    eval_batch_size: int = 64
    """Images per forward pass when sampling previews."""
    ddpm_num_inference_steps: OptionalInt = None
    """DDIM steps of the previews; must divide the noise levels. Default: 50, or the nearest divisor below."""
    evaluate_every: OptionalText = None
    """Judge the run every so many images seen (20000, 50k) and at its end: evaluation/during.jsonl; the best pipeline
    is kept in OUTPUT/best. Needs --evaluate-reference. Default: never."""
    evaluate_reference: OptionalText = None
    """Clean real images for --evaluate-every: anything that DATA may be; brought to the size of DATA's."""
    evaluate_split: OptionalText = None
    """Part of --evaluate-reference, if it comes in parts. Default: train."""
    evaluate_extractor: str = "pixels"
    """What --evaluate-every looks at: see --extractor of `robustdiff evaluate`."""
    evaluate_n: int = 500
    """Images drawn for each evaluation, >= 14; always from the same seeds."""
    evaluate_metric: Literal["fd", "kid"] = "fd"
    """What the best pipeline is best in: Frechet or kernel distance."""
    logger: OptionalText = None
    """Tracker for accelerate (tensorboard, wandb, ...), which must be installed. Default: metrics.jsonl only."""

    def validate(self) -> None:
        """Check everything that can be checked without looking at the data.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        for name in (
            "data",
            "output_dir",
            "init_from",
            "model_config_name_or_path",
            "resume_from_checkpoint",
            "logger",
            "split",
            "dataset_config_name",
            "image_column",
            "label_column",
            "noise_levels",
        ):
            flag = "DATA" if name == "data" else "--" + name.replace("_", "-")
            _require(getattr(self, name) != "", f"{flag} is empty: name a file or folder, or leave the flag out")
        parse_count(self.images, "--images")
        idle = self.num_epochs is not None and self.images != "500k"
        _require(not idle, "--num-epochs and --images exclude each other: give one")
        idle = not self.use_ema and self.ema_max_decay != 0.9999
        _require(not idle, "--ema-max-decay does nothing with --no-use-ema: leave one out")
        idle = self.lr_scheduler == "constant" and bool(self.lr_warmup_steps)
        _require(not idle, "--lr-warmup-steps does nothing with --lr-scheduler constant: use constant_with_warmup")
        check_corruptions(self.corrupt)
        _check_memory(self.max_memory_gib)
        workers = self.dataloader_num_workers
        good = workers is None or 0 <= workers <= MAX_WORKERS
        _require(good, f"--dataloader-num-workers {workers} must be in 0 .. {MAX_WORKERS}")
        counts = ("num_epochs", "resolution", "attack_steps", "ddpm_num_steps", "checkpointing_steps")
        for name in (*counts, "ddpm_num_inference_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")
        _require((self.resolution or 1) <= MAX_SIDE, f"--resolution must be at most {MAX_SIDE} pixels")
        _require(self.train_batch_size <= MAX_BATCH, f"--train-batch-size must be at most {MAX_BATCH}")
        for name in ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "eval_batch_size"):
            _require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name in ("strength", "radius_scale", "radius_floor", "lr_warmup_steps", "adam_weight_decay"):
            value = getattr(self, name)
            good = value is None or (math.isfinite(value) and value >= 0)
            _require(good, f"--{name.replace('_', '-')} {value} must be a finite number, 0 or more")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "attack_step_size"):
            value = getattr(self, name)
            good = value is None or (math.isfinite(value) and value > 0)
            _require(good, f"--{name.replace('_', '-')} {value} must be a finite number above 0")
        exponent = self.radius_exponent
        good = exponent is None or (math.isfinite(exponent) and exponent >= 0)
        _require(good, f"--radius-exponent {exponent} must be a finite number, 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"--{name.replace('_', '-')} must be at least 0 and below 1")
        for name in ("ema_max_decay", "max_bad_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"--{name.replace('_', '-')} must be between 0 and 1")
        _require(self.checkpoints_total_limit >= 1, "--checkpoints-total-limit must be at least 1")
        _require(self.preview_images >= 0, "--preview-images must be 0 or more")
        _require(0 <= self.seed <= MAX_SEED, f"--seed must be in 0 .. {MAX_SEED}")
        _require(not (self.overwrite and self.resuming), "--overwrite and --resume exclude each other: give one")
        self._validate_objective()
        self._validate_told()
        self._validate_evaluation()
        if self.init_from:
            fixed = ("network", "model_config_name_or_path", "prediction_type", "ddpm_num_steps", "ddpm_beta_schedule")
            for name in (*fixed, "rescale_betas_zero_snr"):
                given = getattr(self, name) not in (None, False)
                _require(not given, f"--{name.replace('_', '-')} is fixed by --init-from: leave it out")
        _require(
            not (self.network and self.model_config_name_or_path),
            "--network and --model-config-name-or-path exclude each other: give one",
        )
        zero_snr_epsilon = self.rescale_betas_zero_snr and self.prediction_type in (None, "epsilon")
        _require(
            not zero_snr_epsilon,
            "--rescale-betas-zero-snr needs --prediction-type v_prediction or sample: "
            "epsilon says nothing about the image at pure noise",
        )

    def _validate_evaluation(self) -> None:
        """Refuse flags of the evaluation that are wrong or would do nothing."""
        for name in ("evaluate_every", "evaluate_reference", "evaluate_split", "evaluate_extractor"):
            flag = "--" + name.replace("_", "-")
            _require(getattr(self, name) != "", f"{flag} is empty: give a value, or leave the flag out")
        if self.evaluate_every is None:
            defaults = {"evaluate_extractor": "pixels", "evaluate_n": 500, "evaluate_metric": "fd"}
            names = ("evaluate_reference", "evaluate_split", *defaults)
            given = [name for name in names if getattr(self, name) != defaults.get(name)]
            _require(not given, f"{_flags(given)} needs --evaluate-every: say after how many images, such as 50k")
            return
        parse_count(self.evaluate_every, "--evaluate-every")
        missing = "--evaluate-every needs --evaluate-reference: name clean real images"
        _require(self.evaluate_reference is not None, missing)
        n = self.evaluate_n
        _require(n >= 14, f"--evaluate-n {n} must be at least 14: neighbours are looked for in halves")

    def _validate_told(self) -> None:
        """Refuse knowledge of the images that nobody has, or nobody uses."""
        _require(not self.clean_subset or bool(self.corrupt), "--clean-subset needs --corrupt: add it, or leave it out")
        _require(self.auto or not self.auto_without, "--auto-without needs --auto: add it, or leave it out")
        if self.auto:
            told = "--noise-levels" if self.noise_levels is not None else "--clean-subset" if self.clean_subset else ""
            _require(not told, f"--auto finds out what {told} says: give one")
            unfit = self.objective == "pseudo-huber"
            _require(not unfit, "--auto has no clean optimum with --objective pseudo-huber: use another objective")
        if self.noise_levels is None:
            return
        unfit = self.objective == "pseudo-huber"
        _require(not unfit, "--noise-levels has no clean optimum with --objective pseudo-huber: use another objective")
        if self.noise_levels == FROM_CORRUPT:
            flag, kinds = f"--noise-levels {FROM_CORRUPT}", [c.kind for c in check_corruptions(self.corrupt)]
            _require(bool(kinds), f"{flag} needs --corrupt gaussian:sigma=...: add it, or name a file")
            other = next((kind for kind in kinds if kind != "gaussian"), None)
            message = f"{flag}: an image hit by {other} has no noise level: use --corrupt gaussian only, or name a file"
            _require(other is None, message)
            _require(not self.clean_subset, f"{flag} does nothing with --clean-subset: give one")

    def _validate_objective(self) -> None:
        """Refuse flags of the objective that would do nothing."""
        if self.gate is not None:
            parse_gate(self.gate)
        radius = ("radius_exponent", "radius_scale", "radius_floor", "radius_factor")
        regulariser = ("strength", "gate", "gradient", *radius)
        attack = ("attack_steps", "attack_step_size", "inner")
        given = [name for name in (*regulariser, *attack, "perturbation") if getattr(self, name) is not None]
        if self.objective in ("input-perturbation", "pseudo-huber"):
            given += [] if self.preset is None else ["preset"]
            _require(not given, f"--objective {self.objective} has no perturbation: leave out {_flags(given)}")
        usual = {"paper": "adversarial", "gated": "random", "plain": "none"}[self.start]
        perturbation = self.perturbation or usual
        if perturbation == "none" and self.objective in ("robust", "invariance"):
            idle = [name for name in given if name != "perturbation"]
            _require(not idle, f"without a perturbation {_flags(idle)} would do nothing: add --perturbation random")
            _require(self.objective == "robust", "--objective invariance needs --perturbation random or adversarial")
        unmatched = self.objective == "invariance" and self.inner == "residual"
        _require(not unmatched, "--inner residual is not what --objective invariance penalises: use shift")
        powerless = self.start == "plain" and perturbation != "none" and self.strength is None
        what = "--preset plain" if self.preset else "--auto"
        _require(not powerless, f"{what} has no strength for --perturbation {perturbation}: add --strength")
        if perturbation != "adversarial":
            idle = [name for name in attack if getattr(self, name) is not None]
            _require(not idle, f"{_flags(idle)} needs --perturbation adversarial")

    @property
    def start(self) -> Literal["paper", "gated", "plain"]:
        """The preset that the objective starts from."""
        return self.preset or ("plain" if self.auto else "gated")

    @property
    def resuming(self) -> bool:
        """Whether this run goes on from a checkpoint."""
        return self.resume or self.resume_from_checkpoint is not None


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from any pipeline built on UNet2DModel: a run folder, another folder, or a hub id."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Pipeline folder or hub id."""
    n: Annotated[int, arg(aliases=["-n"])] = 64
    """Number of images."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="PATH")] = None
    """Folder for PNGs and grid.png, or a file ending in .npz. Default: RUN/samples/SCHEDULER-STEPS-seedSEED."""
    scheduler: Literal["ddim", "ddpm", "dpm", "unipc", "euler"] = "ddim"
    """Sampler. ddim, dpm, unipc and euler are deterministic."""
    steps: int = 50
    """Network calls per image, trailing spacing; ddim and ddpm need a divisor of the noise levels (1000)."""
    seed: int = 0
    """Image i is drawn from its own generator, seeded with SEED + i (SEED >= 0), whatever the batch size."""
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass."""
    relabel: float = 1.0
    """Query the network at RELABEL times the noise level (>= 1): smoother images, no training."""
    label_floor: float = 0.0
    """Never query the network below this noise level sigma/alpha (>= 0): ask for no detail finer than that."""
    class_label: Annotated[str | None, arg(metavar="CLASS")] = None
    """Class to draw, by name or counted from 0, for class-conditional pipelines. Default: classes in turn."""
    overwrite: bool = False
    """Replace existing output."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        _require(self.run != "", "RUN is empty: name a pipeline folder or a hub id")
        _require(self.output != "", "--output is empty: name a folder, or a file ending in .npz")
        _require(self.class_label != "", "--class-label is empty: name a class, or its number")
        _require(self.n >= 1, f"-n {self.n} must be at least 1")
        _require(self.steps >= 1, f"--steps {self.steps} must be at least 1")
        _require(self.batch_size >= 1, f"--batch-size {self.batch_size} must be at least 1")
        _require(0 <= self.seed <= MAX_SEED, f"--seed must be in 0 .. {MAX_SEED}")
        _require(math.isfinite(self.relabel) and self.relabel >= 1, f"--relabel {self.relabel} must be 1 or more")
        floor = self.label_floor
        _require(math.isfinite(floor) and floor >= 0, f"--label-floor {floor} must be 0 or more")


@dataclass(frozen=True)
class AuditConfig:
    """Look at every image before training: bad files, sizes, duplicates, noise, and damage; nothing is changed."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Any source of images that `robustdiff train` takes; mixed sizes and bad files are reported, not refused."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for audit.json and found.json (every image), worst.png (the twenty noisiest) and a sheet of each damage,
    clean.txt (names), and noise.csv, as `robustdiff train --noise-levels` takes it. Default: print only."""
    resolution: OptionalInt = None
    """Resize the shorter side to this many pixels and crop the centre square first; resizing hides noise.
    Default: images as they are."""
    split: OptionalText = None
    """Part of a data set that comes in parts (train, test ..., or all). Default: train."""
    dataset_config_name: OptionalText = None
    """Configuration of a hub data set that has several."""
    image_column: OptionalText = None
    """Column of a table that holds the images. Default: the only one that can."""
    extractor: OptionalText = None
    """Look for foreign pictures too: the farthest from the others in these features, as --extractor of
    `robustdiff evaluate` takes them. They are shown, and not acted on."""
    overwrite: bool = False
    """Replace the audit that FOLDER holds."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        _check_given(self, "data", "output", "split", "dataset_config_name", "image_column", "extractor")
        _check_resolution(self.resolution)
        _require(self.output is not None or not self.overwrite, "--overwrite does nothing without --output: add it")


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge a pipeline, or a folder of images made anywhere: quality, coverage, copying, few steps.

    Every number is written with its floor (real against real) and with all that it rests on: one JSON per result.
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder, pipeline folder or hub id; or images: anything that `robustdiff train` reads."""
    reference: OptionalText = None
    """Clean real images to compare with, not trained on if there are such: anything that `robustdiff train` reads."""
    extractor: UseAppendAction[tuple[str, ...]] = ()
    """What turns images into features (repeatable): pixels, a TorchScript file, inception or inception:WEIGHTS.pth, or
    the folder of a vision model of transformers. Default: pixels. A TorchScript file is a program: trust it."""
    n: Annotated[int | None, arg(aliases=["-n"], metavar="INT")] = None
    """Images judged, >= 14. Default: 1000 of a pipeline, all of a folder."""
    training: OptionalText = None
    """Training images, to look for copies of. Default: those that the run folder names; `none` = leave it out."""
    held_out: OptionalText = None
    """More clean real images: the floor is theirs against the reference. Default: one half of the reference against the
    other, which is too few."""
    split: OptionalText = None
    """Part of the reference, if it comes in parts (train, test ..., or all). Default: train."""
    training_split: OptionalText = None
    """Part of --training. Default: train."""
    held_out_split: OptionalText = None
    """Part of --held-out. Default: train."""
    dataset_config_name: OptionalText = None
    """Configuration of the reference, if it is a hub data set that has several."""
    image_column: OptionalText = None
    """Column of the reference that holds the images, if it is a table. Default: the only one that can."""
    resolution: OptionalInt = None
    """Resize the shorter side of every image to this many pixels and crop the centre square. Default: as the generated
    images are; real images of another size are brought to that if it is square."""
    few_step: OptionalText = None
    """Also draw with these numbers of network calls, for example 5,10,20,50. Default: none."""
    few_step_schedulers: OptionalText = None
    """Samplers of --few-step, for example ddim,dpm. Default: ddim."""
    scheduler: Literal["ddim", "ddpm", "dpm", "unipc", "euler"] = "ddim"
    """Sampler of a pipeline."""
    steps: int = 50
    """Network calls per image, trailing spacing; ddim and ddpm need a divisor of the noise levels (1000)."""
    seed: int = 0
    """Image i is drawn from its own generator, seeded with SEED + i; SEED >= 0."""
    relabel: float = 1.0
    """Query the network at RELABEL times the noise level (>= 1)."""
    label_floor: float = 0.0
    """Never query the network below this noise level sigma/alpha (>= 0)."""
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass, >= 1."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for the JSON files and sheets. Default: RUN/evaluation of a pipeline folder, else
    evaluation/NAME/evaluation here."""
    title: OptionalText = None
    """What tables call it. Default: the name of the folder."""
    told: OptionalText = None
    """What the method knew beside its training images, for the tables. Default: not stated."""
    cache: OptionalText = None
    """Folder that keeps features by content, or `none`. Default: ~/.cache/robustdiff (see ROBUSTDIFF_CACHE)."""
    max_bad_fraction: float = 0.01
    """Largest share of unreadable images that is skipped rather than an error, 0 to 1."""

    def validate(self) -> None:
        """Check ranges, and refuse flags that would do nothing.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        texts = ("run", "reference", "training", "held_out", "split", "training_split", "held_out_split", "title")
        _check_given(self, *texts, "dataset_config_name", "image_column", "few_step", "output", "told", "cache")
        _require(
            self.reference is not None,
            "--reference is missing: name clean real images to compare with (a folder, a parquet file ...)",
        )
        _check_extractors(self.extractor)
        for owner in ("training", "held_out"):
            idle = getattr(self, owner) in (None, "none") and getattr(self, f"{owner}_split") is not None
            flag = "--" + owner.replace("_", "-")
            _require(not idle, f"{flag}-split needs {flag}: add it, or leave this one out")
        _require(
            self.n is None or self.n >= 14, f"-n {self.n} must be at least 14: neighbours are looked for in halves"
        )
        _require(self.steps >= 1, f"--steps {self.steps} must be at least 1")
        _require(self.batch_size >= 1, f"--batch-size {self.batch_size} must be at least 1")
        _require(0 <= self.seed <= MAX_SEED, f"--seed must be in 0 .. {MAX_SEED}")
        _require(math.isfinite(self.relabel) and self.relabel >= 1, f"--relabel {self.relabel} must be 1 or more")
        floor = self.label_floor
        _require(math.isfinite(floor) and floor >= 0, f"--label-floor {floor} must be 0 or more")
        _check_resolution(self.resolution)
        _check_bad_fraction(self.max_bad_fraction)
        idle = self.few_step_schedulers is not None and self.few_step is None
        _require(not idle, "--few-step-schedulers needs --few-step: name numbers of steps, such as 5,10,20")
        self.few_step_counts()
        self.few_step_samplers()

    def few_step_counts(self) -> tuple[int, ...]:
        """``--few-step`` as numbers, ascending.

        Raises:
            UsageError: If they are no whole numbers, or fewer than one.
        """
        try:
            counts = sorted({int(text) for text in (self.few_step or "").split(",") if self.few_step})
        except ValueError:
            counts = [0]
        _require(not counts or counts[0] >= 1, f"--few-step {self.few_step} is no list such as 5,10,20,50")
        return tuple(counts)

    def few_step_samplers(self) -> tuple[str, ...]:
        """``--few-step-schedulers``, in the order given.

        Raises:
            UsageError: If one is unknown.
        """
        known = ("ddim", "ddpm", "dpm", "unipc", "euler")
        names = tuple(dict.fromkeys((self.few_step_schedulers or "ddim").split(",")))
        for name in names:
            _require(name in known, f"--few-step-schedulers {name!r} is not one of {', '.join(known)}")
        return names


@dataclass(frozen=True)
class AttackConfig:
    """Attack a pipeline while it draws: push its states within a radius, so that images end far from where they would.

    Beside the attack asked for: random noise, one step, shorter and longer PGD, an adaptive one, other radii and step
    sizes, and flags that say when the result must not be believed. Interrupted, the same command goes on.
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder, pipeline folder or hub id."""
    radius: OptionalFloat = None
    """Bound on each push, in units of the noise scale of its step, > 0; the pushes of many steps add up. Default: 0.01
    (linf), 0.01 times the root of the number of values of an image (l2)."""
    norm: Literal["linf", "l2"] = "linf"
    """linf: every value of a push within the radius; l2: its Euclidean length."""
    at: str = "all"
    """Sampler steps that are pushed, counted from 0 (pure noise): `all`, or a list such as 0,10,20."""
    objective: Literal["end-to-end", "target", "batch-mean", "batch-kernel", "shift", "residual"] = "end-to-end"
    """end-to-end: the final image far from the undisturbed one, through all remaining steps; target: near the
    undisturbed next image; batch-mean, batch-kernel: all images together away from the reference, in the mean of the
    features of the first --extractor, or in KID's kernel distance; shift, residual: the network's answer at each step
    by itself, as training attacks it."""
    optimiser: Literal["pgd", "apgd", "one-step", "random"] = "pgd"
    """pgd: projected gradient ascent; apgd: with adaptive steps; one-step: one gradient step; random: best of draws."""
    iterations: OptionalInt = None
    """Gradient steps of pgd and apgd, draws of random, >= 4. Default: 40. Baselines: a quarter and 2.5 times of it."""
    restarts: int = 1
    """Random starts of pgd, apgd and one-step, >= 1; each image keeps the best."""
    step_size: OptionalFloat = None
    """Step of pgd in units of the radius, > 0. Default: 2.5 / iterations."""
    momentum: float = 0.0
    """Decay of the gradients that pgd gathers, >= 0; 0 = none."""
    scheduler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler that is attacked: deterministic, or with fresh noise at each step."""
    steps: int = 50
    """Network calls per image, trailing spacing; must divide the noise levels (1000)."""
    noise: Literal["known", "fixed", "fresh"] | None = None
    """What the attacker knows of ddpm's noise: all of it (known), or nothing: then the attack is on the mean over --eot
    draws, the same throughout (fixed) or new at each step (fresh). Default: known."""
    eot: OptionalInt = None
    """Draws of the noise per gradient for --noise fixed and fresh, >= 1. Default: 5."""
    verdicts: OptionalInt = None
    """Other draws of the noise that judge the result of --noise fixed and fresh, >= 1. Default: 20."""
    n: Annotated[int, arg(aliases=["-n"])] = 64
    """Number of images attacked, >= 2."""
    sweep_n: int = 16
    """Images of these, the first, on which longer and shorter PGD, adaptive steps, other radii and step sizes are
    tried, >= 2; every curve and comparison is of the same images."""
    seed: int = 0
    """Image i starts from its own generator, seeded with SEED + i, as `robustdiff sample` does; SEED >= 0."""
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass, >= 1; memory grows with it."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Less memory for more time, the same result. always: a gradient holds one state per step, and calls the network
    twice; never: it holds the activations of all steps; auto: never where they fit into half of the free memory."""
    workers: OptionalInt = None
    """Attacks computed side by side, >= 1, each on its share of the threads; memory grows with it. Default: as many as
    there are threads (OMP_NUM_THREADS), at most 4 and no more than there is memory for; on a GPU 1."""
    reference: OptionalText = None
    """Clean real images that quality before and after the attack is measured against: anything that `robustdiff train`
    reads. Default: 2000 of those that the run folder names as its data; `none` = leave it out."""
    extractor: UseAppendAction[tuple[str, ...]] = ()
    """What turns images into features for that (repeatable), as of `robustdiff evaluate`. Default: pixels."""
    split: OptionalText = None
    """Part of the reference, if it comes in parts (train, test ..., or all). Default: train."""
    dataset_config_name: OptionalText = None
    """Configuration of the reference, if it is a hub data set that has several."""
    image_column: OptionalText = None
    """Column of the reference that holds the images, if it is a table. Default: the only one that can."""
    max_bad_fraction: float = 0.01
    """Largest share of unreadable images of the reference that is skipped rather than an error, 0 to 1."""
    cache: OptionalText = None
    """Folder that keeps features by content, or `none`. Default: ~/.cache/robustdiff (see ROBUSTDIFF_CACHE)."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for the result and its pictures. Default: RUN/evaluation of a pipeline folder, else
    evaluation/NAME/evaluation here."""
    title: OptionalText = None
    """What tables call it. Default: the name of the folder."""
    told: OptionalText = None
    """What the method knew beside its training images, for the tables. Default: not stated."""
    overwrite: bool = False
    """Attack anew, even what is finished; without, finished parts are kept and the rest is done."""

    def validate(self) -> None:
        """Check ranges, and refuse flags that would do nothing.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        texts = ("output", "title", "told", "at", "reference", "split", "dataset_config_name", "image_column", "cache")
        _check_given(self, "run", *texts)
        radius, most = self.radius, 10.0 if self.norm == "linf" else math.inf
        good = radius is None or (math.isfinite(radius) and 0 < radius <= most)
        remedy = "use 0.001 to 1" + ("" if self.norm == "linf" else " times the root of the values of an image")
        _require(
            good, f"--radius {radius} is not a push in units of the noise scale, above 0 and at most {most}: {remedy}"
        )
        counts = {
            "iterations": 4,
            "restarts": 1,
            "steps": 1,
            "eot": 1,
            "verdicts": 1,
            "n": 2,
            "sweep_n": 2,
            "batch_size": 1,
            "workers": 1,
        }
        for name, least in counts.items():
            value, flag = getattr(self, name), "-n" if name == "n" else "--" + name.replace("_", "-")
            _require(value is None or value >= least, f"{flag} {value} must be at least {least}")
        good = self.step_size is None or (math.isfinite(self.step_size) and self.step_size > 0)
        _require(good, f"--step-size {self.step_size} must be a finite number above 0")
        good = math.isfinite(self.momentum) and self.momentum >= 0
        _require(good, f"--momentum {self.momentum} must be a finite number, 0 or more")
        _require(0 <= self.seed <= MAX_SEED, f"--seed must be in 0 .. {MAX_SEED}")
        if self.optimiser != "pgd":
            idle = [name for name in ("step_size", "momentum") if getattr(self, name)]
            _require(
                not idle, f"{_flags(idle)} does nothing with --optimiser {self.optimiser}: leave it out, or use pgd"
            )
        idle_restarts = self.optimiser == "random" and self.restarts > 1
        _require(not idle_restarts, "--restarts does nothing with --optimiser random: raise --iterations")
        idle_iterations = self.optimiser == "one-step" and self.iterations is not None
        _require(not idle_iterations, "--iterations does nothing with --optimiser one-step: use --restarts, or pgd")
        if self.scheduler == "ddim":
            idle = [name for name in ("noise", "eot", "verdicts") if getattr(self, name) is not None]
            _require(not idle, f"{_flags(idle)}: ddim draws no noise; add --scheduler ddpm, or leave it out")
        alone = self.noise in ("fixed", "fresh") and self.objective in ("shift", "residual")
        message = (
            f"--noise {self.noise} does nothing with --objective {self.objective}, whose attacker knows each state: "
        )
        _require(not alone, message + "leave it out, or use end-to-end")
        if self.noise in (None, "known"):
            idle = [name for name in ("eot", "verdicts") if getattr(self, name) is not None]
            _require(not idle, f"{_flags(idle)} needs --noise fixed or fresh: the attacker knows the noise")
        alone = self.gradient_checkpointing != "auto" and self.objective in ("shift", "residual")
        message = f"--gradient-checkpointing does nothing with --objective {self.objective}, whose steps are separate: "
        _require(not alone, message + "leave it out, or use end-to-end")
        self._check_reference()
        self.attacked()

    def _check_reference(self) -> None:
        """What quality after the attack is measured against, and by."""
        _check_extractors(self.extractor)
        _check_bad_fraction(self.max_bad_fraction)
        nothing = self.reference == "none" and bool(self.extractor)
        _require(not nothing, "--extractor does nothing with --reference none: leave one of them out")
        away = self.reference == "none" and self.objective.startswith("batch")
        _require(not away, f"--objective {self.objective} needs real images to push away from: name a --reference")
        if self.reference in (None, "none"):
            idle = [name for name in ("split", "dataset_config_name", "image_column") if getattr(self, name)]
            _require(not idle, f"{_flags(idle)} needs --reference: add it, or leave this out")

    def attacked(self) -> tuple[int, ...]:
        """The sampler steps of ``--at``, rising.

        Raises:
            UsageError: If they are no steps of the sampler.
        """
        if self.at == "all":
            return tuple(range(self.steps))
        try:
            found = sorted({int(text) for text in self.at.split(",")})
        except ValueError:
            found = []
        _require(bool(found), f"--at {self.at} is no list of sampler steps such as 0,10,20: use that, or all")
        wrong = next((step for step in found if not 0 <= step < self.steps), None)
        _require(
            wrong is None, f"--at {wrong}: the sampler has steps 0 .. {self.steps - 1}; name those, or raise --steps"
        )
        return tuple(found)


@dataclass(frozen=True)
class ReportConfig:
    """Make one HTML page of any number of run folders: it needs no network and no other file."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")] = ()
    """Folders that `train`, `evaluate` or `audit` wrote, at least one."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE")] = "report.html"
    """File to write; replaced if it is there."""
    title: OptionalText = None
    """Heading of the page. Default: the names of the runs."""

    def validate(self) -> None:
        """Check that something is named.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        _require(bool(self.runs) and "" not in self.runs, "report needs at least one RUN: name a run folder")
        _require(self.output != "", "--output is empty: name a file, such as report.html")
        _require(self.title != "", "--title is empty: give a text, or leave the flag out")


EXPERIMENTS = ("plane", "mixture", "subspace", "linear-gaussian", "invariance", "cifar10", "celeba", "lsun")
IMAGE_GRIDS = ("cifar10", "celeba", "lsun")
"""Experiments on images that the user has."""


@dataclass(frozen=True)
class ReproduceConfig:
    """Run an experiment; run it again, and it goes on where it was stopped.

    NAME is plane, mixture, subspace, linear-gaussian or invariance (distributions whose truth is known), or cifar10,
    celeba or lsun (the image grid). Writes one JSON per row, figures and a page.
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """plane | mixture | subspace | linear-gaussian | invariance | cifar10 | celeba | lsun."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for results, networks and figures. Default: reproduce/NAME (image grids: NAME-SCALE), -quick added."""
    quick: bool = False
    """Few rows, one seed, short training: shows what happens in a minute or two; its numbers prove nothing."""
    rows: UseAppendAction[tuple[str, ...]] = ()
    """Only rows whose name matches, e.g. 'plane-inlier-*' (repeatable; shell wildcards; see --list)."""
    list: bool = False
    """Print the names of the rows and stop; writes nothing."""
    seeds: OptionalInt = None
    """Seeds of the rows that conclusions rest on, from 0; the others have one. Default: 3; image grids: 2."""
    workers: OptionalInt = None
    """Rows run side by side, >= 1. Default: one per core, one core each; on a GPU 1."""
    data: OptionalText = None
    """Images: anything that `robustdiff train` reads. Image grids need it; `subspace` has digits built in."""
    resolution: OptionalInt = None
    """For --data of `subspace`: resize the shorter side to this many pixels and crop the centre square; made grey."""
    components: OptionalInt = None
    """Principal components that span the image world of `subspace`, >= 1. Default: 8."""
    dimension: OptionalInt = None
    """Dimension of `linear-gaussian`, >= 2 and at most 64. Default: 16."""
    spectrum: OptionalText = None
    """Variances of `linear-gaussian`: powerlaw, flat or two-level. Default: powerlaw."""
    scale: Literal["cpu", "gpu-10min", "gpu-1h", "gpu"] | None = None
    """How large an image grid is. cpu: 16 x 16 grey, 8 to 25 minutes a row on one core; gpu: 32 x 32 RGB, the paper's
    length; gpu-10min, gpu-1h: shorter runs of a smaller network. Default: cpu."""
    extractor: UseAppendAction[tuple[str, ...]] = ()
    """What image grids are judged by, beside pixels: see --extractor of `robustdiff evaluate`; the first one ranks."""
    minutes: OptionalFloat = None
    """Image grids: save and stop after so many minutes (> 0); the same command goes on. Default: when all is done."""
    overwrite: bool = False
    """Delete what FOLDER holds and start anew."""

    def validate(self) -> None:
        """Check ranges, and refuse flags that would do nothing.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        near = difflib.get_close_matches(self.name, EXPERIMENTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        _require(self.name in EXPERIMENTS, f"no experiment {self.name!r}{hint}; there are {', '.join(EXPERIMENTS)}")
        _require(self.output != "", "--output is empty: name a folder, or leave the flag out")
        seeds = self.seeds
        _require(seeds is None or 1 <= seeds <= 100, f"--seeds {seeds} must be in 1 .. 100")
        _require(not (self.quick and seeds is not None), "--quick has one seed: leave out --seeds")
        workers = self.workers
        _require(workers is None or 1 <= workers <= MAX_WORKERS, f"--workers {workers} must be in 1 .. {MAX_WORKERS}")
        owners = {
            "data": ("subspace", *IMAGE_GRIDS),
            **dict.fromkeys(("resolution", "components"), ("subspace",)),
            **dict.fromkeys(("dimension", "spectrum"), ("linear-gaussian",)),
            **dict.fromkeys(("scale", "extractor", "minutes"), IMAGE_GRIDS),
        }
        for name, names in owners.items():
            idle = self.name not in names and getattr(self, name) not in (None, ())
            _require(not idle, f"--{name} belongs to {', '.join(names)}: leave it out")
        if self.name == "linear-gaussian":
            _require(seeds is None and workers is None, "linear-gaussian runs alone: leave out --seeds and --workers")
        _require(not (self.resolution and self.data is None), "--resolution needs --data: digits are 8 x 8")
        for name in ("resolution", "components"):
            value = getattr(self, name)
            _require(value is None or 1 <= value <= MAX_SIDE, f"--{name} {value} must be in 1 .. {MAX_SIDE}")
        _require(self.data != "", "--data is empty: name a source of images, or leave the flag out")
        needed = self.name in IMAGE_GRIDS and self.data is None and not self.list
        _require(not needed, f"{self.name} needs images: add --data PATH (docs/data.md says in which forms they come)")
        good = self.minutes is None or (math.isfinite(self.minutes) and self.minutes > 0)
        _require(good, f"--minutes {self.minutes} must be more than 0")
        _check_extractors(self.extractor)


@dataclass(frozen=True)
class PurifyConfig:
    """Purify images: drown what was done to them in noise, and denoise them with a model; with a manifest."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Any source of images that `robustdiff train` takes, of the model's size (or with --resolution)."""
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Pipeline that denoises: a run folder, another folder, or a hub id."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder to write: one PNG per image under its own relative name, and manifest.json. Needed."""
    strength: float = 0.1
    """How far up the noise goes, as a share of the model's noise levels, > 0 and at most 1: more removes more, of the
    image too."""
    steps: int = 10
    """Network calls per image from there down, >= 1; no more than there are noise levels below."""
    scheduler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler: ddim draws noise once, at the start; ddpm at each step."""
    seed: int = 0
    """Rules the noise: that of image i is a function of (SEED, i), whatever the batch size; SEED >= 0."""
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass, >= 1."""
    resolution: OptionalInt = None
    """Resize the shorter side to this many pixels and crop the centre square first: the model's own size."""
    split: OptionalText = None
    """Part of a data set that comes in parts (train, test ..., or all). Default: train."""
    dataset_config_name: OptionalText = None
    """Configuration of a hub data set that has several."""
    image_column: OptionalText = None
    """Column of a table that holds the images. Default: the only one that can."""
    label_column: OptionalText = None
    """Column of a table that holds the class labels, for class-conditional models. Default: as `robustdiff train`."""
    max_bad_fraction: float = 0.01
    """Largest share of unreadable images that is skipped rather than an error, 0 to 1."""
    max_memory_gib: OptionalGiB = None
    """Hold the decoded images if they take at most this much. Default: half of the free memory."""
    overwrite: bool = False
    """Replace FOLDER, if it holds purified images."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        _require(self.data != "" and self.model != "", "DATA and MODEL must not be empty: name images and a pipeline")
        _require(self.output is not None, "--output is missing: name a folder, such as -o purified")
        _check_given(self, "output", "split", "dataset_config_name", "image_column", "label_column")
        good = 0 < self.strength <= 1
        _require(good, f"--strength {self.strength} must be above 0 and at most 1: 0.1 removes what is faint")
        _require(self.steps >= 1, f"--steps {self.steps} must be at least 1")
        _require(self.batch_size >= 1, f"--batch-size {self.batch_size} must be at least 1")
        _require(0 <= self.seed <= MAX_SEED, f"--seed must be in 0 .. {MAX_SEED}")
        _check_resolution(self.resolution)
        _check_bad_fraction(self.max_bad_fraction)
        _check_memory(self.max_memory_gib)


@dataclass(frozen=True)
class CorruptConfig:
    """Write a dirty copy of a folder of images, with a manifest that says which image got what."""

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """Any source of images that `robustdiff train` takes."""
    destination: Annotated[Positional[str], arg(metavar="DST")]
    """Folder to write: one PNG per image (clipped to 8 bit) and manifest.json."""
    corrupt: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=["--with"])] = ()
    """KIND:NAME=VALUE,...,fraction=SHARE (repeatable, applied in order)."""
    poison: Annotated[str | None, arg(metavar="MODEL")] = None
    """Adversarial dirt, applied last: pixels are pushed to where this pipeline denoises worst, so as to spoil training
    (folder or hub id; images must be of its size)."""
    poison_radius: Annotated[str | None, arg(metavar="NUMBER")] = None
    """Largest change of a pixel by --poison, in units of [-1, 1]: a number or a fraction, 1/127.5 to 2. Holds in the
    8-bit files. Default: 16/255, which is the usual 8/255 of [0, 1]."""
    poison_fraction: OptionalFloat = None
    """Probability that --poison hits an image, for each independently, 0 to 1. Default: 1."""
    poison_steps: OptionalInt = None
    """Gradient steps of --poison, >= 1. Default: 40."""
    poison_draws: OptionalInt = None
    """Random noise levels and noises behind each gradient of --poison, >= 1. Default: 4."""
    batch_size: OptionalInt = None
    """Images per forward pass of --poison, >= 1; changes no draw. Default: 64."""
    seed: int = 0
    """Rules which images are hit and every draw; a whole number >= 0."""
    resolution: OptionalInt = None
    """Resize the shorter side to this many pixels and crop the centre square first."""
    split: OptionalText = None
    """Part of a data set that comes in parts (train, test ..., or all). Default: train."""
    dataset_config_name: OptionalText = None
    """Configuration of a hub data set that has several."""
    image_column: OptionalText = None
    """Column of a table that holds the images. Default: the only one that can."""
    max_bad_fraction: float = 0.01
    """Largest share of unreadable images that is skipped rather than an error, 0 to 1."""
    max_memory_gib: OptionalGiB = None
    """Hold the decoded images if they take at most this much. Default: half of the free memory."""
    overwrite: bool = False
    """Replace DST."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        _require(self.source != "" and self.destination != "", "SRC and DST must not be empty: name two folders")
        message = "--corrupt is missing: give at least one, e.g. --corrupt gaussian:sigma=0.2, or --poison MODEL"
        _require(bool(self.corrupt) or self.poison is not None, message)
        check_corruptions(self.corrupt)
        self._check_poison()
        _check_memory(self.max_memory_gib)
        _check_bad_fraction(self.max_bad_fraction)
        _check_given(self, "split", "dataset_config_name", "image_column")
        _require(self.seed >= 0, "--seed must be 0 or more")
        _check_resolution(self.resolution)

    def _check_poison(self) -> None:
        _require(self.poison != "", "--poison is empty: name a pipeline, or leave the flag out")
        flags = ("poison_radius", "poison_fraction", "poison_steps", "poison_draws", "batch_size")
        idle = [name for name in flags if getattr(self, name) is not None]
        _require(self.poison is not None or not idle, f"{_flags(idle)} needs --poison MODEL: add it, or leave it out")
        self.radius()
        fraction = self.poison_fraction
        _require(fraction is None or 0 <= fraction <= 1, f"--poison-fraction {fraction} must be between 0 and 1")
        for name in flags[2:]:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")

    def radius(self) -> float:
        """``--poison-radius`` as a number, in units of [-1, 1].

        Raises:
            UsageError: If it is none, or out of range.
        """
        text = "16/255" if self.poison_radius is None else self.poison_radius
        top, _, bottom = text.partition("/")
        try:
            value = float(top) / float(bottom or 1)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        good = 1 / 127.5 - 1e-9 <= value <= 2
        _require(good, f"--poison-radius {text} is not in 1/127.5 (one 8-bit step) .. 2: use 16/255, or 0.1")
        return value
