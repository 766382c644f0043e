"""Extractors and the cache of their features.

Long, because it mirrors extractors.py and features.py: one section per kind of extractor, then images and the cache.
"""

import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import seeded
from robustdiff.data.dataset import load_images
from robustdiff.evaluation import extractors, features
from robustdiff.evaluation.features import (
    default_cache,
    extract,
    images_sha256,
    open_extractor,
)
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError
from robustdiff.utils.images import save_png

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def images(count=7, channels=3, height=8, width=6, seed=0):
    return torch.randint(0, 256, (count, channels, height, width), generator=seeded(seed), dtype=torch.uint8)


class Net(nn.Module):
    """Means over places of a convolution; ``wrong`` chooses a fault."""

    def __init__(self, wrong: str = ""):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.wrong = wrong

    def forward(self, x):
        out = self.norm(self.conv(x.float() / 255)).mean((2, 3))
        if self.wrong == "shape":
            return out[:, :, None]
        elif self.wrong == "rows":
            return out[:-1]
        elif self.wrong == "nan":
            return out / (x[:, :1, 0, 0] != 3)
        elif self.wrong == "labels":
            return out.long()
        elif self.wrong == "dropout":
            return nn.functional.dropout(out, 0.5, True)
        elif self.wrong == "batch":
            return nn.functional.batch_norm(out, None, None, training=True)
        elif self.wrong == "raises":
            assert x.shape[2] == 99, "only 99 pixels"
            return out
        else:
            return out


def script(path, module=None):
    torch.jit.script(module or Net()).save(path)
    return path


@pytest.fixture
def net(tmp_path):
    return script(tmp_path / "tiny_net.pt")


def refused(*words, spec, device="cpu"):
    """Opening must fail in one line that holds all the words."""
    with pytest.raises(UsageError) as caught:
        open_extractor(str(spec), device)
    return one_line(caught.value, *words)


def one_line(error, *words):
    message = str(error)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message
    return message


# -- pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_image_in_minus_one_to_one(channels, tmp_path):
    given = images(5, channels)
    extractor = open_extractor("pixels")
    got = extract(extractor, given, batch_size=2, cache=tmp_path / "cache")
    expected = (given.double() / 127.5 - 1).reshape(5, -1)
    torch.testing.assert_close(got.values.double(), expected, rtol=0, atol=1e-7)
    assert (got.values.dtype, got.values.shape, got.cached) == (torch.float32, (5, channels * 48), False)
    assert (extractor.kind, extractor.sha256, extractor.resize, extractor.metric) == (
        "pixels",
        None,
        "none",
        "FD-pixels",
    )
    assert not (tmp_path / "cache").exists()


# -- TorchScript -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_torchscript_file_gives_what_its_module_gives(net, batch_size):
    extractor = open_extractor(str(net))
    got = extract(extractor, images(), batch_size=batch_size, cache=None)
    torch.testing.assert_close(got.values, Net().eval()(images()).detach())
    assert not got.values.requires_grad
    assert (extractor.name, extractor.kind, extractor.metric) == ("tiny_net", "torchscript", "FD-tiny_net")
    assert extractor.sha256 == atomic_io.sha256(net)
    json.dumps(dict(extractor.settings))


def test_other_suffixes_and_frozen_modules(tmp_path):
    frozen = tmp_path / "a.TorchScript"
    torch.jit.freeze(torch.jit.script(Net().eval())).save(frozen)
    for path in (frozen, script(tmp_path / "b.pts"), script(tmp_path / "c.ts")):
        got = extract(open_extractor(str(path)), images(), cache=None)
        torch.testing.assert_close(got.values, Net().eval()(images()).detach())


def test_grey_images_are_repeated(net):
    extractor = open_extractor(str(net))
    grey = images(channels=1)
    got = extract(extractor, grey, cache=None).values
    assert torch.equal(got, extract(extractor, grey.repeat(1, 3, 1, 1), cache=None).values)
    assert "grey images are repeated" in extractor.settings["channels"]


