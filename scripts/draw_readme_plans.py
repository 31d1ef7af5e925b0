"""Draw docs/golden-plans.png from the demo command's plan: `python scripts/draw_readme_plans.py out`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image


def main(folder: Path) -> None:
    """Put the drawn plans of a `generate` folder side by side."""
    prompts = json.loads((folder / "report.json").read_text())["prompts"]
    plans = [Image.open(folder / f"{index:03d}-bits.png") for index in range(len(prompts))]
    joined = Image.new(
        "RGB", (sum(plan.width for plan in plans), max(plan.height for plan in plans)), "white"
    )
    left = 0
    for plan in plans:
        joined.paste(plan, (left, 0))
        left += plan.width
    target = Path(__file__).resolve().parent.parent / "docs" / "golden-plans.png"
    target.parent.mkdir(exist_ok=True)
    joined.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
