"""Extractors: what turns 8-bit images into feature vectors. What is done to their size is told in ``resize``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import from_uint8

Kind = Literal["pixels", "torchscript", "inception", "transformers"]
TORCHSCRIPT = (".pt", ".pts", ".ts", ".torchscript")
"""How the names of TorchScript files end."""
INCEPTION = "6726825d"
"""First digits of the SHA-256 of TensorFlow's Inception-v3 weights of 2015-12-05: only these make an FID."""
INCEPTION_FILES = (f"pt_inception-2015-12-05-{INCEPTION}.pth", f"weights-inception-2015-12-05-{INCEPTION}.pth")
"""Their file as pytorch-fid and as torch-fidelity call it."""
GREY = "3; grey images are repeated"
AT_ONCE = 64
"""Images that a large network gets at a time: enlarged, they take a thousand times their memory."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """A map from images to feature vectors, and what a reader must know of it.

    Attributes:
        name: ``"pixels"``, ``"inception"``, or the name of the file or folder.
        kind: What it is.
        sha256: Of the file of its weights; None for pixels.
        model: uint8 (B, C, H, W) on ``device`` -> (B, d).
        resize: What happens to the size of the images, in words.
        settings: What else decides the features; JSON-ready. ``channels`` says what happens to grey images.
        device: Where ``model`` computes.
    """

    name: str
    kind: Kind
    sha256: str | None
    model: Callable[[Tensor], Tensor]
    resize: str
    settings: Mapping[str, Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def metric(self) -> str:
        """Name of the Frechet distance of these features: FID with the one Inception that it was defined by."""
        original = self.kind == "inception" and str(self.sha256).startswith(INCEPTION)
        return "FID" if original else f"FD-{self.name}"


# -- extractors --------------------------------------------------------------------------------------


def open_extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """What ``extractor`` names.

    Nothing is downloaded, and no pickle is read. A TorchScript file is a program, though: run only files you trust.

    Args:
        spec: One of

            * ``pixels``: ``v / 127.5 - 1``, flattened;
            * a TorchScript file (``.pt``, ``.pts``, ``.ts``, ``.torchscript``): uint8 (B, 3, H, W) -> (B, d);
            * ``inception``, or ``inception:WEIGHTS.pth``: Inception-v3 as torch-fidelity builds it, 2048 features;
              without a path, the weights are looked for where torch.hub keeps them;
            * a folder with ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``: a vision model of
              transformers. Images are resized whole, without a crop; features are the pooled output, or the mean over
              patches where the model has none or the file lacks its weights.
        device: Where to compute.

    Raises:
        UsageError: In one line, if there is no such extractor or it cannot be loaded.

    Source: Inception-v3 for FID: Heusel et al. (2017), weights converted by pytorch-fid, network by torch-fidelity.
    """
    where = _device(device)
    path = Path(spec).expanduser()
    if spec == "pixels":
        return Extractor("pixels", "pixels", None, _pixels, "none", {"scale": "v / 127.5 - 1"})
    if spec == "inception" or spec.startswith("inception:"):
        return _inception(spec, where)
    if path.suffix.lower() in TORCHSCRIPT and not path.is_dir():
        return _torchscript(spec, path, where)
    if path.is_dir():
        return _transformers(spec, path, where)
    raise UsageError(
        f"`extractor` {spec!r} is none of: pixels, inception, inception:WEIGHTS.pth, a TorchScript file "
        f"({', '.join(TORCHSCRIPT)}), the folder of a transformers model (`hf download ID --local-dir FOLDER`)"
    )


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device} cannot be used: {reason_of(error)}") from None


def _read(spec: str, path: Path) -> bytes:
    """A file's content, once: what is hashed is what is loaded."""
    try:
        return path.read_bytes()
    except OSError as error:
        reason = atomic_io.one_line(error)
        raise UsageError(f"`extractor` {spec}: cannot read {path}: {reason}; name the file of an extractor") from None