def test_features_are_float32_under_autocast(net):
    extractor = open_extractor(str(net))
    plain = extract(extractor, images(), cache=None).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extract(extractor, images(), cache=None).values, plain)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("shape", ("(7, 5, 1)", "(7, d)")),
        ("rows", ("(6, 5)", "7 images")),
        ("nan", ("not finite", "image 4 ")),
        ("labels", ("int64", "floating point")),
        ("dropout", ("evaluation mode", "random")),
        ("batch", ("evaluation mode",)),
        ("raises", ("only 99 pixels", "(7, 3, 8, 6)")),
    ],
)
def test_wrong_outputs_are_one_line(tmp_path, wrong, words):
    given = images().clamp(min=4)
    given[4, 0, 0, 0] = 3
    extractor = open_extractor(str(script(tmp_path / "odd.pt", Net(wrong))))
    with pytest.raises(UsageError) as caught:
        extract(extractor, given, cache=tmp_path / "cache")
    one_line(caught.value, "`extractor` odd", *words)
    assert not (tmp_path / "cache").exists()


def test_the_image_that_is_not_finite_is_counted_over_all_batches(tmp_path):
    given = images().clamp(min=4)
    given[4, 0, 0, 0] = 3
    extractor = open_extractor(str(script(tmp_path / "odd.pt", Net("nan"))))
    with pytest.raises(UsageError, match="image 4 "):
        extract(extractor, given, batch_size=3, cache=None)


def python_extractor(model, name="odd"):
    return extractors.Extractor(name, "torchscript", "0", model, "", {})


@pytest.mark.parametrize("where", ["at once", "later"])
def test_a_width_that_changes_is_refused(where):
    calls = []

    def model(batch):
        calls.append(len(batch))
        return torch.ones(len(batch), 5 if len(calls) <= (1 if where == "at once" else 2) else 4)

    with pytest.raises(
        UsageError, match="same images in another batch" if where == "at once" else "4 features after 5"
    ):
        extract(python_extractor(model), images(6), batch_size=3, cache=None)


def test_one_tensor_is_wanted():
    with pytest.raises(UsageError, match="not tuple"):
        extract(python_extractor(lambda batch: (batch.float().flatten(1),)), images(), cache=None)


def test_memory_that_runs_out_is_one_line_with_the_remedy(monkeypatch):
    def model(batch):
        raise RuntimeError("CUDA out of memory. Tried to allocate\n2 GiB")

    with pytest.raises(UsageError, match="`batch_size`"):
        extract(python_extractor(model), images(), cache=None)
    monkeypatch.setattr(features, "free_memory", lambda: 7 * 144 * 4 - 1)
    with pytest.raises(UsageError, match=r"7 x 144 features take .* free"):
        extract(open_extractor("pixels"), images(), cache=None)
    monkeypatch.setattr(features, "free_memory", lambda: 7 * 144 * 4)
    assert extract(open_extractor("pixels"), images(), cache=None).values.shape == (7, 144)


def test_files_that_are_no_torchscript_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "state.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    whole = script(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("state.pt", "junk.pt", "half.pt"):
        refused("`extractor`", name, "no TorchScript file", spec=tmp_path / name)
    refused("`extractor`", "none.pt", "No such file", spec=tmp_path / "none.pt")


REAL = os.environ.get("ROBUSTDIFF_EXTRACTORS", "")


@pytest.mark.skipif(not REAL, reason="$ROBUSTDIFF_EXTRACTORS names no folder of TorchScript extractors")
def test_real_extractors():
    paths = sorted(Path(REAL).glob("*.pt"))
    assert paths
    given = images(6, height=32, width=32)
    for path in paths:
        extractor = open_extractor(str(path))
        got = extract(extractor, given, batch_size=4, cache=None).values
        with torch.no_grad():
            torch.testing.assert_close(got, torch.jit.load(path).eval()(given), rtol=1e-4, atol=1e-4)
        assert got.std(0).max() > 0
        assert extract(extractor, given[:, :1], cache=None).values.shape == got.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_features(net):
    expected = extract(open_extractor(str(net)), images(), cache=None).values
    got = extract(open_extractor(str(net), "cuda"), images(), cache=None).values
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_no_tf32_on_cuda_and_the_settings_come_back():
    new = hasattr(torch.backends.cudnn, "conv")  # torch 2.9
    name, off = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    owners = torch.backends.cudnn.conv if new else torch.backends.cudnn, torch.backends.cuda.matmul
    before = [getattr(owner, name) for owner in owners]
    with contextlib.suppress(KeyError), features._full_precision(torch.device("cuda")):
        during = [getattr(owner, name) for owner in owners]
        raise KeyError
    assert during == [off, off]
    assert [getattr(owner, name) for owner in owners] == before != during


# -- flags -------------------------------------------------------------------------------------------


