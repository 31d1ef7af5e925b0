"""Train the autoencoder.

    python scripts/demo_model/train_vae.py build/demo OUT --seconds 230 [--device cuda:0]

Writes OUT/vae.safetensors (latents whitened, so that the pipeline's scaling factor is 1) and OUT/vae.jsonl.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from architecture import autoencoder
from common import Average, Clock, Data, Log, Timer, half, jitter, save_parts, training_options

KL_WEIGHT = 2e-6


def reconstruction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of the differences between neighbours, at two scales."""
    loss = (found - wanted).abs().mean() + (found - wanted).square().mean()
    for scale in (1, 2):
        one, other = (F.avg_pool2d(x, scale) if scale > 1 else x for x in (found, wanted))
        for axis in (-1, -2):
            loss = loss + (one.diff(dim=axis) - other.diff(dim=axis)).abs().mean()
    return loss


@torch.no_grad()
def psnr(model: Any, data: Data, rows: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over pictures in -1 .. 1, the mean over pictures."""
    values = []
    for part in rows.split(128):
        images = data.images(part)
        found = model.decode(model.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (found - images).square().flatten(1).mean(1)))
    return float(torch.cat(values).mean())


@torch.no_grad()
def whiten(model: Any, data: Data) -> None:
    """Fold each latent channel's mean and deviation into quant_conv and post_quant_conv."""
    latents = torch.cat([model.encode(data.images(p)).latent_dist.mode() for p in data.train.split(128)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    out, back = model.quant_conv, model.post_quant_conv
    # Only the means of the posterior are scaled exactly; its log variances move by the same factor.
    out.weight[:channels] /= deviation[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / deviation
    out.bias[channels:] -= 2 * deviation.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= deviation[None, :, None, None]


def main() -> None:
    """Train until the seconds are used up."""
    parser = training_options(seconds=230, batch=192)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    data, log = Data(options.data, device, options.pictures), Log(options.out / "vae.jsonl")
    model: Any = autoencoder().to(device)
    average = Average(model, 0.999)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=device.type == "cuda")
    clock, timer, step = Clock(options.seconds), Timer(), 0
    while clock.part < 1:
        for group in optimiser.param_groups:
            group["lr"] = clock.learning_rate(1e-3, step)
        rows = data.train[torch.randint(len(data.train), (options.batch,), device=device)]
        images = jitter(data.images(rows), degrees=6, shift=0.05, scale=0.08)
        images = torch.where(torch.rand(len(rows), 1, 1, 1, device=device) < 0.5, images, data.images(rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = model.encode(images).latent_dist
            found = model.decode(posterior.sample()).sample
        loss = reconstruction_loss(found.float(), images) + KL_WEIGHT * posterior.kl().float().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update()
        if step % 200 == 0:
            log(step=step, seconds=clock.elapsed, loss=float(loss.detach()))
        if timer.due():  # not whitened: a run that is cut off has to be whitened before use
            save_parts(half(average.values), options.out, "vae-unfinished")
        step += 1
    model.load_state_dict(average.values)
    before = psnr(model, data, data.held_out)
    whiten(model, data)
    log(
        step=step,
        seconds=clock.elapsed,
        psnr_seen=psnr(model, data, data.train[:512]),
        psnr_unseen=psnr(model, data, data.held_out),
        psnr_before_whitening=before,
        noise=float(model.encode(data.images(data.train[:128])).latent_dist.std.mean()),
    )
    save_file(half(model.state_dict()), options.out / "vae.safetensors")


if __name__ == "__main__":
    main()