def reason_of(error: BaseException) -> str:
    """The line of an exception that says what happened: the last one, as TorchScript puts a traceback before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:200] if lines else type(error).__name__


def _pixels(images: Tensor) -> Tensor:
    return from_uint8(images).flatten(1)


def _three(images: Tensor) -> Tensor:
    return images if images.shape[1] == 3 else images.repeat(1, 3, 1, 1)


def _torchscript(spec: str, path: Path, device: torch.device) -> Extractor:
    content = _read(spec, path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # such files will be around for long
            network = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"`extractor` {spec} is no TorchScript file (torch.jit.save): {reason_of(error)}") from None
    network.eval()
    return Extractor(
        path.stem,
        "torchscript",
        hashlib.sha256(content).hexdigest(),
        lambda images: network(_three(images)),
        "inside the file",
        {"channels": GREY},
        device,
    )


def _inception(spec: str, device: torch.device) -> Extractor:
    asked = spec.partition(":")[2]
    places = [Path(torch.hub.get_dir()) / "checkpoints" / name for name in INCEPTION_FILES]
    path = Path(asked).expanduser() if asked else next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        raise UsageError(
            f"`extractor` {spec} needs the weights {INCEPTION_FILES[0]} (sha256 {INCEPTION}...) and finds no {path}: "
            "get them from the releases of github.com/mseitzer/pytorch-fid or github.com/toshas/torch-fidelity "
            f"({INCEPTION_FILES[1]}), and give `extractor` inception:PATH"
        )
    content = _read(spec, path)
    digest = hashlib.sha256(content).hexdigest()
    if path.name in INCEPTION_FILES and not digest.startswith(INCEPTION):
        raise UsageError(f"`extractor` {spec}: {path} is damaged (sha256 {digest[:8]}...): fetch it again")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise UsageError(f"`extractor` {spec}: {path} holds no weights: {reason_of(error)}") from None
    try:
        library = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        raise UsageError(
            f"`extractor` {spec} needs torch-fidelity, and the torchvision that belongs to torch {torch.__version__}: "
            f"`pip install torch-fidelity torchvision` ({reason_of(error)})"
        ) from None
    # torch-fidelity unpickles whatever file it is given, or downloads one: it gets what has passed weights_only.
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    try:
        network = library.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=checked)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = atomic_io.one_line(error)
        raise UsageError(
            f"`extractor` {spec}: {path} is not the weights of torch-fidelity's Inception-v3: {reason}"
        ) from None
    network = network.to(device).eval()
    return Extractor(
        "inception" if digest.startswith(INCEPTION) else f"inception-{path.stem}",
        "inception",
        digest,
        _in_parts(lambda images: network(images)[0]),
        "bilinear to 299 x 299 as TensorFlow 1 did it (torch-fidelity)",
        {"channels": GREY, "layer": "2048"},
        device,
    )


def _in_parts(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.cat([network(_three(part)) for part in torch.split(images, AT_ONCE)])


# -- transformers ------------------------------------------------------------------------------------


def _transformers(spec: str, folder: Path, device: torch.device) -> Extractor:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UsageError(f"`extractor` {spec}: a folder must hold a transformers model, and this has no {name}")
    settings = _preprocessing(spec, folder / "preprocessor_config.json")
    try:
        library = importlib.import_module("transformers")
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f'`extractor` {spec} needs transformers: `pip install "robustdiff[vision]"` ({reason_of(error)})'
        ) from None
    try:
        with _silent(importlib.import_module("transformers.utils.logging")):
            loaded, about = library.AutoModel.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # as many kinds as there are architectures
        raise UsageError(f"`extractor` {spec} cannot be loaded: {atomic_io.one_line(error)}") from None
    # Missing weights are drawn at random: a classifier's file has no pooler; anything else missing is a broken file.
    missing = sorted(about["missing_keys"])
    if strange := [key for key in missing if "pooler" not in key]:
        raise UsageError(f"`extractor` {spec}: model.safetensors lacks {len(strange)} weights, such as {strange[0]}")
    network = getattr(loaded, "vision_model", loaded).float().to(device).eval()  # of CLIP and its like, half
    height, width = settings["size"]
    mean, std = (torch.tensor(settings[key], device=device).reshape(1, 3, 1, 1) for key in ("mean", "std"))

    def run(images: Tensor) -> Any:  # noqa: ANN401 - a class of the library's
        x = nn.functional.interpolate(
            images.float(), (height, width), mode="bicubic", align_corners=False, antialias=True
        )
        return network(pixel_values=(x.clamp_(0, 255) * settings["rescale"] - mean) / std)

    try:
        with torch.no_grad():
            probe = run(torch.zeros(1, 3, height, width, dtype=torch.uint8, device=device))
        tokens = probe.last_hidden_state
    except Exception as error:  # it may want text, or sound
        raise UsageError(f"`extractor` {spec} gives no features of images: {reason_of(error)}") from None
    pooled = not missing and getattr(probe, "pooler_output", None) is not None
    patches = _patches(network, height, width)
    skip = max(0, tokens.shape[1] - patches) if patches and tokens.ndim == 3 else 0

    def features(images: Tensor) -> Tensor:
        output = run(images)
        if pooled:
            return output.pooler_output.flatten(1)  # type: ignore[no-any-return]
        places: Tensor = output.last_hidden_state  # (B, tokens, d) or (B, d, H, W)
        return places[:, skip:].mean(1) if places.ndim == 3 else places.flatten(2).mean(2)

    return Extractor(
        folder.resolve().name,
        "transformers",
        atomic_io.sha256(folder / "model.safetensors"),
        _in_parts(features),
        f"bicubic, antialiased, to {height} x {width}, without a crop",
        {
            "channels": GREY,
            "architecture": type(network).__name__,
            "config_sha256": atomic_io.sha256(folder / "config.json"),
            "pooling": "pooler_output" if pooled else f"mean of last_hidden_state without the first {skip} tokens",
            **settings,
        },
        device,
    )


def _patches(network: nn.Module, height: int, width: int) -> int:
    """How many of the tokens are patches (the last ones; class and register tokens come first); 0 if unknown."""
    side = getattr(getattr(network, "config", None), "patch_size", 0)
    return (height // side) * (width // side) if isinstance(side, int) and side > 0 else 0


def _preprocessing(spec: str, path: Path) -> dict[str, Any]:
    """Size, mean, standard deviation and scale that the model was trained with."""
    try:
        found = atomic_io.read_json(path)
        size: Any = found.get("crop_size" if found.get("do_center_crop") else "size", found.get("size"))
        if isinstance(size, dict):
            size = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
        height, width = [size, size] if isinstance(size, int) else size
        plain = not found.get("do_normalize", True)
        mean, std = ([0] * 3, [1] * 3) if plain else (found["image_mean"], found["image_std"])
        mean, std = [float(value) for value in mean], [float(value) for value in std]
        scale = float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0
        good = min(int(height), int(width)) > 0 and len(mean) == len(std) == 3 and min(std) > 0 and scale > 0
        if not (good and all(map(math.isfinite, [*mean, *std, scale]))):
            raise ValueError(f"size {size}, mean {mean}, std {std}, scale {scale}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else atomic_io.one_line(error)
        raise UsageError(f"`extractor` {spec}: cannot use {path.name}: {reason}") from None
    return {"size": [int(height), int(width)], "mean": mean, "std": std, "rescale": scale}


@contextlib.contextmanager
def _silent(logging: Any) -> Iterator[None]:  # noqa: ANN401
    """No tables and bars of transformers in a command's output: what matters of them is checked and told."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


