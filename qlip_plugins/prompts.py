"""Prompt files: what is sampled, labelled, trained on and evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .errors import RecipeError


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and what is known of each.

    Args:
        prompts: n texts.
        tags: name -> n strings, such as `concept`, `style`, `level`.
    """

    prompts: tuple[str, ...]
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def only(self, rows: Sequence[int]) -> Self:
        """Some of the prompts."""
        tags = {name: tuple(values[row] for row in rows) for name, values in self.tags.items()}
        return type(self)(tuple(self.prompts[row] for row in rows), tags)

    def check_distinct(self, path: Path) -> None:
        """Check that no prompt comes twice.

        Raises:
            RecipeError: one does.
        """
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt in seen:
                raise RecipeError(f"--prompts {path}: {prompt!r} is listed twice, expected distinct prompts")
            seen.add(prompt)


def read_prompts(path: Path) -> PromptSet:
    """Read a prompt file.

    `NAME.jsonl` holds an object a line, `{"prompt": "a red fox", "concept": "fox", ...}`: all lines have
    the same keys, and all values are strings. In any other file every line that is not blank is a prompt.

    Raises:
        RecipeError: the file is missing, no text, holds no prompt, or a line is not of that form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--prompts {path}: cannot be read: {error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise RecipeError(f"--prompts {path}: the file holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return PromptSet(tuple(line for _, line in numbered))
    rows = [_object(f"--prompts {path}, line {number}", line) for number, line in numbered]
    for (number, _), row in zip(numbered, rows, strict=True):
        if set(row) != set(rows[0]):
            odd = ", ".join(sorted(set(row) ^ set(rows[0])))
            raise RecipeError(f"--prompts {path}, line {number}: other keys than in the first line: {odd}")
    names = [name for name in rows[0] if name != "prompt"]
    return PromptSet(
        tuple(row["prompt"] for row in rows), {name: tuple(row[name] for row in rows) for name in names}
    )


def _object(where: str, line: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise RecipeError(f'{where}: expected an object with "prompt", such as {{"prompt": "a red fox"}}')
    odd = [name for name, value in row.items() if not isinstance(value, str)]
    if odd:
        raise RecipeError(f"{where}: {odd[0]!r} is {row[odd[0]]!r}, expected a string")
    return row
