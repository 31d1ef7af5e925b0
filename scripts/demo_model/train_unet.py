"""Train the denoiser on latents, the text encoder frozen; one process or several (torchrun).

    torchrun --nproc-per-node 2 scripts/demo_model/train_unet.py build/demo OUT PARTS --seconds 520

PARTS holds what train_clip.py and train_vae.py wrote. Writes OUT/unet-N.safetensors, the moving average
rounded to float16, every minute and at the end, and OUT/unet.jsonl. `--init FOLDER` goes on from such files.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from architecture import NOISE_STEPS, autoencoder, encode_text, scheduler, text_encoder, unet
from common import (
    LEVELS,
    Average,
    Clock,
    Data,
    Log,
    Timer,
    half,
    jitter,
    load_parts,
    save_parts,
    training_options,
)

VARIANTS = 8
VARIANT_SHARE = 0.3
EMPTY_SHARE = 0.1
DROPOUT = 0.05
TEXT_NOISE = 0.1
"""Deviation of what is added to the text states (whose own is about 1), so that near prompts give near pictures."""

SNR_LIMIT = 5.0


class Prepared:
    """Latents `(1 + VARIANTS, n, 4, 16, 16)` and text states `(n, 5, 77, 256)` of the training pictures."""

    @torch.no_grad()
    def __init__(self, data: Data, parts: Path, rows: Tensor) -> None:
        device = data.pictures.device
        vae = autoencoder()
        vae.load_state_dict({k: v.float() for k, v in load_file(parts / "vae.safetensors").items()})
        vae = vae.to(device).eval()
        images = data.images(rows)
        sets = [images, *(jitter(images, degrees=3, shift=0.03, scale=0.05) for _ in range(VARIANTS))]
        self.latents = torch.stack(
            [torch.cat([vae.encode(part).latent_dist.mode() for part in every.split(256)]) for every in sets]
        ).to(torch.bfloat16)
        encoder = text_encoder(int(data.tokens.max()) + 1)
        encoder.load_state_dict(
            {k: v.float() for k, v in load_file(parts / "text_encoder.safetensors").items()}
        )
        encoder = encoder.to(device).eval()
        tokens = data.tokens[rows].flatten(0, 1)
        states = torch.cat([encode_text(encoder, part)[0].to(torch.bfloat16) for part in tokens.split(1024)])
        self.states = states.unflatten(0, (len(rows), LEVELS))
        start, end = int(data.tokens.max()) - 1, int(data.tokens.max())
        empty = torch.full((1, data.tokens.shape[-1]), end, device=device)
        empty[0, 0] = start
        self.empty = encode_text(encoder, empty)[0][0].to(torch.bfloat16)

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents and text states of a random batch."""
        device = self.latents.device
        rows = torch.randint(self.latents.shape[1], (size,), device=device)
        variant = torch.randint(1, 1 + VARIANTS, (size,), device=device)
        variant = torch.where(torch.rand(size, device=device) < VARIANT_SHARE, variant, 0)
        states = self.states[rows, torch.randint(LEVELS, (size,), device=device)]
        unconditional = torch.rand(size, 1, 1, device=device) < EMPTY_SHARE
        states = states + TEXT_NOISE * torch.randn_like(states)
        return self.latents[variant, rows].float(), torch.where(unconditional, self.empty, states).float()


