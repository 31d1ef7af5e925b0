"""Data for the demo model: duplicates out, concept families kept together, a tokenizer from the captions.

    python scripts/demo_model/prepare.py build/demo

Reads data/emoji_64/emoji_64.parquet, writes data/emoji_64/split.json (the record of what was dropped and
held out) and, into the folder given, what the training scripts read. Needs pyarrow.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "emoji_64"
HELD_OUT = 0.1
SEED = 0
VOCABULARY = 6144
TOKENS = 77
STYLES_SHOWN = 3

# Code points that tell variants of one concept apart: joiner, variation selector, gender and direction
# signs, and the people that professions and activities are drawn with.
_SIGNS = {"200d", "fe0f", "2640", "2642", "27a1", "2194", "2195"}
_PEOPLE = {"1f466", "1f467", "1f468", "1f469", "1f474", "1f475", "1f476", "1f9d1", "1f9d2", "1f9d3"}
_GENDERED = re.compile(
    r"\b(wo)?m[ae]n'?s?\b|\bpersons?\b|\bpeople\b|\b(boy|girl|adult|child|mr|mrs|mx)s?\b|[.:,]"
)


@dataclass(frozen=True)
class Split:
    """Row numbers of the parquet file: what is trained on, held out, and dropped as a copy of another."""

    train: list[int]
    held_out: list[int]
    copies: dict[int, int]
    families: dict[str, list[str]]
    held_out_concepts: list[str]


def main(folder: Path) -> None:
    """Write the split and everything that training reads."""
    records = pq.read_table(DATA / "emoji_64.parquet").to_pylist()
    split = make_split(records)
    write_split(records, split)
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(records, split.train, folder / "tokenizer")
    write_dataset(records, split, CLIPTokenizer.from_pretrained(folder / "tokenizer"), folder)


def make_split(records: list[dict[str, Any]]) -> Split:
    """Hold out about a tenth of the concepts, whole families at a time, evenly over the groups."""
    copies = _copies(records)
    families = _families(records, copies)
    held = set(_held_out(records, families))
    kept = [row for row in range(len(records)) if row not in copies]
    return Split(
        train=[row for row in kept if records[row]["hex"] not in held],
        held_out=[row for row in kept if records[row]["hex"] in held],
        copies=copies,
        families={key: members for key, members in families.items() if len(members) > 1},
        held_out_concepts=sorted(held),
    )


def _copies(records: list[dict[str, Any]]) -> dict[int, int]:
    """Row of every picture that equals an earlier one, pixel for pixel, and the row of that one."""
    first: dict[str, int] = {}
    copies: dict[int, int] = {}
    for row, record in enumerate(records):
        digest = hashlib.sha256(_picture(record).tobytes()).hexdigest()
        if digest in first:
            copies[row] = first[digest]
        first.setdefault(digest, row)
    return copies


def _families(records: list[dict[str, Any]], copies: dict[int, int]) -> dict[str, list[str]]:
    """Concepts that share a drawing's core: by code points, by name without gender, by an equal picture."""
    parent = {record["hex"]: record["hex"] for record in records}

    def find(concept: str) -> str:
        while parent[concept] != concept:
            concept = parent[concept]
        return concept

    by_key: dict[str, str] = {}
    links: list[tuple[str, str]] = [
        (records[row]["hex"], records[first]["hex"]) for row, first in copies.items()
    ]
    for record in records:
        for key in _keys(record):
            links.append((record["hex"], by_key.setdefault(key, record["hex"])))
    for one, other in links:
        roots = sorted((find(one), find(other)))
        parent[roots[1]] = roots[0]
    families: dict[str, list[str]] = defaultdict(list)
    for concept in sorted(parent):
        families[find(concept)].append(concept)
    return dict(families)


def _keys(record: dict[str, Any]) -> Iterator[str]:
    points = [point for point in record["hex"].split("-") if point not in _SIGNS]
    core = [point for point in points if point not in _PEOPLE]
    # Groups of people ("family", "kiss", "people holding hands") differ in nothing but who they are.
    yield (
        f"subgroup family {record['subgroup']}"
        if record["subgroup"] == "family"
        else "-".join(core or points)
    )
    name = " ".join(_GENDERED.sub(" ", record["label"].lower()).split())
    if record["group"] == "people-body" and name:
        yield f"name {name}"
    if record["subgroup"] == "time" and "clock" in record["label"].replace("-thirty", "o’clock"):
        yield "a clock face"


def _held_out(records: list[dict[str, Any]], families: dict[str, list[str]]) -> Iterable[str]:
    """Families drawn at random, group by group, until a tenth of each group's concepts is held out."""
    group = {record["hex"]: record["group"] for record in records}
    wanted = {name: HELD_OUT * count for name, count in Counter(group.values()).items()}
    order = sorted(families)
    random.Random(SEED).shuffle(order)
    for key in order:
        members = families[key]
        name = group[members[0]]
        if len(members) <= wanted[name] + 0.5:
            wanted[name] -= len(members)
            yield from members


def write_split(records: list[dict[str, Any]], split: Split) -> None:
    """The record: concepts by code points, so that it can be read without row numbers."""

    def named(row: int) -> str:
        return f"{records[row]['hex']} {records[row]['style']}"

    content = {
        "made_by": "scripts/demo_model/prepare.py",
        "seed": SEED,
        "pictures": {
            "train": len(split.train),
            "held_out": len(split.held_out),
            "copies_dropped": len(split.copies),
        },
        "trained_concepts": sorted({records[row]["hex"] for row in split.train}),
        "held_out_concepts": split.held_out_concepts,
        "copies": {named(row): named(first) for row, first in split.copies.items()},
        "families": split.families,
    }
    (DATA / "split.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def make_tokenizer(records: list[dict[str, Any]], rows: list[int], folder: Path) -> None:
    """A byte-level BPE in CLIP's form, learnt from the captions that are trained on."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(
        r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in records[row]["captions"]), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False),
        encoding="utf-8",
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {name: "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")}
    special["bos_token"] = "<|startoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "do_lower_case": True,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")


def write_dataset(records: list[dict[str, Any]], split: Split, tokenizer: Any, folder: Path) -> None:
    """Pictures `(n, 64, 64, 3)` as WebP bytes, caption tokens `(n, 5, 77)`, and facts, in one file."""
    rows = [*split.train, *split.held_out]
    pictures = [records[row]["image"] for row in rows]
    offsets = torch.tensor([0, *map(len, pictures)]).cumsum(0)
    tokens = torch.tensor(
        [
            tokenizer(
                records[row]["captions"], padding="max_length", truncation=True, max_length=TOKENS
            ).input_ids
            for row in rows
        ],
        dtype=torch.int16,
    )
    facts = [
        {key: records[row][key] for key in ("hex", "label", "group", "subgroup", "style", "captions")}
        | {"held_out": row in set(split.held_out)}
        for row in rows
    ]
    content = torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8)
    save_file({"webp": content, "offsets": offsets, "tokens": tokens}, folder / "dataset.safetensors")
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _picture(record: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(record["image"])).convert("RGB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