def test_what_no_extractor_is_called_is_one_line(tmp_path):
    refused("`extractor` 'dinov2'", "pixels", "inception", ".torchscript", "hf download", spec="dinov2")
    refused("config.json", spec=tmp_path)
    refused("device", "nonsense", spec="pixels", device="nonsense")
    if not torch.cuda.is_available():
        refused("device cuda", spec="pixels", device="cuda")


def test_bad_images_and_batch_sizes_are_refused():
    pixels = open_extractor("pixels")
    with pytest.raises(UsageError, match="`batch_size` must be at least 1, got 0"):
        extract(pixels, images(), batch_size=0, cache=None)
    for wrong, words in [
        (images().float(), "uint8"),
        (images()[0], "shape"),
        (images(channels=2), "C = 1 or 3"),
        (images(0), "N >= 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            extract(pixels, wrong, cache=None)


# -- Inception ---------------------------------------------------------------------------------------


def test_missing_inception_weights_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    words = (
        "pt_inception-2015-12-05-6726825d.pth",
        "sha256 6726825d",
        "pytorch-fid",
        "torch-fidelity",
        "inception:PATH",
    )
    refused(str(tmp_path / "checkpoints"), *words, spec="inception")
    refused(str(tmp_path / "other.pth"), *words, spec=f"inception:{tmp_path / 'other.pth'}")


@pytest.mark.parametrize("name", extractors.INCEPTION_FILES)
def test_inception_weights_of_the_hub_are_found_and_a_damaged_download_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "checkpoints" / name)
    refused(name, "damaged", "fetch it again", spec="inception")


class Trap:
    """Makes a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_run_from_a_weights_file(tmp_path):
    touched = tmp_path / "touched"
    for name, write in (
        ("zip.pth", torch.save),
        ("old.pth", lambda value, path: path.write_bytes(pickle.dumps(value, 2))),
    ):
        write({"fc.weight": Trap(touched)}, tmp_path / name)
        refused(name, "holds no weights", spec=f"inception:{tmp_path / name}")
    assert not touched.exists()


def test_without_a_working_torch_fidelity_the_remedy_is_told(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "mine.pth")
    for error in (
        ImportError("No module named 'torchvision'"),
        RuntimeError("operator torchvision::nms does not exist"),
    ):

        def broken(name, error=error):
            raise error

        monkeypatch.setattr(extractors.importlib, "import_module", broken)
        refused("pip install torch-fidelity torchvision", str(error), spec=f"inception:{tmp_path / 'mine.pth'}")


def test_inception_is_torch_fidelitys_with_the_given_weights(tmp_path, monkeypatch):
    try:
        library = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    with monkeypatch.context() as patch, torch.random.fork_rng([]):  # it cannot be built without weights
        torch.manual_seed(0)
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        reference = library.FeatureExtractorInceptionV3("any", ["2048"])
    weights = tmp_path / "mine.pth"
    torch.save(OrderedDict(reference.state_dict()), weights)
    extractor = open_extractor(f"inception:{weights}")
    assert (extractor.name, extractor.metric, extractor.kind) == ("inception-mine", "FD-inception-mine", "inception")
    assert extractor.sha256 == atomic_io.sha256(weights)
    given = images(3, height=20, width=24)
    got = extract(extractor, given, cache=None).values
    with torch.no_grad():
        torch.testing.assert_close(got, reference(given)[0], rtol=1e-4, atol=1e-5)
    assert got.shape == (3, 2048)
    assert extract(extractor, given[:1, :1], cache=None).values.shape == (1, 2048)
    torch.save({"a": torch.ones(2)}, weights)
    refused("mine.pth", "not the weights of torch-fidelity's Inception-v3", spec=f"inception:{weights}")
    monkeypatch.setattr(extractors, "INCEPTION", atomic_io.sha256(weights)[:8])
    torch.save(reference.state_dict(), weights)
    monkeypatch.setattr(extractors, "INCEPTION", atomic_io.sha256(weights)[:8])
    original = open_extractor(f"inception:{weights}")
    assert (original.name, original.metric) == ("inception", "FID")


def test_only_the_original_inception_weights_make_an_fid():
    def metric(kind, sha256):
        return extractors.Extractor("some", kind, sha256, lambda x: x, "", {}).metric

    assert metric("inception", "6726825d" + 56 * "0") == "FID"
    assert metric("inception", "6726825e" + 56 * "0") == "FD-some"
    assert metric("torchscript", "6726825d" + 56 * "0") == "FD-some"


# -- transformers ------------------------------------------------------------------------------------

PREPROCESSOR = {
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 32},
}


def model_folder(path, **changes):
    """What looks like a transformers model from outside."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    (path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **changes}))
    return path


def test_a_folder_that_holds_no_model_is_one_line(tmp_path):
    folder = model_folder(tmp_path / "model")
    for name in ("preprocessor_config.json", "model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"never read")
        refused("`extractor`", f"no {name}", spec=folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_mean": [0.5]}, "mean"),
        ({"image_mean": None}, "NoneType"),
        ({"image_std": [1, 0, 1]}, "std"),
        ({"crop_size": {"height": 0, "width": 28}}, "size"),
        ({"crop_size": "large"}, ""),
        ({"rescale_factor": "x"}, "'x'"),
        ({"size": None, "crop_size": None}, ""),
    ],
)
def test_unusable_preprocessing_is_one_line(tmp_path, changes, words):
    spec = model_folder(tmp_path / "model", **changes)
    refused("`extractor`", "preprocessor_config.json", words, spec=spec)
    (spec / "preprocessor_config.json").write_text("{")
    refused("`extractor`", "preprocessor_config.json", spec=spec)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"size": [28, 28], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "rescale": 1 / 255}),
        ({"do_center_crop": False}, {"size": [32, 32]}),
        ({"do_center_crop": False, "size": {"height": 30, "width": 40}}, {"size": [30, 40]}),
        ({"crop_size": 24}, {"size": [24, 24]}),
        ({"do_normalize": False, "image_mean": None}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        ({"do_rescale": False}, {"rescale": 1.0}),
    ],
)
def test_preprocessing_is_read_as_the_model_was_trained(tmp_path, changes, expected):
    folder = model_folder(tmp_path / "model", **changes)
    settings = extractors._preprocessing("spec", folder / "preprocessor_config.json")
    assert {name: settings[name] for name in expected} == expected