def average_gradients(model: nn.Module, workers: int) -> None:
    """The mean gradient over all processes, in one message."""
    if workers == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined, dist.ReduceOp.AVG)
    pieces = joined.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def main() -> None:
    """Train until the seconds are used up."""
    parser = training_options(seconds=520, batch=1024)
    parser.add_argument("parts", type=Path, help="folder with the other parts")
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--wait", type=Path, help="compile first, then wait for this file: the parts are ready"
    )
    parser.add_argument("--init", type=Path, help="folder with weights to start from")
    options = parser.parse_args()
    clock = Clock(options.seconds)
    rank, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(f"{options.device}:{rank}" if workers > 1 else options.device)
    if workers > 1:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(options.seed)
    model: Any = unet(DROPOUT).to(device)  # equal on every process: the same seed
    if options.init is not None:
        model.load_state_dict(load_parts(options.init, "unet"))
    torch.manual_seed(options.seed + 1 + rank)
    log = Log(options.out / "unet.jsonl", shown=rank == 0)
    data = Data(options.data, device, options.pictures)
    loss_of = make_loss(model, device)
    compiled = torch.compile(loss_of) if options.compile else loss_of
    if options.wait is not None:
        warm_up(compiled, options.batch // workers, device)
        log(seconds=clock.elapsed, what="compiled")
        while not options.wait.exists():
            time.sleep(0.5)
    prepared = Prepared(data, options.parts, data.train)
    unseen = Prepared(data, options.parts, data.held_out)
    log(seconds=clock.elapsed, what="prepared", pictures=prepared.latents.shape[1], workers=workers)
    clock = Clock(options.seconds)
    train(model, compiled, prepared, unseen, clock, log, options, workers, rank)
    if workers > 1:
        dist.destroy_process_group()


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(latents, text states, times, noise) -> the weighted loss of each row."""


def make_loss(model: Any, device: torch.device) -> Loss:
    """Squared error of the predicted noise, weighted as min-SNR has it."""
    alphas = scheduler().alphas_cumprod.to(device)
    weights: Tensor = (SNR_LIMIT * (1 - alphas) / alphas).clamp(max=1)

    def loss_of(latents: Tensor, states: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        alpha = alphas[times][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = model(noisy, times, states, return_dict=False)[0]
        errors: Tensor = (found.float() - noise).square().mean((1, 2, 3))
        return errors * weights[times]

    return loss_of


def warm_up(loss_of: Loss, size: int, device: torch.device) -> None:
    """Compile, on noise, while the other parts are still being trained."""
    latents = torch.randn(size, 4, 16, 16, device=device)
    states = torch.randn(size, 77, 256, device=device)
    for _ in range(2):
        times = torch.randint(NOISE_STEPS, (size,), device=device)
        loss_of(latents, states, times, torch.randn_like(latents)).mean().backward()


def train(
    model: Any,
    loss_of: Loss,
    prepared: Prepared,
    unseen: Prepared,
    clock: Clock,
    log: Log,
    options: argparse.Namespace,
    workers: int,
    rank: int,
) -> None:
    """The loop: epsilon prediction, min-SNR weights, AdamW, cosine by wall clock, moving average."""
    device = prepared.latents.device
    average = Average(model, 0.9995)
    optimiser = torch.optim.AdamW(
        model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=device.type == "cuda"
    )
    size, step, timer = options.batch // workers, 0, Timer()
    done = torch.zeros(1, device=device)
    while True:
        if step % 20 == 0:  # all processes stop at the same step
            done.fill_(clock.part >= 1)
            if workers > 1:
                dist.all_reduce(done, dist.ReduceOp.MAX)
            if bool(done):
                break
        for group in optimiser.param_groups:
            group["lr"] = clock.learning_rate(options.rate, step, 500)
        latents, states = prepared.draw(size)
        times = torch.randint(NOISE_STEPS, (size,), device=device)
        loss = loss_of(latents, states, times, torch.randn_like(latents)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(model, workers)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update()
        if step % 250 == 0:
            log(step=step, seconds=clock.elapsed, loss=float(loss.detach()), unseen=check(model, unseen))
        if rank == 0 and timer.due():
            save_parts(half(average.values), options.out, "unet")
        step += 1
    if rank == 0:
        save_parts(half(average.values), options.out, "unet")
        model.load_state_dict(average.values)
        log(
            step=step,
            seconds=clock.elapsed,
            what="done",
            loss=check(model, prepared),
            unseen=check(model, unseen),
        )


@torch.no_grad()
def check(model: Any, prepared: Prepared) -> float:
    """The loss on a fixed draw of pictures, captions, times and noises, without dropout."""
    device = prepared.latents.device
    loss_of = make_loss(model.eval(), device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(1234)
        latents, states = prepared.draw(256)
        times = torch.randint(NOISE_STEPS, (256,), device=device)
        loss = loss_of(latents, states, times, torch.randn_like(latents)).mean()
    model.train()
    return float(loss)


if __name__ == "__main__":
    main()
