r"""From the trained demo pipeline to its QLIP: prompts, labels, T2Q, ranges, Q2B.

    python scripts/demo_model/make_qlip.py prompts build/demo build/qlip
    python scripts/demo_model/make_qlip.py samples build/qlip
    python scripts/demo_model/make_qlip.py references build/demo build/qlip
    qlip-plugins label demo-w4a8 --prompts build/qlip/label_prompts.jsonl --metric knn-giqa --set features=demo \
        --set references=build/qlip/references --set standardise=true --guidance 3 --seed 1 --batch-size 64 \
        --device cuda --out build/qlip/labels.safetensors
    qlip-plugins calibrate recipes/qlip_demo/pipeline --prompts scripts/demo_model/calibration.txt --guidance 3 \
        --activation-bits 8 16 --iterations 800 --activation-iterations 300 --out recipes/qlip_demo/base
    python scripts/demo_model/make_qlip.py ranges build/qlip demo-w4a8    # and demo-w4a16
    python scripts/demo_model/make_qlip.py ranges build/qlip demo-w4a8 --add 5 7
    qlip-plugins train t2q demo-w4a8 --labels build/qlip/labels.safetensors --held split=held --lr 1e-3 \
        --out build/qlip/t2q

What follows from there, the controllers and their evaluation, is in docs/allocation.md.
`ranges` writes into recipes/qlip_demo, what the recipes name.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from common import stored_pictures
from qlip_plugins.controller import apply
from qlip_plugins.fitting import fit_ranges
from qlip_plugins.generation import Settings, load_pipeline, placed, sample
from qlip_plugins.grids import Ranges
from qlip_plugins.labels import Labels
from qlip_plugins.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = 25
GUIDANCE = 3.0
LABEL_PROMPTS = 10_000
STYLES = 4
HELD_SHARE = 0.25
RANGE_PROMPTS = 48
WIDTHS = (4, 6, 8, 16)


def prompts(options: argparse.Namespace) -> None:
    """Choose label prompts: every concept at all levels in one style, then in another, and so on, up to 10,000.

    The tag `split` holds whole families of concepts out, a quarter of them.
    """
    facts = read_json(options.data / "facts.json")
    families = read_json(ROOT / "data/emoji_64/split.json")["families"]
    family = {concept: key for key, members in families.items() for concept in members}
    by_concept: dict[str, list[dict[str, Any]]] = {}
    for fact in facts:
        by_concept.setdefault(fact["hex"], []).append(fact)
    concepts = sorted(by_concept)
    held = set(_shuffled({family.get(concept, concept) for concept in concepts}, HELD_SHARE))
    draw = random.Random(0)
    orders = {concept: draw.sample(by_concept[concept], len(by_concept[concept])) for concept in concepts}
    chosen: dict[str, dict[str, str]] = {}
    for turn in range(STYLES):
        for concept in draw.sample(concepts, len(concepts)):
            if turn < len(orders[concept]) and len(chosen) < LABEL_PROMPTS:
                _choose(chosen, orders[concept][turn], family.get(concept, concept), held)
    options.out.mkdir(parents=True, exist_ok=True)
    described = [json.dumps({"prompt": text, **tags}, ensure_ascii=False) for text, tags in chosen.items()]
    (options.out / "label_prompts.jsonl").write_text("\n".join(described) + "\n", encoding="utf-8")


def _shuffled(families: set[str], share: float) -> list[str]:
    order = sorted(families)
    random.Random(1).shuffle(order)
    return order[: round(len(order) * share)]


def _choose(chosen: dict[str, dict[str, str]], fact: dict[str, Any], family: str, held: set[str]) -> None:
    """All captions of a picture, except those that another picture has."""
    for level, text in enumerate(fact["captions"], 1):
        tags = {"concept": fact["hex"], "family": family, "level": str(level)}
        tags["seen"] = "unseen" if fact["held_out"] else "seen"
        tags["split"] = "held" if family in held else "train"
        chosen.setdefault(text, tags | {key: fact[key] for key in ("style", "group", "subgroup")})


def _shuffled_rows(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order


def samples(options: argparse.Namespace) -> None:
    """Prompts of docs/allocation.md, drawn from the label prompts: of training, and a few of each held-out concept."""
    lines = (options.out / "label_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    train, held = ([row for row in rows if row["split"] == split] for split in ("train", "held"))
    by_concept: dict[str, list[dict[str, Any]]] = {}
    for row in _shuffled_rows(held, 6):
        by_concept.setdefault(row["concept"], []).append(row)
    firsts = [by_concept[concept][0] for concept in sorted(by_concept)]
    few = _shuffled_rows(firsts, 4)
    chosen = {
        "train96": _shuffled_rows(train, 11)[:96],
        "train2000": _shuffled_rows(train, 5)[:2000],
        "held716": [row for concept in sorted(by_concept) for row in by_concept[concept][:2]],
        "held1250": _shuffled_rows(held, 6)[:1250],
        "held358": firsts,
        "held50": few[:50],
        "held32": few[50:82],
        "held24": few[:24],
    }
    for name, found in chosen.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


def references(options: argparse.Namespace) -> None:
    """The training pictures as a folder, each with the concept that it shows."""
    content, offsets = stored_pictures(options.data)
    facts, folder = read_json(options.data / "facts.json"), options.out / "references"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, fact in enumerate(facts):
        if not fact["held_out"]:
            name = f"{row:06d}.webp"
            (folder / name).write_bytes(content[offsets[row] : offsets[row + 1]])
            lines.append(json.dumps({"file_name": name, "concept": fact["hex"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def split_rows(made: Labels) -> tuple[list[int], list[int]]:
    """Training and held rows; whole families, a quarter of them held."""
    families = sorted(set(made.tags["family"]))
    random.Random(1).shuffle(families)
    held = set(families[: round(len(families) * HELD_SHARE)])
    rows = range(len(made.prompts))
    return (
        [row for row in rows if made.tags["family"][row] not in held],
        [row for row in rows if made.tags["family"][row] in held],
    )


def ranges(options: argparse.Namespace) -> None:
    """Fit ranges for every width of both menus while the base generates calibration prompts.

    With `--add`, of more widths: those of the recipe's table stay as they are, and a table `...-wide` is written.
    """
    recipe = Recipe.load(options.recipe)
    pipe = placed(load_pipeline(recipe), settings_of(options))
    lines = (ROOT / "scripts/demo_model/calibration.txt").read_text(encoding="utf-8").splitlines()
    texts = lines[: options.limit or RANGE_PROMPTS]

    def run() -> None:
        for start in range(0, len(texts), 16):
            sample(pipe, recipe, texts[start : start + 16], settings_of(options))

    with apply(pipe, recipe.model_copy(update={"ranges": None})) as controller:
        found = fit_ranges(controller.quantizers, controller.state, options.add or WIDTHS, run)
    assert recipe.ranges is not None
    assert recipe.ranges.table is not None
    table = recipe.ranges.table
    if not options.add:
        found.save(options.to / table.name)
        return
    known = Ranges.load(table)
    both = {name: {**grids, **known.fitted[name]} for name, grids in found.fitted.items()}
    Ranges(both, known.keep_calibrated, known.fingerprint).save(options.to / f"{table.stem}-wide.safetensors")


def settings_of(options: argparse.Namespace) -> Settings:
    """How all of it samples."""
    return Settings(steps=STEPS, guidance_scale=GUIDANCE, seed=2, device=options.device)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser()
    steps = parser.add_subparsers(required=True)
    for step in (prompts, samples, references, ranges):
        one = steps.add_parser(step.__name__)
        one.set_defaults(run=step)
        if step in (prompts, references):
            one.add_argument("data", type=Path)
        one.add_argument("out", type=Path)
        if step is ranges:
            one.add_argument("recipe")
            one.add_argument("--add", type=int, nargs="+", metavar="BITS")
            one.add_argument("--to", type=Path, default=ROOT / "recipes/qlip_demo")
        one.add_argument("--device", default="cpu")
        one.add_argument("--limit", type=int, help="prompts at most (for trials)")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
