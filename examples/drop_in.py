"""The equivariance loss in an ordinary diffusers + accelerate training loop: two lines differ, marked below.

python examples/drop_in.py                # digits, a minute or two on two cores
python examples/drop_in.py --images 2000  # a quick look
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from robustdiff import EquivarianceLoss, NoiseSchedule, load_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="digits", help="folder of images, or digits")
parser.add_argument("--images", type=int, default=40_000, help="length of training, in images seen")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--output", default="runs/drop_in", help="folder for the pipeline")
arguments = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=1)
set_seed(0, device_specific=True)  # each process draws its own noise
images = load_images(arguments.data)
unet = UNet2DModel(
    sample_size=images.size[0],
    in_channels=images.channels,
    out_channels=images.channels,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(range(len(images)), arguments.batch_size, shuffle=True)
model, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

criterion = EquivarianceLoss.preset("gated", NoiseSchedule.from_scheduler(noise_scheduler))  # line 1

seen = 0
while seen < arguments.images:
    for indices in loader:
        clean_images = images.x0(indices.cpu()).to(accelerator.device)
        with accelerator.accumulate(model):
            # Before: noise = randn_like(...), timesteps = randint(...), noisy = scheduler.add_noise(...),
            #         loss = mse_loss(model(noisy, timesteps).sample, noise)
            loss = criterion(model, clean_images).total.mean()  # line 2
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seen += len(indices) * accelerator.num_processes
        if seen >= arguments.images:
            break
    accelerator.print(f"{seen} images, loss {loss.item():.4f}")

if accelerator.is_main_process:
    DDPMPipeline(accelerator.unwrap_model(model), noise_scheduler).save_pretrained(arguments.output)
