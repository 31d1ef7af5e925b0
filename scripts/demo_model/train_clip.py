"""Train the text encoder and the image tower on pictures and captions (contrastive).

    python scripts/demo_model/train_clip.py build/demo OUT --seconds 110 [--device cuda:1]

Writes OUT/text_encoder.safetensors, OUT/image_tower.safetensors and OUT/clip.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from architecture import JOINT, TEXT_WIDTH, ImageTower, encode_text, text_encoder
from common import LEVELS, Average, Clock, Data, Log, Timer, half, jitter, random_captions, training_options

STYLED = 2
"""From this level (0 .. 4) on a caption names the drawing style."""

MOST_SCALE = 3.7
"""The logarithm of the greatest inverse temperature."""

CHECKED = 10
"""One concept in so many is kept from training, to see how the towers do on concepts they do not know."""


class Clip(nn.Module):
    """Both towers, the text projection and the temperature."""

    def __init__(self, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.text: Any = text_encoder(vocabulary, dropout)
        self.image = ImageTower()
        self.text_projection = nn.Linear(TEXT_WIDTH, JOINT, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def texts(self, tokens: Tensor) -> Tensor:
        """Joint embeddings `(N, 256)` of captions, of length 1."""
        return F.normalize(self.text_projection(encode_text(self.text, tokens)[1]), dim=-1)

    def images(self, pictures: Tensor) -> Tensor:
        """Joint embeddings `(N, 256)` of pictures, of length 1."""
        return F.normalize(self.image(pictures), dim=-1)


def without_some_words(tokens: Tensor, share: float) -> Tensor:
    """Captions `(N, 77)` with a share of their inner tokens left out, the rest moved together."""
    end = tokens.max()
    inner = (tokens != end) & (torch.arange(tokens.shape[1], device=tokens.device) > 0)
    lost = inner & (torch.rand(tokens.shape, device=tokens.device) < share)
    order = lost.int().argsort(dim=1, stable=True)
    return tokens.masked_fill(lost, end).gather(1, order)


def recoloured(images: Tensor, width: float) -> Tensor:
    """Each picture with its channels scaled a little, white kept white."""
    factor = 1 + (torch.rand(len(images), 3, 1, 1, device=images.device) * 2 - 1) * width
    return (1 - (1 - images) * factor).clamp(-1, 1)


def contrastive_loss(model: Clip, images: Tensor, texts: Tensor, concepts: Tensor, levels: Tensor) -> Tensor:
    """CLIP's loss; a caption without a style does not count against its concept in another style."""
    logits = model.log_scale.clamp(max=MOST_SCALE).exp() * images @ texts.T
    same = (concepts[:, None] == concepts[None, :]) & (levels < STYLED)[None, :]
    same.fill_diagonal_(False)
    logits = logits.float().masked_fill(same, float("-inf"))
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def retrieval(model: Clip, data: Data, rows: Tensor) -> dict[str, float]:
    """How often a caption finds its picture among `rows`: levels 3 and 5, and level 1 by concept."""
    model.eval()
    images = torch.cat([model.images(data.images(part)) for part in rows.split(512)])
    found = {}
    for level in (0, 2, LEVELS - 1):
        texts = torch.cat([model.texts(data.tokens[part, level]) for part in rows.split(512)])
        best = rows[(texts @ images.T).argmax(-1)]
        hit = data.concept[best] == data.concept[rows] if level == 0 else best == rows
        found[f"level_{level + 1}"] = float(hit.float().mean())
    model.train()
    return found


def main() -> None:
    """Train until the seconds are used up."""
    parser = training_options(seconds=110, batch=1024)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--words-lost", type=float, default=0.15)
    parser.add_argument("--text-dropout", type=float, default=0.1)
    parser.add_argument("--recolour", type=float, default=0.1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    data, log = Data(options.data, device, options.pictures), Log(options.out / "clip.jsonl")
    model = Clip(int(data.tokens.max()) + 1, options.text_dropout).to(device).train()
    checked = data.train[data.concept[data.train] % CHECKED == 0]
    trained = data.train[data.concept[data.train] % CHECKED != 0]
    average = Average(model, 0.995)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    clock, timer, step = Clock(options.seconds), Timer(), 0
    while clock.part < 1:
        rate = clock.learning_rate(options.rate, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        rows = trained[torch.randperm(len(trained), device=device)[: options.batch]]
        tokens, levels = random_captions(data, rows)
        tokens = without_some_words(tokens, options.words_lost)
        pictures = recoloured(jitter(data.images(rows), degrees=10, shift=0.08, scale=0.15), options.recolour)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            images, texts = model.images(pictures), model.texts(tokens)
        loss = contrastive_loss(model, images.float(), texts.float(), data.concept[rows], levels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update()
        if step % 200 == 0:
            found = retrieval(model, data, checked)
            log(step=step, seconds=clock.elapsed, loss=float(loss.detach()), rate=rate, unknown=found)
        if timer.due():
            save(average.values, options.out)
        step += 1
    model.load_state_dict(average.values)
    log(
        step=step,
        seconds=clock.elapsed,
        settings={
            name: getattr(options, name) for name in ("rate", "words_lost", "text_dropout", "recolour")
        },
        trained=retrieval(model, data, trained[:1000]),
        unknown=retrieval(model, data, checked),
        held_out=retrieval(model, data, data.held_out),
    )
    save(average.values, options.out)


def save(state: dict[str, Tensor], folder: Path) -> None:
    """Both towers as float16, each file whole or not at all."""
    text = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    rest = {name: value for name, value in state.items() if not name.startswith("text.")}
    for name, part in (("text_encoder", text), ("image_tower", rest)):
        temporary = folder / f".{name}.part"
        save_file(half(part), temporary)
        temporary.replace(folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