def test_without_transformers_the_remedy_is_told(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(extractors.importlib, "import_module", missing)
    refused('pip install "robustdiff[vision]"', "transformers", spec=model_folder(tmp_path / "model"))


def tiny(library, name, folder, half=False):
    """A random vision model of a few thousand weights, saved, and its reference in float32."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    texts = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
        "intermediate_size": 8,
    }
    texts.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    makers = {
        "vit": lambda: library.ViTModel(library.ViTConfig(intermediate_size=32, **shape)),
        "classifier": lambda: library.ViTForImageClassification(library.ViTConfig(intermediate_size=32, **shape)),
        "dinov2": lambda: library.Dinov2Model(library.Dinov2Config(mlp_ratio=2, **shape)),
        "clip": lambda: library.CLIPModel(
            library.CLIPConfig(text_config=texts, vision_config={"intermediate_size": 32, **shape}, projection_dim=8)
        ),
        "resnet": lambda: library.ResNetModel(
            library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "mae": lambda: library.ViTMAEModel(
            library.ViTMAEConfig(intermediate_size=32, decoder_num_attention_heads=2, decoder_hidden_size=16, **shape)
        ),
        "bert": lambda: library.BertModel(
            library.BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
            )
        ),
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = makers[name]().eval()
    model = model.half() if half else model
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return model.float()


def prepared(given):
    """By Pillow, as the model's own image processor does it, but for the crop and the rounding to 8 bit."""
    planes = [Image.fromarray(plane.numpy()) for plane in given.flatten(0, 1).float()]
    resized = np.stack([np.asarray(plane.resize((28, 28), Image.Resampling.BICUBIC)) for plane in planes])
    x = torch.from_numpy(resized).reshape(len(given), 3, 28, 28).clamp(0, 255) / 255
    mean, std = (torch.tensor(PREPROCESSOR[f"image_{name}"]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("vit", "pooler_output"),
        ("dinov2", "pooler_output"),
        ("clip", "pooler_output"),
        ("resnet", "pooler_output"),
        ("classifier", "mean of last_hidden_state without the first 1 tokens"),
    ],
)
def test_a_transformers_model_gives_what_it_gives(tmp_path, name, pooling, capfd):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    library.utils.logging.set_verbosity_warning()
    model = tiny(library, name, tmp_path / "my-model", half=name == "dinov2")
    capfd.readouterr()
    extractor = open_extractor(str(tmp_path / "my-model"))
    assert capfd.readouterr() == ("", "")
    assert library.utils.logging.get_verbosity() == library.utils.logging.WARNING
    given = images(70, height=40, width=33)
    got = extract(extractor, given, batch_size=70, cache=None).values
    with torch.no_grad():
        if name == "classifier":  # its file has no pooler: transformers would draw one at random
            expected = model.vit(pixel_values=prepared(given)).last_hidden_state[:, 1:].mean(1)
        else:
            expected = getattr(model, "vision_model", model)(pixel_values=prepared(given)).pooler_output.flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (extractor.name, extractor.kind, extractor.metric) == ("my-model", "transformers", "FD-my-model")
    assert extractor.settings["pooling"] == pooling
    assert extractor.sha256 == atomic_io.sha256(tmp_path / "my-model" / "model.safetensors")
    assert "28 x 28" in extractor.resize
    json.dumps(dict(extractor.settings))


def test_transformers_models_that_will_not_do_are_one_line(tmp_path):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    tiny(library, "mae", tmp_path / "mae")  # hides patches at random
    with pytest.raises(UsageError) as caught:
        extract(open_extractor(str(tmp_path / "mae")), images(), cache=None)
    one_line(caught.value, "`extractor` mae", "random")
    tiny(library, "bert", tmp_path / "bert")
    refused("bert", "no features of images", spec=tmp_path / "bert")
    tiny(library, "vit", tmp_path / "vit")
    weights = tmp_path / "vit" / "model.safetensors"
    whole = load_file(weights)
    save_file({key: value for key, value in whole.items() if "embeddings.cls" not in key}, weights, {"format": "pt"})
    refused("vit", "lacks 1 weights", "cls_token", spec=tmp_path / "vit")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("vit", "cannot be loaded", spec=tmp_path / "vit")
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}}')
    (tmp_path / "vit" / "mine.py").write_text("raise SystemExit('ran')")
    refused("vit", "cannot be loaded", spec=tmp_path / "vit")


