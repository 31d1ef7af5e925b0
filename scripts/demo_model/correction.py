r"""What PTQD's correction does on the demo model: errors, pictures, and the table in docs/ptqd.md.

    python scripts/demo_model/correction.py prepare build/demo build/correction
    python scripts/demo_model/correction.py measure build/correction --device cuda
    python scripts/demo_model/correction.py table build/correction

`all` does the three. `prepare` needs the folder of prepare.py, `measure` only its own; what it has finished
is kept there, a file for each run, so that it can be interrupted, and shared by several processes
(`--shard 0 2`, `--shard 1 2`). `table` writes docs/ptqd/correction.json and the table in docs/ptqd.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import LEVELS, Data
from make_qlip import GUIDANCE, STEPS, read_json, write_json
from qlip_demo.image_text import ImageFeatures
from qlip_plugins.adapter import CorrectionFit
from qlip_plugins.controller import BitController, apply_base, load_base
from qlip_plugins.embeddings import EncodedPrompts
from qlip_plugins.generation import Settings, load_pipeline, placed, sample_model
from qlip_plugins.recipe import QlipController, Recipe, StaticController
from qlip_plugins.text_to_bits import TextToBits
from qlip_ptqd import CorrectedDDIMScheduler, CorrectionStatistics, correction
from qlip_ptqd.collecting import leading
from qlip_ptqd.following import Following, interpolation
from qlip_ptqd.scheduler import corrected

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "ptqd.md"
NUMBERS = ROOT / "docs" / "ptqd" / "correction.json"
SHIPPED = ROOT / "recipes" / "qlip_demo"
FIT_PROMPTS, ERROR_PROMPTS, PICTURES = 256, 128, 1024
ETAS = (0.0, 1.0)
DRAWS = 200

Job = tuple[str, str, float]
"""Setting, correction (`plain`, `menu`, `plan`), eta."""


@dataclass(frozen=True)
class Setting:
    """A shipped recipe, at a width throughout or as it is, and whose statistics correct it."""

    recipe: str
    statistics: str
    bits: int | None = None

    def load(self) -> Recipe:
        """The recipe to apply."""
        recipe = Recipe.load(self.recipe)
        if self.bits is None:
            return recipe
        return recipe.model_copy(update={"controller": StaticController(kind="static", bits=self.bits)})


SETTINGS = {
    "W4A16": Setting("demo-qlip-81632", "81632", 16),
    "W4A8": Setting("demo-qlip-468", "468", 8),
    "W4A6": Setting("demo-qlip-468", "468", 6),
    "W4A4": Setting("demo-qlip-468", "468", 4),
    "W4A8 + QLIP {4,6,8}": Setting("demo-qlip-468", "468"),
    "W4A16 + QLIP {8,16,32}": Setting("demo-qlip-81632", "81632"),
}
FITS = {"468": "demo-qlip-468", "81632": "demo-qlip-81632"}


def prepare(options: argparse.Namespace) -> None:
    """Choose prompts, and describe the real pictures by their features."""
    data, draw = Data(options.data, "cpu"), random.Random(0)
    rows = data.train.tolist()
    draw.shuffle(rows)
    held = data.held_out.tolist()
    draw.shuffle(held)

    def captions(chosen: Sequence[int]) -> list[str]:
        return [data.facts[row]["captions"][place % LEVELS] for place, row in enumerate(chosen)]

    half, needed = ERROR_PROMPTS // 2, FIT_PROMPTS + ERROR_PROMPTS // 2
    prompts = {
        "fit": captions(rows[:FIT_PROMPTS]),
        "errors": captions([*rows[FIT_PROMPTS:needed], *held[:half]]),
        "pictures": captions(rows[needed : needed + PICTURES]),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "prompts.json", prompts)
    features = ImageFeatures()
    known = torch.cat([features(data.pictures[part].float() / 255) for part in data.train.split(256)])
    mean, covariance = moments(known.double())
    save_file({"mean": mean.float(), "covariance": covariance.float()}, options.out / "real.safetensors")


def measure(options: argparse.Namespace) -> None:
    """Collect statistics, then everything that the table needs."""
    torch.backends.cudnn.allow_tf32 = False
    bench = Bench(options)
    for number, name in enumerate(FITS):
        for own_plan in (False, True):
            if options.shard[1] == 1 or number % options.shard[1] == options.shard[0]:
                bench.fit(name, own_plan)
    if options.only_fit:
        return
    jobs: list[Job] = [(name, "errors", 0.0) for name in SETTINGS]
    jobs += [("full precision", "plain", eta) for eta in ETAS]
    for name, setting in SETTINGS.items():
        kinds = ("plain", "menu") if setting.bits is not None else ("plain", "menu", "plan")
        jobs += [(name, kind, eta) for eta in ETAS for kind in kinds]
    for job in jobs[options.shard[0] :: options.shard[1]]:
        bench.run(job)


class Bench:
    """One pipeline, its bases, and the folder of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.prompts: dict[str, list[str]] = read_json(self.out / "prompts.json")
        self.limit: int | None = options.limit
        self.batch: int = options.batch
        self.settings = Settings(steps=STEPS, guidance_scale=GUIDANCE, seed=3, device=options.device)
        self.pipe = placed(load_pipeline(Recipe.load("demo-w4a8")), self.settings)
        self.features = ImageFeatures(options.device)
        self.real = {name: t.double() for name, t in load_file(self.out / "real.safetensors").items()}

    def statistics(self, name: str, own_plan: bool) -> Path:
        """Where the statistics of a base are."""
        return self.out / f"correction-{name}{'-plan' if own_plan else ''}.safetensors"

    def fit(self, name: str, own_plan: bool) -> None:
        """Collect the statistics of a base, once."""
        path = self.statistics(name, own_plan)
        if path.exists():
            return
        recipe, prompts = Recipe.load(FITS[name]), self.prompts["fit"][: self.limit]
        what = CorrectionFit(
            recipe, prompts, self.settings, own_plan, self.batch, path.with_suffix(".work"), path
        )
        print(json.dumps(correction.fit(what, print)), flush=True)

    def run(self, job: Job) -> None:
        """Do one job, unless its file is there."""
        name, kind, eta = job
        path = self.out / f"{name} {kind} {eta:g}.json"
        if path.exists():
            return
        found = self.errors(SETTINGS[name]) if kind == "errors" else self.pictures(name, kind, eta)
        write_json(path, {"setting": name, "kind": kind, "eta": eta, **found})
        print(path.name, found.get("energies", found), flush=True)

    @contextmanager
    def applied(self, setting: Setting) -> Iterator[tuple[Recipe, BitController]]:
        """The pipeline under a setting."""
        recipe = setting.load()
        with apply_base(self.pipe, recipe, load_base(recipe, self.pipe.unet)) as controller:
            yield recipe, controller

    def errors(self, setting: Setting) -> dict[str, Any]:
        """Squared error of the guided prediction on the float model's trajectory, by prompt, and its energy.

        `any slope` corrects by slopes below 0, too, which PTQD does not.
        """
        prompts, sums = self.prompts["errors"][: self.limit], []
        original = self.pipe.scheduler
        for start in range(0, len(prompts), self.batch):
            some = prompts[start : start + self.batch]
            try:
                self.pipe.scheduler = scheduler = leading(original)
                exact, way = self._predictions(some, prompts[:start], None)
                with self.applied(setting) as (recipe, controller):
                    found, _ = self._predictions(some, prompts[:start], way)
                    timesteps = scheduler.timesteps.tolist()
                    kinds = {"plain": found, **self._corrected(setting, recipe, controller, found, timesteps)}
            finally:
                self.pipe.scheduler = original
            sums.append(
                {
                    "energy": exact.square().sum((1, 2, 3, 4)).tolist(),
                    **{kind: (p - exact).square().sum((1, 2, 3, 4)).tolist() for kind, p in kinds.items()},
                }
            )
        return {key: [value for part in sums for value in part[key]] for key in sums[0]}

    def _predictions(
        self, prompts: Sequence[str], before: Sequence[str], way: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Guided predictions `(N, S, C, h, w)` float64 and the samples after each step."""
        scheduler = self.pipe.scheduler
        scheduler.start(way)
        model = Recipe.load("demo-w4a8").model
        sample_model(self.pipe, model, prompts, self.settings, "latent", before)
        return torch.stack(scheduler.predictions, 1).cpu().double(), scheduler.way

    def _corrected(
        self,
        setting: Setting,
        recipe: Recipe,
        controller: BitController,
        found: Tensor,
        timesteps: Sequence[int],
    ) -> dict[str, Tensor]:
        kinds = {}
        for kind, own_plan in (("menu", False), ("plan", True)):
            if own_plan and setting.bits is not None:
                continue
            statistics = CorrectionStatistics.load(self.statistics(setting.statistics, own_plan))
            following = Following(statistics, None)
            following.follow(recipe, controller)
            rows = [following.rows(t, found[:, step]) for step, t in enumerate(timesteps)]
            kinds[kind] = torch.stack([r.corrected(found[:, step]) for step, r in enumerate(rows)], 1)
            if not own_plan:
                kinds["bias alone"] = torch.stack([found[:, step] - r.bias for step, r in enumerate(rows)], 1)
                kinds["any slope"] = torch.stack(
                    [(found[:, step] - r.bias) / (1 + r.slope) for step, r in enumerate(rows)], 1
                )
        return kinds

    def pictures(self, name: str, kind: str, eta: float) -> dict[str, Any]:
        """Fréchet distance to the real pictures, with an interval, and the latents' distance to full precision."""
        if name == "full precision":
            latents = self._latents(eta)
        else:
            with self.applied(SETTINGS[name]) as (recipe, controller):
                if kind != "plain":
                    path = self.statistics(SETTINGS[name].statistics, kind == "plan")
                    scheduler = corrected(self.pipe.scheduler, CorrectionStatistics.load(path))
                    scheduler.follow(recipe, controller)
                    controller.correct(scheduler)
                latents = self._latents(eta)
                assert isinstance(self.pipe.scheduler, CorrectedDDIMScheduler) == (kind != "plain")
        exact = self._exact(eta) if name != "full precision" else latents
        if name == "full precision":
            save_file({"latents": latents}, self.out / f"exact-{eta:g}.safetensors")
        seen = torch.cat([self.features(self._decoded(part)).cpu() for part in latents.split(256)]).double()
        return {
            **frechet_with_interval(seen, self.real),
            "latents": (latents - exact).double().square().sum((1, 2, 3)).tolist(),
            "energy": exact.double().square().sum((1, 2, 3)).tolist(),
        }

    def _exact(self, eta: float) -> Tensor:
        path = self.out / f"exact-{eta:g}.safetensors"
        if not path.exists():
            save_file({"latents": self._latents(eta)}, path)
        latents: Tensor = load_file(path)["latents"]
        return latents

    def _latents(self, eta: float) -> Tensor:
        prompts, found = self.prompts["pictures"][: self.limit], []
        model = Recipe.load("demo-w4a8").model
        for start in range(0, len(prompts), self.batch):
            some, before = prompts[start : start + self.batch], prompts[:start]
            settings = replace(self.settings, eta=eta)
            found.append(sample_model(self.pipe, model, some, settings, "latent", before).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        pictures: Tensor = vae.decode(latents.to(vae.device) / vae.config.scaling_factor).sample
        # As pictures are stored: 8 bits a channel.
        return pictures.div(2).add(0.5).clamp(0, 1).mul(255).round().div(255)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)` of features `(N, D)`."""
    return features.mean(0), features.T.cov()


def frechet(features: Tensor, real: Mapping[str, Tensor]) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)); the trace of the root from eigenvalues."""
    mean, covariance = moments(features)
    values, vectors = torch.linalg.eigh(real["covariance"])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    apart = (mean - real["mean"]).square().sum()
    return float(apart + covariance.trace() + real["covariance"].trace() - 2 * trace)


def frechet_with_interval(features: Tensor, real: Mapping[str, Tensor]) -> dict[str, Any]:
    """The distance, and its deviation over draws of the pictures with replacement."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        frechet(features[torch.randint(len(features), (len(features),), generator=generator)], real)
        for _ in range(DRAWS if len(features) > 300 else 2)
    ]
    return {"frechet": frechet(features, real), "frechet_draws": draws, "pictures": len(features)}


def table(options: argparse.Namespace) -> None:
    """Sum the runs up, keep the numbers, and put the tables into the page."""
    runs = {}
    for path in sorted(options.out.glob("*.json")):
        if path.name != "prompts.json":
            found = read_json(path)
            runs[found["setting"], found["kind"], found["eta"]] = found
    errors = {name: errors_row(runs[name, "errors", 0.0]) for name in SETTINGS}
    pictures = [
        pictures_row(found, runs[name, "plain", eta])
        for (name, kind, eta), found in runs.items()
        if kind != "errors"
    ]
    rule = {name: rule_row(options.out, name) for name in FITS}
    slopes = {name: slope_ranges(options.out, name) for name in FITS}
    write_json(NUMBERS, {"errors": errors, "pictures": pictures, "rule": rule, "slopes": slopes})
    text = DOCS.read_text(encoding="utf-8")
    tables = {
        "errors": errors_lines(errors),
        "pictures": pictures_lines(pictures),
        "rule": rule_lines(rule),
    }
    for name, lines in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, _, rest = text.partition(start)
        text = f"{head}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}"
    DOCS.write_text(text, encoding="utf-8")
    for name in FITS:
        shutil.copy(
            options.out / f"correction-{name}.safetensors", SHIPPED / f"correction-{name}.safetensors"
        )


def errors_row(run: Mapping[str, list[float]]) -> dict[str, Any]:
    """Relative squared errors, and by how much less each correction leaves, with its deviation over prompts."""
    energy, plain = torch.tensor(run["energy"]), torch.tensor(run["plain"])
    row: dict[str, Any] = {"prompts": len(energy), "plain": float(plain.sum() / energy.sum())}
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(energy), (1000, len(energy)), generator=generator)
    for kind in ("menu", "plan", "bias alone", "any slope"):
        if kind in run:
            left = torch.tensor(run[kind])
            change = left[draws].sum(1) / plain[draws].sum(1) - 1
            row[kind] = {
                "error": float(left.sum() / energy.sum()),
                "change": float(left.sum() / plain.sum() - 1),
                "interval": interval(change),
            }
    return row


def rule_row(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """How far two rules' statistics lie from the plans' own, on the prompts of both; root mean squares over steps.

    `mean width` is the rule in use; `shares` averages over the quantizers, by how many have each width.
    """
    recipe = Recipe.load(FITS[name])
    assert isinstance(recipe.controller, QlipController)
    menu, own = (
        CorrectionStatistics.load(folder / f"correction-{name}{suffix}.safetensors")
        for suffix in ("", "-plan")
    )
    prompts = EncodedPrompts.from_pipeline(
        load_pipeline(recipe), read_json(folder / "prompts.json")["fit"], "eos"
    )
    steps = tuple(float(timestep) for timestep in menu.timesteps)
    bits = TextToBits.from_pretrained(recipe.controller.path).plan(prompts.embeddings, steps).bits.double()
    widths = [width for width in menu.widths if width is not None]
    mean = torch.stack([interpolation(bits[:, step].mean(1), widths).mean(0) for step in range(len(steps))])
    shares = torch.stack([(bits == width).double().mean((0, 2)) for width in widths], 1)
    slope, deviation, bias = (
        torch.stack([getattr(found, part) for found in menu.widths.values()], 1)
        for part in ("slope", "deviation", "bias")
    )
    truth = own.widths[None]
    rules = {
        "mean width": ((mean * slope).sum(1), (mean * deviation.log()).sum(1).exp(), mean),
        "shares": ((shares * slope).sum(1), (shares * deviation.square()).sum(1).sqrt(), shares),
    }
    row = {"plans' own": {part: rms(getattr(truth, part)) for part in ("slope", "deviation", "bias")}}
    for rule, (its_slope, its_deviation, weights) in rules.items():
        row[rule] = {
            "slope": rms(its_slope - truth.slope),
            "deviation": rms(its_deviation - truth.deviation),
            "bias": rms((weights[..., None] * bias).sum(1) - truth.bias),
        }
    return row


def slope_ranges(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """By width the least and the greatest slope of all steps, and at how many it is above 0."""
    found = CorrectionStatistics.load(folder / f"correction-{name}.safetensors").widths
    return {
        str(width): {
            "least": float(steps.slope.min()),
            "greatest": float(steps.slope.max()),
            "above_0": int((steps.slope > 0).sum()),
        }
        for width, steps in found.items()
    }


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def rule_lines(rule: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The table of the rules."""
    lines = ["| plans of | | slope | deviation | bias |", "|---|---|---|---|---|"]
    for name, rows in rule.items():
        for what, values in rows.items():
            text = "root mean square" if what == "plans' own" else f"{what}: off by"
            cells = " | ".join(f"{values[part]:.4f}" for part in ("slope", "deviation", "bias"))
            lines.append(f"| {FITS[name]} | {text} | {cells} |")
    return lines


def pictures_row(run: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Distances of one run, and their changes against the uncorrected one on the same pictures and draws."""
    draws, before = torch.tensor(run["frechet_draws"]), torch.tensor(plain["frechet_draws"])
    latents, energy = torch.tensor(run["latents"]), torch.tensor(run["energy"])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(energy), (1000, len(energy)), generator=generator)
    change = latents - torch.tensor(plain["latents"])
    return {
        "setting": run["setting"],
        "kind": run["kind"],
        "eta": run["eta"],
        "pictures": run["pictures"],
        "frechet": run["frechet"],
        "frechet_deviation": float(draws.std()),
        "frechet_change": run["frechet"] - plain["frechet"],
        "frechet_change_interval": interval(draws - before),
        "latents": float(latents.sum() / energy.sum()),
        "latents_change": float(change.sum() / energy.sum()),
        "latents_change_interval": interval(change[picks].sum(1) / energy[picks].sum(1)),
    }


def interval(draws: Tensor) -> list[float]:
    """The middle 95%."""
    return [float(draws.quantile(q)) for q in (0.025, 0.975)]


def errors_lines(errors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of prediction errors."""
    lines = [
        "| setting | uncorrected | corrected (menu) | corrected (own plan) | bias alone | slopes of either sign |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in errors.items():
        cells = [f"{row['plain']:.5f}"]
        for kind in ("menu", "plan", "bias alone", "any slope"):
            found = row.get(kind)
            cells.append(
                "-"
                if found is None
                else f"{found['error']:.5f} ({found['change']:+.1%}, "
                f"{found['interval'][0]:+.1%} to {found['interval'][1]:+.1%})"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def pictures_lines(pictures: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of pictures, plain beside corrected."""
    found = {(row["setting"], row["kind"], row["eta"]): row for row in pictures}
    lines = [
        "| setting | eta | FID-lite | its change, corrected (menu) | (own plan) | latents | their change, corrected "
        "(menu) | (own plan) |",
        "|---" * 8 + "|",
    ]
    for eta in ETAS:
        for name in ("full precision", *SETTINGS):
            plain = found[name, "plain", eta]
            corrected_ = [found.get((name, kind, eta)) for kind in ("menu", "plan")]
            cells = [f"{plain['frechet']:.3f} ± {plain['frechet_deviation']:.3f}"]
            cells += [changed(row, "frechet", 3) for row in corrected_]
            cells += [f"{plain['latents']:.4f}", *(changed(row, "latents", 4) for row in corrected_)]
            lines.append(f"| {name} | {eta:g} | {' | '.join(cells)} |")
    return lines


def changed(row: Mapping[str, Any] | None, what: str, digits: int) -> str:
    """A change with its interval."""
    if row is None:
        return "-"
    low, high = row[f"{what}_change_interval"]
    return f"{row[f'{what}_change']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("prepare", "measure", "table", "all"))
    parser.add_argument("folders", nargs="+", type=Path, help="of prepare.py (prepare, all), and of results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=int, help="prompts of each kind (for trials)")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("NUMBER", "OF"))
    parser.add_argument("--only-fit", action="store_true")
    options = parser.parse_args()
    options.data, options.out = options.folders[0], options.folders[-1]
    for name, work in (("prepare", prepare), ("measure", measure), ("table", table)):
        if options.work in (name, "all"):
            work(options)


if __name__ == "__main__":
    main()
