"""The same two lines for a conditional U-Net with v-prediction: extra model arguments pass through.

Random text embeddings and latents stand in for an encoder and an autoencoder, so that it runs anywhere in seconds; in a
real trainer they come from yours.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from robustdiff import EquivarianceLoss, NoiseSchedule

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=4,
    norm_num_groups=8,
)
noise_scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)

criterion = EquivarianceLoss.preset("paper", NoiseSchedule.from_scheduler(noise_scheduler))  # line 1

latents, text = torch.randn(16, 4, 8, 8), torch.randn(16, 5, 12)
for step in range(20):
    # Your own timesteps and noise can be handed in; left out, the loss draws them.
    timesteps = torch.randint(0, 1000, (16,))
    noise = torch.randn_like(latents)
    terms = criterion(unet, latents, t=timesteps, eps=noise, encoder_hidden_states=text)  # line 2
    terms.total.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == 19:
        denoising, equivariance = terms.denoising.mean().item(), terms.equivariance.mean().item()
        print(f"step {step}: denoising {denoising:.3f}, equivariance {equivariance:.3f}")