# -- sets of images ----------------------------------------------------------------------------------


class Sliced:
    """Images that are cut only, and remember the largest cut."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.largest, self.reads = tensor, tensor.shape, 0, 0

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.reads += 1
        self.largest = max(self.largest, len(self.tensor[rows]))
        return self.tensor[rows]


def test_streamed_sets_are_held_a_batch_at_a_time(net, tmp_path):
    given = Sliced(images(11))
    extractor = open_extractor(str(net))
    expected = extract(extractor, given.tensor, batch_size=3, cache=None)
    got = extract(extractor, given, batch_size=3, cache=None)
    assert torch.equal(got.values, expected.values)
    assert got.images_sha256 == expected.images_sha256
    assert given.largest == 3


def test_image_sets_in_memory_and_streamed_are_the_same_images(net, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    given = images(5)
    for place, image in enumerate(given):
        save_png(image, folder / f"{place}.png")
    extractor, cache = open_extractor(str(net)), tmp_path / "cache"
    streamed = load_images(folder, max_memory=0)
    assert streamed.streamed
    first = extract(extractor, streamed, batch_size=2, cache=cache)
    assert not first.cached
    for other in (given, load_images(folder), streamed.images, load_images(folder).images):
        again = extract(extractor, other, batch_size=3, cache=cache)
        assert again.cached
        assert again.images_sha256 == first.images_sha256 == images_sha256(other)
        assert torch.equal(again.values, first.values)
    for path in folder.iterdir():
        path.unlink()
    assert extract(extractor, streamed, cache=cache).cached  # neither hashing nor the cache decodes anything


def test_the_digest_sees_pixels_order_and_shape():
    given = images(6)
    changed = given.clone()
    changed[5, 2, 7, 5] ^= 1
    others = [changed, given.flip(0), given.reshape(6, 3, 6, 8), given[:5], given.reshape(18, 1, 8, 6)]
    digests = {images_sha256(other, 4) for other in (given, *others)}
    assert len(digests) == 6
    assert images_sha256(given, 1) == images_sha256(given, 100) == images_sha256(given.mT.contiguous().mT)


def test_progress_adds_up(net, tmp_path):
    extractor, cache = open_extractor(str(net)), tmp_path / "cache"
    for expected in ([3, 3, 1], [7]):  # the second time from the cache
        seen = []
        extract(extractor, images(), batch_size=3, cache=cache, progress=seen.append)
        assert seen == expected


# -- the cache ---------------------------------------------------------------------------------------


def fill(net, cache, given=None):
    """Features computed into an empty cache, and the one file there."""
    first = extract(open_extractor(str(net)), images() if given is None else given, cache=cache)
    (path,) = cache.iterdir()
    assert not first.cached
    return first, path


def test_the_second_time_nothing_is_computed(net, tmp_path):
    first, path = fill(net, tmp_path / "a" / "cache")
    extractor = open_extractor(str(net))
    lazy = extractors.Extractor(extractor.name, "torchscript", extractor.sha256, None, "", extractor.settings)
    again = extract(lazy, images(), batch_size=2, cache=path.parent)
    assert again.cached
    assert torch.equal(again.values, first.values)
    assert again.values.dtype == torch.float32
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["shape"] == "7 5"


def test_the_cache_goes_by_content_not_by_name(net, tmp_path):
    cache = tmp_path / "cache"
    fill(net, cache)
    renamed = tmp_path / "renamed.ts"
    net.rename(renamed)
    assert extract(open_extractor(str(renamed)), images(), cache=cache).cached
    other = Net()
    with torch.no_grad():
        other.conv.bias[0] += 1
    script(net, other)  # the first one's name
    got = extract(open_extractor(str(net)), images(), cache=cache)
    assert not got.cached
    torch.testing.assert_close(got.values, other.eval()(images()).detach())
    assert not extract(open_extractor(str(net)), images(seed=1), cache=cache).cached


@pytest.mark.parametrize("what", ["kind", "settings", "sha256", "FORMAT"])
def test_each_part_of_the_key_counts(tmp_path, monkeypatch, what):
    def model(batch):
        return batch.float().flatten(1)

    given = {"name": "a", "kind": "torchscript", "sha256": "0", "model": model, "resize": "", "settings": {"size": 1}}
    extract(extractors.Extractor(**given), images(), cache=tmp_path)
    assert extract(extractors.Extractor(**{**given, "name": "b"}), images(), cache=tmp_path).cached
    if what == "FORMAT":
        monkeypatch.setattr(features, "FORMAT", "robustdiff features 2")
    else:
        given[what] = {"kind": "transformers", "settings": {"size": 2}, "sha256": "1"}[what]
    assert not extract(extractors.Extractor(**given), images(), cache=tmp_path).cached


def flip_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:5],
        lambda content: b"",
        flip_last_byte,
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b'features"', b'featured"', 1),
        lambda content: content.replace(b"F32", b"I32", 1),
    ],
    ids=["truncated", "half", "five bytes", "empty", "one bit", "header", "name", "type"],
)
def test_damaged_features_are_told_computed_again_and_replaced(net, tmp_path, damage):
    cache = tmp_path / "cache"
    first, path = fill(net, cache)
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.warns(RobustdiffWarning, match="damaged") as told:
        got = extract(open_extractor(str(net)), images(), cache=cache)
    assert len(told) == 1
    assert str(path) in one_line(told[0].message)
    assert not got.cached
    assert torch.equal(got.values, first.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustdiffWarning)
        assert extract(open_extractor(str(net)), images(), cache=cache).cached


def test_whole_features_of_something_else_under_this_name_are_not_trusted(net, tmp_path):
    first, path = fill(net, tmp_path / "cache")
    other, other_path = fill(net, tmp_path / "other", images(seed=1))
    other_path.replace(path)
    with pytest.warns(RobustdiffWarning, match="not what the header says"):
        got = extract(open_extractor(str(net)), images(), cache=path.parent)
    assert torch.equal(got.values, first.values)
    assert not torch.equal(other.values, first.values)


def test_a_cache_that_cannot_be_used_is_told_and_done_without(net, tmp_path):
    (tmp_path / "file").write_text("no folder")
    expected = extract(open_extractor(str(net)), images(), cache=None).values
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.warns(RobustdiffWarning, match="not cached") as told:
            got = extract(open_extractor(str(net)), images(), cache=cache)
        assert len(told) == 1
        one_line(told[0].message, str(cache), "`cache`")
        assert torch.equal(got.values, expected)
    assert (tmp_path / "file").read_text() == "no folder"


AS_NOBODY = """
import os, sys, warnings
from pathlib import Path
import torch
from robustdiff.evaluation.features import extract
from robustdiff.evaluation.extractors import Extractor
cache = Path(sys.argv[1])
torch.set_num_threads(1)
if os.geteuid() == 0:
    os.seteuid(65534)
