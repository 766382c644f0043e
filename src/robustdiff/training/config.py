"""Settings of `robustdiff train`, each with its unit and default, checked before anything heavy is imported.

A little over 400 lines: every flag of the command in one place, with what it does and which others it excludes.

Standard library and tyro's annotations only, so that ``robustdiff --help`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from robustdiff.audit.parts import check_parts
from robustdiff.data.corruption import check_corruptions
from robustdiff.losses.named import LOSSES, LossName
from robustdiff.utils.errors import UsageError
from robustdiff.utils.options import (
    MAX_BATCH,
    MAX_SEED,
    MAX_SIDE,
    MAX_WORKERS,
    BadFraction,
    HubConfig,
    ImageColumn,
    OptionalFloat,
    OptionalGiB,
    OptionalInt,
    OptionalText,
    Settings,
    Split,
    ValueRange,
    check_memory,
    listed,
    parse_count,
    require,
)

FROM_CORRUPT = "corrupt"
"""``noise_levels``: not a file, but the dirt that the run itself adds."""


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
        raise UsageError(f"`gate` {text!r} is not LOW:HIGH with 0 <= LOW <= HIGH, for example `gate` 0:0.3")
    return low, high


@dataclass(frozen=True)
class TrainConfig(Settings):
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
    split: Split = None
    dataset_config_name: HubConfig = None
    image_column: ImageColumn = None
    label_column: OptionalText = None
    """Column of a table that holds the class labels. Default: the only one declared so, or called label, class ..."""
    value_range: ValueRange = None
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
    max_bad_fraction: BadFraction = 0.01
    max_memory_gib: OptionalGiB = None
    """Hold the decoded images if they take at most this much, else decode them at every use; 0 = always the latter.
    Default: half of the free memory, divided by the processes on this machine."""
    dataloader_num_workers: OptionalInt = None
    """Worker processes that decode and dirty images ahead, 0 = none. Default: 0 if images are held, else up to 4."""

    # -- objective --
    auto: bool = False
    """Find out which images are noisy, blurred, compressed, holed, odd or copies, and train each only where it can be
    trusted: on clean images plain training, else plain training of what is right in each (docs/guide/audit.md)."""
    auto_without: UseAppendAction[tuple[Annotated[str, arg(metavar="PART")], ...]] = ()
    """A part that --auto leaves out (repeatable): a kind of damage as the plan names it, such as noise or duplicates,
    or the regulariser. Any other word lists them."""
    noise_levels: OptionalText = None
    """Gaussian noise that each image carries, above which only it is then trained: a CSV of NAME,SIGMA (sigma in the
    [-1, 1] range, at the size that is trained; images not named are clean), a JSON object, the manifest.json of
    `robustdiff corrupt`, or the word `corrupt`: as --corrupt gaussian adds it. Default: nothing is known."""
    preset: Literal["fast", "paper", "paper-random", "paper-noise", "paper-scaled", "gated", "plain"] | None = None
    """Objective settings to start from; the flags of this group override single ones. gated: random perturbation at low
    noise levels only (2 forward passes there); paper: adversarial, radius in units of the state, the reading of the
    published settings that shows their pattern; fast: the same at low noise levels only (3 passes there); paper-random:
    the random variant; paper-noise, paper-scaled: other readings (docs/explanation/method.md); plain: no regulariser.
    Default: gated; with --auto plain, or a gate below the noise if every image has some."""
    objective: LossName = "robust"
    """robust: equivariance. The others are what it is compared with."""
    perturbation: Literal["none", "random", "adversarial"] | None = None
    """Direction of the perturbation; none is plain training. Default: the preset's."""
    strength: OptionalFloat = None
    """lambda, weight of the regulariser, >= 0. Default: the preset's."""
    strength_beta: OptionalFloat = None
    """Divide lambda by the deviation of a uniform perturbation of BETA times the radius r: lambda sqrt(3) / (BETA r),
    BETA > 0, for every image. Default: the preset's (1 in paper-scaled, else lambda as it is)."""
    normalise: Literal["yes", "no"] | None = None
    """Divide both terms of a noise level by 1 + lambda E[omega^2], so that no level rules the others.
    Default: yes where the radius is in units of the state."""
    gate: OptionalText = None
    """Regularise only where LOW <= sigma/alpha <= HIGH, as LOW:HIGH; `0:inf` is everywhere. Default: the preset's."""
    radius_exponent: OptionalFloat = None
    """Power, >= 0, of the noise scale sigma (0 to 1) in the radius of the perturbation. Default: the preset's."""
    radius_units: Literal["noise", "state"] | None = None
    """What the radius bounds: the change of the unit-variance noise eps, or the move of the noisy image x_t, in the
    range [-1, 1] of the images. Default: the preset's."""
    radius_scale: OptionalFloat = None
    """Factor of the radius, in those units, >= 0. Default: the preset's."""
    radius_floor: OptionalFloat = None
    """Least radius, in those units, >= 0. Default: the preset's."""
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
    network: Literal["tiny", "small", "medium", "base", "large", "improved-ddpm"] | None = None
    """Preset network (UNet2DModel). base, improved-ddpm: as published for CIFAR-10 (Ho et al. 2020; Nichol and Dhariwal
    2021, with --ddpm-beta-schedule squaredcos_cap_v2 --ddpm-num-steps 4000). Default: by image size."""
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
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        self.check_choices(objective=LOSSES)
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
            "value_range",
            "noise_levels",
        ):
            require(getattr(self, name) != "", f"`{name}` is empty: name a file or folder, or leave the flag out")
        parse_count(self.images, "images")
        idle = self.num_epochs is not None and self.images != "500k"
        require(not idle, "`num_epochs` and `images` exclude each other: give one")
        idle = not self.use_ema and self.ema_max_decay != 0.9999
        require(not idle, "`ema_max_decay` does nothing with `use_ema=False`: leave one out")
        idle = self.lr_scheduler == "constant" and bool(self.lr_warmup_steps)
        require(not idle, "`lr_warmup_steps` does nothing with `lr_scheduler` constant: use constant_with_warmup")
        check_corruptions(self.corrupt)
        check_memory(self.max_memory_gib)
        workers = self.dataloader_num_workers
        good = workers is None or 0 <= workers <= MAX_WORKERS
        require(good, f"`dataloader_num_workers` {workers} must be in 0 .. {MAX_WORKERS}")
        counts = ("num_epochs", "resolution", "attack_steps", "ddpm_num_steps", "checkpointing_steps")
        for name in (*counts, "ddpm_num_inference_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"`{name}` {value} must be at least 1")
        require((self.resolution or 1) <= MAX_SIDE, f"`resolution` must be at most {MAX_SIDE} pixels")
        require(self.train_batch_size <= MAX_BATCH, f"`train_batch_size` must be at most {MAX_BATCH}")
        for name in ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "eval_batch_size"):
            require(getattr(self, name) >= 1, f"`{name}` {getattr(self, name)} must be at least 1")
        for name in ("strength", "radius_scale", "radius_floor", "lr_warmup_steps", "adam_weight_decay"):
            value = getattr(self, name)
            good = value is None or (math.isfinite(value) and value >= 0)
            require(good, f"`{name}` {value} must be a finite number, 0 or more")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "attack_step_size", "strength_beta"):
            value = getattr(self, name)
            good = value is None or (math.isfinite(value) and value > 0)
            require(good, f"`{name}` {value} must be a finite number above 0")
        exponent = self.radius_exponent
        good = exponent is None or (math.isfinite(exponent) and exponent >= 0)
        require(good, f"`radius_exponent` {exponent} must be a finite number, 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"`{name}` must be at least 0 and below 1")
        for name in ("ema_max_decay", "max_bad_fraction"):
            require(0 <= getattr(self, name) <= 1, f"`{name}` must be between 0 and 1")
        require(self.checkpoints_total_limit >= 1, "`checkpoints_total_limit` must be at least 1")
        require(self.preview_images >= 0, "`preview_images` must be 0 or more")
        require(0 <= self.seed <= MAX_SEED, f"`seed` must be in 0 .. {MAX_SEED}")
        require(not (self.overwrite and self.resuming), "`overwrite` and `resume` exclude each other: give one")
        self._validate_objective()
        self._validate_told()
        self._validate_evaluation()
        if self.init_from:
            fixed = ("network", "model_config_name_or_path", "prediction_type", "ddpm_num_steps", "ddpm_beta_schedule")
            for name in (*fixed, "rescale_betas_zero_snr"):
                given = getattr(self, name) not in (None, False)
                require(not given, f"`{name}` is fixed by `init_from`: leave it out")
        require(
            not (self.network and self.model_config_name_or_path),
            "`network` and `model_config_name_or_path` exclude each other: give one",
        )
        zero_snr_epsilon = self.rescale_betas_zero_snr and self.prediction_type in (None, "epsilon")
        require(
            not zero_snr_epsilon,
            "`rescale_betas_zero_snr` needs `prediction_type` v_prediction or sample: "
            "epsilon says nothing about the image at pure noise",
        )

    def _validate_evaluation(self) -> None:
        """Refuse flags of the evaluation that are wrong or would do nothing."""
        for name in ("evaluate_every", "evaluate_reference", "evaluate_split", "evaluate_extractor"):
            flag = f"`{name}`"
            require(getattr(self, name) != "", f"{flag} is empty: give a value, or leave the flag out")
        if self.evaluate_every is None:
            defaults = {"evaluate_extractor": "pixels", "evaluate_n": 500, "evaluate_metric": "fd"}
            names = ("evaluate_reference", "evaluate_split", *defaults)
            given = [name for name in names if getattr(self, name) != defaults.get(name)]
            require(not given, f"{listed(given)} needs `evaluate_every`: say after how many images, such as 50k")
            return
        parse_count(self.evaluate_every, "evaluate_every")
        missing = "`evaluate_every` needs `evaluate_reference`: name clean real images"
        require(self.evaluate_reference is not None, missing)
        n = self.evaluate_n
        require(n >= 14, f"`evaluate_n` {n} must be at least 14: neighbours are looked for in halves")

    def _validate_told(self) -> None:
        """Refuse knowledge of the images that nobody has, or nobody uses."""
        require(not self.clean_subset or bool(self.corrupt), "`clean_subset` needs `corrupt`: add it, or leave it out")
        require(self.auto or not self.auto_without, "`auto_without` needs `auto`: add it, or leave it out")
        try:
            check_parts(self.auto_without)
        except ValueError as error:
            raise UsageError(f"`auto_without` {error}") from None
        if self.auto:
            told = "`noise_levels`" if self.noise_levels is not None else "`clean_subset`" if self.clean_subset else ""
            require(not told, f"`auto` finds out what {told} says: give one")
            self._require_clean_optimum("auto")
        if self.noise_levels is None:
            return
        self._require_clean_optimum("noise_levels")
        if self.noise_levels == FROM_CORRUPT:
            flag, kinds = f"`noise_levels` {FROM_CORRUPT}", [c.kind for c in check_corruptions(self.corrupt)]
            require(bool(kinds), f"{flag} needs `corrupt` gaussian:sigma=...: add it, or name a file")
            other = next((kind for kind in kinds if kind != "gaussian"), None)
            message = f"{flag}: an image hit by {other} has no noise level: use `corrupt` gaussian only, or name a file"
            require(other is None, message)
            require(not self.clean_subset, f"{flag} does nothing with `clean_subset`: give one")

    def _require_clean_optimum(self, name: str) -> None:
        fits = LOSSES[self.objective].takes_noise_level
        require(fits, f"`{name}` has no clean optimum with `objective` {self.objective}: use another objective")

    def _validate_objective(self) -> None:
        """Refuse flags of the objective that would do nothing."""
        if self.gate is not None:
            parse_gate(self.gate)
        radius = ("radius_exponent", "radius_units", "radius_scale", "radius_floor", "radius_factor")
        regulariser = ("strength", "strength_beta", "normalise", "gate", "gradient", *radius)
        attack = ("attack_steps", "attack_step_size", "inner")
        given = [name for name in (*regulariser, *attack, "perturbation") if getattr(self, name) is not None]
        loss = LOSSES[self.objective]
        if not loss.regularised:
            given += [] if self.preset is None else ["preset"]
            require(not given, f"`objective` {self.objective} has no perturbation: leave out {listed(given)}")
        usual = {"paper-random": "random", "gated": "random", "plain": "none"}.get(self.start, "adversarial")
        perturbation = self.perturbation or usual
        if perturbation == "none" and loss.regularised:
            idle = [name for name in given if name != "perturbation"]
            require(not idle, f"without a perturbation {listed(idle)} would do nothing: add `perturbation` random")
            remedy = f"`objective` {self.objective} needs `perturbation` random or adversarial"
            require(not loss.shift_only, remedy)
        gated = self.gate is not None or self.start in ("gated", "fast")
        remedy = "`strength_beta` does not go with a gate: use `preset` paper-noise, and no `gate`"
        require(self.strength_beta is None or not gated, remedy)
        both = self.gate is not None and self.start == "paper-scaled"
        require(not both, "`gate` does not go with `preset` paper-scaled: use paper-noise")
        unmatched = loss.shift_only and self.inner == "residual"
        require(not unmatched, f"`inner` residual is not what `objective` {self.objective} penalises: use shift")
        powerless = self.start == "plain" and perturbation != "none" and self.strength is None
        what = "`preset` plain" if self.preset else "`auto`"
        require(not powerless, f"{what} has no strength for `perturbation` {perturbation}: add `strength`")
        if perturbation != "adversarial":
            idle = [name for name in attack if getattr(self, name) is not None]
            require(not idle, f"{listed(idle)} needs `perturbation` adversarial")

    @property
    def start(self) -> str:
        """The preset that the objective starts from."""
        return self.preset or ("plain" if self.auto else "gated")

    @property
    def resuming(self) -> bool:
        """Whether this run goes on from a checkpoint."""
        return self.resume or self.resume_from_checkpoint is not None