# -- as functions of images that are no 8-bit numbers, so that gradients flow through them ----------------------

CLOSE = 1e-2
"""Largest relative difference from the features of the same images in 8 bit."""
SCALES = (127.5, 0.5)
"""Of ``x + 1``, x in [-1, 1]: what extractors take floats for, 0 to 255 or 0 to 1."""


def differentiable(extractor: Extractor, probe: Tensor) -> Callable[[Tensor], Tensor]:
    """The extractor on images in [-1, 1], shape (B, C, H, W), floating point.

    Which scale it takes floats in is found out: its features must be those of the same images in 8 bit.

    Args:
        extractor: What :func:`~robustdiff.evaluation.extractors.open_extractor` gave.
        probe: A few real images to find out with, uint8 (b, C, H, W), not all alike.

    Raises:
        UsageError: If neither scale gives these features, or no gradient comes through.
    """
    probe = probe.to(extractor.device)
    with torch.no_grad():
        expected = extractor.model(probe).float()
    reasons = []
    for scale in SCALES:

        def run(images: Tensor, scale: float = scale) -> Tensor:
            return extractor.model((images + 1) * scale)

        try:
            with torch.enable_grad():
                images = from_uint8(probe).requires_grad_()
                found = run(images)
                if not found.requires_grad:
                    raise ValueError("no gradient comes through")
                (slope,) = torch.autograd.grad(found.square().sum(), images)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # as many as there are extractors
            reasons.append(reason_of(error))
            continue
        if not (found.detach() - expected).norm() <= CLOSE * expected.norm():
            reasons.append("other features than of the same images in 8 bit")
        elif not (bool(slope.isfinite().all()) and bool(slope.any())):
            reasons.append("the gradient is 0 or not finite")
        else:
            return run
    told = "; ".join(f"in 0 to {2 * scale:g}: {why}" for scale, why in zip(SCALES, reasons, strict=True))
    raise UsageError(
        f"`extractor` {extractor.name} is not differentiable ({told}): name pixels first, or a module that is"
    )