warnings.simplefilter("always")
net = Extractor("a", "torchscript", "0", lambda batch: batch.float().flatten(1), "", {})
print(extract(net, torch.ones(2, 3, 2, 2, dtype=torch.uint8), cache=cache).values.sum().item())
"""


@pytest.mark.skipif(os.name == "nt", reason="folders have no mode there")
def test_a_read_only_cache_is_told_and_done_without():
    with tempfile.TemporaryDirectory() as cache:  # not below tmp_path, which is closed to others
        os.chmod(cache, 0o555)
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, cache], capture_output=True, text=True, timeout=120)
        assert not os.listdir(cache)
        os.chmod(cache, 0o755)
    assert (done.returncode, done.stdout) == (0, "24.0\n"), done.stderr
    assert "RobustdiffWarning: features are not cached" in done.stderr
    assert done.stderr.count("RobustdiffWarning:") == 1


def test_a_full_disk_leaves_nothing_behind(net, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for where, name in ((features, "save_file"), (atomic_io, "fsync_file"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            with pytest.warns(RobustdiffWarning, match="No space left on device"):
                assert not extract(open_extractor(str(net)), images(), cache=tmp_path / "cache").cached
        assert not list((tmp_path / "cache").iterdir())


def test_a_kill_while_writing_leaves_no_features_that_are_not_whole(net, tmp_path, monkeypatch):
    def killed(_, path, __):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(open_extractor(str(net)), images(), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustdiffWarning)
        assert not extract(open_extractor(str(net)), images(), cache=tmp_path / "cache").cached


def test_what_killed_processes_left_is_removed_after_a_day(net, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in ((".old.tmp", features.STALE + 60), (".new.tmp", 0)):
        (cache / name).touch()
        os.utime(cache / name, (features.time.time() - age,) * 2)
    extract(open_extractor(str(net)), images(), cache=cache)
    assert sorted(path.name for path in cache.glob(".*")) == [".new.tmp"]


RACE = """
import sys, time, warnings
from pathlib import Path
import torch
from robustdiff.evaluation.extractors import Extractor
from robustdiff.evaluation.features import extract
torch.set_num_threads(1)
warnings.simplefilter("error")
cache, start = Path(sys.argv[1]), Path(sys.argv[2])
net = Extractor("a", "torchscript", "0", lambda batch: batch.float().flatten(1), "", {})
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
for seed in range(30):
    given = torch.full((400, 3, 16, 16), seed, dtype=torch.uint8)
    assert extract(net, given, cache=cache).values.eq(seed).all()
