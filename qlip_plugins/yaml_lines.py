"""YAML 1.2 with the line of every value, and nothing that a recipe does not need.

Anchors, aliases, tags, several documents, deep nesting and large files are refused, so a hostile
recipe costs no more than reading it; duplicate keys are collected instead of ending the reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value stands: its line (from 1) and its dotted key."""

    line: int
    dotted: str


@dataclass
class Document:
    """The plain data of a file, the line of every key, and the problems found while reading."""

    path: Path
    data: Any = None
    lines: dict[Loc, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def locate(self, loc: Iterable[str | int]) -> Place:
        """The nearest known place of a location; parts that are not keys (union tags) are passed over."""
        known: Loc = ()
        shown: list[str] = []
        for part in loc:
            if (*known, part) in self.lines:
                known = (*known, part)
                shown.append(str(part))
        return Place(self.lines.get(known, 1), ".".join(shown))

    def report(self, problems: list[tuple[int, str]]) -> list[str]:
        """`FILE:LINE: TEXT` for each problem, in the order of the file."""
        return [f"{self.path}:{line}: {text}" for line, text in sorted(set(problems))]


def read_document(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        RecipeError: the file cannot be read, or is not the plain YAML that a recipe is made of.
    """
    text = _read_text(path)
    document = Document(path)
    try:
        _refuse_excess(path, text)
        node = YAML(pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise RecipeError(f"{path}:{line}: not YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{path}:1: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(node, MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping of sections, found {_kind(node)}")
    document.data = _plain(node, (), document)
    return document


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(
                f"{path}:1: a recipe has at most {MAX_BYTES} bytes, found {path.stat().st_size}"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}:1: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def _refuse_excess(path: Path, text: str) -> None:
    depth = 0
    for event in YAML(pure=True).parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"{path}:{line}: anchors and aliases are not part of a recipe")
        # A plain scalar's implicit tag is None here; what is written out with `!` is not.
        tag = getattr(event, "tag", None)
        if tag:
            raise RecipeError(f"{path}:{line}: the tag {tag} is not part of a recipe")
        depth += isinstance(event, CollectionStartEvent)
        depth -= isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{path}:{line}: nested more than {MAX_DEPTH} deep")


def _plain(node: Node, loc: Loc, document: Document) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(loc, line)
    if isinstance(node, ScalarNode):
        return _scalar(node, line, document)
    if isinstance(node, SequenceNode):
        return [_plain(item, (*loc, index), document) for index, item in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, ScalarNode) else None
        if key is None:
            document.problems.append((key_line, "a key must be plain text"))
            continue
        if key in result:
            first = document.lines[(*loc, key)]
            dotted = ".".join(map(str, (*loc, key)))
            document.problems.append((key_line, f"{dotted}: duplicate key, first given in line {first}"))
            continue
        document.lines[(*loc, key)] = key_line
        result[key] = _plain(value_node, (*loc, key), document)
    return result


_INT = re.compile(r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")
_BOOL = {"true": True, "false": False}
_NULL = {"", "~", "null", "Null", "NULL"}


def _scalar(node: ScalarNode, line: int, document: Document) -> Any:
    """A scalar by YAML 1.2's core schema; quoted and block text stays text."""
    text: str = node.value
    if node.style is not None:
        return text
    if text in _NULL:
        return None
    if text.lower() in _BOOL and text in {text.lower(), text.capitalize(), text.upper()}:
        return _BOOL[text.lower()]
    if _INT.fullmatch(text):
        if len(text) > 30:
            document.problems.append((line, f"a number of {len(text)} digits"))
            return 0
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _kind(node: Node | None) -> str:
    if node is None:
        return "an empty file"
    return "a list" if isinstance(node, SequenceNode) else "a single value"
