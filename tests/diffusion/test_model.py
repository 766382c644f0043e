"""Every network is called one way, and says alike what it takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from helpers import TINY_UNET, SmallNet, normal
from robustdiff.diffusion.model import Denoiser, kept_buffers, module_of
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.diffusion.sigma_floor import SigmaClampedModel

X, T = normal(2, 4, 8, 8, dtype=torch.float32), torch.tensor([3, 700])
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "norm_num_groups": 2,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
}


def unet(**changes: object) -> UNet2DModel:
    """A tiny unconditional network, unless said otherwise."""
    return UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **{**TINY_UNET, **changes}).eval()


def test_a_unet_and_its_pipeline_are_the_same_denoiser() -> None:
    network = unet()
    pipeline = DDPMPipeline(unet=network, scheduler=DDPMScheduler())
    for denoiser in (Denoiser.of(network), Denoiser.of(pipeline), Denoiser.of(Denoiser.of(network))):
        assert denoiser.model is network
        assert (denoiser.channels, denoiser.size, denoiser.num_classes) == (4, (8, 8), None)
        assert torch.equal(denoiser(X, T), network(X, T).sample)
    assert Denoiser.of(unet(num_class_embeds=3)).num_classes == 3


def test_a_size_that_is_not_square_is_height_and_width() -> None:
    assert Denoiser.of(UNet2DModel(sample_size=(8, 16), **TINY_UNET)).size == (8, 16)


def test_classes_are_told_to_networks_that_know_them_and_to_no_other() -> None:
    labels = torch.tensor([0, 2])
    network = unet(num_class_embeds=3)
    denoiser = Denoiser.of(network)
    assert torch.equal(denoiser(X, T, **denoiser.class_kwargs(labels)), network(X, T, class_labels=labels).sample)
    assert Denoiser.of(unet()).class_kwargs(None) == {}
    for one, given in ((denoiser, None), (Denoiser.of(unet()), labels)):
        with pytest.raises(ValueError, match="class_labels"):
            one.class_kwargs(given)


def test_a_text_conditional_unet_takes_its_states_as_keywords() -> None:
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    text = normal(2, 5, 6, seed=1, dtype=torch.float32)
    output = Denoiser.of(network)(X, T, encoder_hidden_states=text)
    assert torch.equal(output, network(X, T, text).sample)
    assert Denoiser.of(network).channels == 4


def test_a_diffusion_transformer_is_a_denoiser_of_classes() -> None:
    network = DiTTransformer2DModel(**TRANSFORMER, patch_size=2, num_embeds_ada_norm=5).eval()
    denoiser = Denoiser.of(SimpleNamespace(transformer=network))
    labels = torch.tensor([0, 4])
    assert (denoiser.channels, denoiser.size, denoiser.num_classes) == (4, (8, 8), 5)
    output = denoiser(X, T, **denoiser.class_kwargs(labels))
    assert torch.equal(output, network(X, T, class_labels=labels).sample)


def test_a_network_with_its_timestep_in_another_place_gets_it_there() -> None:
    network = Transformer2DModel(
        **TRANSFORMER, num_embeds_ada_norm=5, cross_attention_dim=6, norm_type="ada_norm"
    ).eval()
    text, t = normal(2, 5, 6, seed=1, dtype=torch.float32), torch.tensor(3)
    output = Denoiser.of(network)(X, t, encoder_hidden_states=text)
    assert torch.equal(output, network(X, text, t).sample)
    assert not torch.equal(output, Denoiser.of(network)(X, torch.tensor(0), encoder_hidden_states=text))


def test_any_callable_is_a_denoiser_and_nothing_else_is() -> None:
    assert torch.equal(Denoiser.of(lambda x, t: 2 * x)(X, T), 2 * X)
    assert Denoiser.of(nn.Identity.forward).model is nn.Identity.forward
    with pytest.raises(TypeError, match="str"):
        Denoiser.of("model")


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        Denoiser.of(lambda x, t: x[:, :2])(X, T)


def test_wrapped_networks_keep_their_buffers_too() -> None:
    network = SmallNet(norm=True).train()
    wrapped = SigmaClampedModel(Denoiser.of(network), NoiseSchedule(torch.tensor([0.9, 0.5])), sigma_scale=2.0)
    assert module_of(wrapped) is network
    assert module_of(lambda x, t: x) is None
    before = network.norm.running_mean.clone()  # type: ignore[union-attr, operator]

    def call() -> Tensor:
        return wrapped(normal(2, 2, 4, 4), torch.tensor([0, 1]))

    with kept_buffers(wrapped):
        call()
    assert torch.equal(network.norm.running_mean, before)  # type: ignore[arg-type]
    call()
    assert not torch.equal(network.norm.running_mean, before)  # type: ignore[arg-type]