"""


@pytest.mark.slow
def test_two_processes_may_write_the_same_features_at_once(tmp_path):
    cache, start = tmp_path / "cache", tmp_path / "start"
    command = [sys.executable, "-c", RACE, cache, start]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    start.touch()
    for process in both:
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
    assert len(list(cache.glob("*.safetensors"))) == 30
    assert not list(cache.glob(".*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustdiffWarning)
        net = python_extractor(lambda batch: batch.float().flatten(1), "a")
        assert extract(net, torch.full((400, 3, 16, 16), 29, dtype=torch.uint8), cache=cache).cached


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("ROBUSTDIFF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = tmp_path / ".cache" / "robustdiff" / "features"
    assert default_cache() == at_home
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() == at_home
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "robustdiff" / "features"
    monkeypatch.setenv("ROBUSTDIFF_CACHE", "~/own")
    assert default_cache() == tmp_path / "own" / "features"


def test_the_extractor_of_the_guide_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network that stands in: a mean over each quarter of the picture, linear, so that it can be checked."""
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "evaluate.md").read_text()
    (code,) = [part.partition("```")[0] for part in guide.split("```python\n")[1:] if "class Extractor" in part]
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    monkeypatch.chdir(tmp_path)
    exec(code, {"network": network})
    extractor = open_extractor(str(tmp_path / "features.pt"))
    grey = torch.arange(0, 250, 10, dtype=torch.uint8)[:, None, None, None].expand(
        -1, 1, 40, 40
    )  # other size and number
    found = extract(extractor, grey.contiguous(), cache=None).values
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = ((grey[:, :, 0, 0] / 255 - mean) / std).repeat_interleave(4, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)  # bicubic weights in single precision
