"""Where a prompt's embedding z comes from, and precomputed embeddings on disk."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from .artefacts import read_tensors, write_tensors
from .errors import ArtefactError, IncompatibleModelError, RecipeError
from .families import Conditioning, family_of
from .progress import progress
from .schema import nearest

EMBEDDINGS_FORMAT = "qlip-plugins prompt embeddings"
EMBEDDINGS_VERSION = 1

Pooling = Literal["eos", "pooled", "mean"]
"""How z comes from what the text encoders give: CLIP's pooled state, seen at the encoder because the denoiser
does not get it; the pooled embedding that the denoiser gets; or the mean over the tokens that it gets."""

_REMEMBERED = 4096


@dataclass(frozen=True)
class PromptEmbeddings:
    """Text-encoder states computed beforehand.

    Args:
        prompts: n names; the empty one, if there, is the negative prompt.
        states: `(n, T, D)`.
    """

    prompts: tuple[str, ...]
    states: Tensor

    def of(self, prompts: Sequence[str]) -> Tensor:
        """The states `(P, T, D)` of some of the prompts.

        Raises:
            RecipeError: one is not among them.
        """
        if isinstance(prompts, str):
            raise RecipeError(f"a list of prompts is needed, found the string {prompts!r}")
        rows = {name: row for row, name in enumerate(self.prompts)}
        for prompt in prompts:
            if prompt not in rows:
                raise RecipeError(
                    f"prompt {prompt!r} is not among the {len(rows)} precomputed ones{nearest(prompt, rows)} "
                    f"(known: {', '.join(map(repr, self.prompts[:3]))}, ... {self.prompts[-1]!r})"
                )
        return self.states[[rows[prompt] for prompt in prompts]]

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        write_tensors(
            path, EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, {"states": self.states}, prompts=self.prompts
        )

    @classmethod
    def load(cls, path: Path) -> PromptEmbeddings:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, damaged, or of another kind.
        """
        tensors, facts = read_tensors(path, EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION)
        prompts = tuple(facts.get("prompts", ()))
        states = tensors.get("states", torch.empty(0))
        if states.ndim != 3 or len(prompts) != states.shape[0] or not states.isfinite().all():
            raise ArtefactError(f"{path}: {len(prompts)} prompts with states of shape {tuple(states.shape)}")
        return cls(prompts, states)


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as the denoiser and the controller see them.

    Args:
        prompts: n prompts.
        states: `(n, T, C)` conditional text states.
        empty: `(T, C)`, the states of the empty prompt, for guidance.
        embeddings: z, `(n, D)` float32.
        pooling: how z comes from the text encoder's states.
        pooled: `(n, E)`, what the denoiser gets beside the states; None where it gets none.
        empty_pooled: `(E,)`, that of the empty prompt.
    """

    prompts: tuple[str, ...]
    states: Tensor
    empty: Tensor
    embeddings: Tensor
    pooling: Pooling
    pooled: Tensor | None = None
    empty_pooled: Tensor | None = None

    @property
    def conditioning(self) -> Conditioning:
        """As the denoiser gets it."""
        return Conditioning(self.states, self.pooled)

    def only(self, rows: Sequence[int]) -> EncodedPrompts:
        """Some of the prompts."""
        picked = list(rows)
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in picked),
            states=self.states[picked],
            embeddings=self.embeddings[picked],
            pooled=None if self.pooled is None else self.pooled[picked],
        )

    @classmethod
    def from_table(cls, table: PromptEmbeddings, prompts: Sequence[str]) -> Self:
        """Prompts of a table, which must hold the empty one; z is the mean over tokens.

        Raises:
            RecipeError: the table lacks one.
        """
        states = table.of(prompts)
        embeddings = MeanOfStates().embed(Conditioning(states)).float()
        return cls(tuple(prompts), states, table.of([""])[0], embeddings, "mean")

    @classmethod
    @torch.no_grad()
    def from_pipeline(cls, pipe: Any, prompts: Sequence[str], pooling: Pooling) -> Self:
        """Encode prompts with a pipeline's own text encoder, each alone.

        Args:
            pipe: a pipeline with `text_encoder`, `tokenizer` and diffusers' `encode_prompt`.
            prompts: any texts.
            pooling: how z comes from the states.

        Raises:
            IncompatibleModelError: it has no text encoder or tokenizer, or, for `eos`, no pooled state.
        """
        family = family_of(pipe)
        if any(getattr(pipe, name, None) is None for name in (*family.encoders, "tokenizer")):
            raise IncompatibleModelError(
                f"{type(pipe).__name__} has no tokenizer or no text encoder, so a prompt cannot be encoded. Give a "
                "table of precomputed embeddings"
            )
        source = source_for(pipe, pooling)
        try:
            empty = family.empty(pipe)
            rest = []
            for prompt in progress(prompts, "encoding prompts"):
                text = family.encoded(pipe, prompt)
                pooled = None if text.pooled is None else text.pooled[0].cpu()
                rest.append((text.states[0].cpu(), source.embed(text)[0].float(), pooled))
        finally:
            source.remove()
        both = [one for _, _, one in rest if one is not None]
        return cls(
            prompts=tuple(prompts),
            states=torch.stack([states for states, _, _ in rest]),
            empty=empty.states[0].cpu(),
            embeddings=torch.stack([z for _, z, _ in rest]),
            pooling=pooling,
            pooled=torch.stack(both) if both else None,
            empty_pooled=None if empty.pooled is None else empty.pooled[0].cpu(),
        )


def encode(
    pipe: Any, table: Path | None, prompts: Sequence[str], pooling: Pooling | None = None
) -> EncodedPrompts:
    """Prompts as a recipe's model sees them: of its table of embeddings, or of its text encoder without one.

    Args:
        pipe: of the model.
        table: the recipe's `model.prompt_embeddings`.
        prompts: any texts, those of the table where there is one.
        pooling: how z comes from a text encoder's states (None: `own_pooling`); a table always gives the mean
            over tokens.

    Raises:
        RecipeError: the table lacks a prompt.
        IncompatibleModelError: as of `EncodedPrompts.from_pipeline`.
    """
    if table is not None:
        check_table_serves(pipe)
        return EncodedPrompts.from_table(PromptEmbeddings.load(table), prompts)
    return EncodedPrompts.from_pipeline(pipe, prompts, pooling or own_pooling(pipe))


def check_table_serves(pipe: Any) -> None:
    """Check that precomputed states are all that a pipeline's denoiser needs of a prompt.

    Raises:
        IncompatibleModelError: it gets a pooled embedding, too, which a table does not hold.
    """
    family = family_of(pipe)
    if family.pooled:
        raise IncompatibleModelError(
            f"model.prompt_embeddings: a table holds text states alone, and {type(pipe).__name__} (family "
            f"{family.name}) passes a pooled embedding, too: leave it out, and give a pipeline with its text encoders"
        )


def own_pooling(pipe: Any) -> Pooling:
    """Where the pooled embedding of a pipeline's prompts is found."""
    return "pooled" if family_of(pipe).pooled else "eos"


class EmbeddingSource(Protocol):
    """Gives z of the prompts that a denoiser is about to be conditioned on."""

    def embed(self, text: Conditioning) -> Tensor:
        """`(P, D)` of P prompts."""
        ...

    def remove(self) -> None:
        """Leave the pipeline as it was."""
        ...


class MeanOfStates:
    """z is the mean over tokens of what the denoiser sees; needs no text encoder."""

    def embed(self, text: Conditioning) -> Tensor:
        """See `EmbeddingSource.embed`."""
        # One prompt at a time, so that the sum's order does not depend on the batch.
        return torch.stack([row.double().mean(0) for row in text.states.detach().cpu()])

    def remove(self) -> None:
        """See `EmbeddingSource.remove`."""


class PassedPooled:
    """z is the pooled embedding that the pipeline passes to the denoiser (SDXL, FLUX)."""

    def embed(self, text: Conditioning) -> Tensor:
        """See `EmbeddingSource.embed`."""
        assert text.pooled is not None  # `source_for` has looked at the family
        return text.pooled.detach().cpu().double()

    def remove(self) -> None:
        """See `EmbeddingSource.remove`."""


def source_for(pipe: Any, pooling: Pooling) -> EmbeddingSource:
    """Where z of a pipeline's prompts comes from.

    Raises:
        IncompatibleModelError: the pipeline's family has no such pooled state.
    """
    if pooling == "mean":
        return MeanOfStates()
    family = family_of(pipe)
    if pooling == "pooled":
        if not family.pooled:
            raise IncompatibleModelError(
                f"the controller reads the pooled embedding that the denoiser gets, and {type(pipe).__name__} (family "
                f"{family.name}) passes none: it needs a controller with pooling 'eos' or 'mean'"
            )
        return PassedPooled()
    if family.pooled:
        raise IncompatibleModelError(
            f"the controller reads the text encoder's pooled state, and {type(pipe).__name__} (family {family.name}) "
            "passes one to its denoiser: it needs a controller with pooling 'pooled' or 'mean'"
        )
    encoder = getattr(pipe, "text_encoder", None)
    if not isinstance(encoder, torch.nn.Module):
        raise IncompatibleModelError(
            "the controller reads the text encoder's pooled state, and the pipeline has no text encoder"
        )
    return EndOfTextState(encoder)


class EndOfTextState:
    """z is CLIP's pooled state, which Stable Diffusion 1.x does not pass to its denoiser.

    A hook on the text encoder remembers the pooled state of every prompt it encodes, encoded alone so
    that it does not depend on the batch. The denoiser's conditioning is then recognised bit for bit:
    states that this encoder did not just produce (`clip_skip`, embeddings made elsewhere) are refused
    rather than judged by another prompt's z.
    """

    def __init__(self, text_encoder: torch.nn.Module) -> None:
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self._encoding_alone = False
        self._handle = text_encoder.register_forward_hook(self._remember, with_kwargs=True)

    def embed(self, text: Conditioning) -> Tensor:
        """See `EmbeddingSource.embed`.

        Raises:
            IncompatibleModelError: the states are not the text encoder's.
        """
        found = [self._known.get(_digest(row)) for row in text.states]
        if any(pooled is None for pooled in found):
            raise IncompatibleModelError(
                "the denoiser's text states are not those that the pipeline's text encoder gave since the recipe "
                "was applied: `clip_skip`, `prompt_embeds` made elsewhere, or textual inversion changed them. "
                "Pass the prompt as text, or use a controller with pooling 'mean'"
            )
        return torch.stack([pooled for pooled in found if pooled is not None])

    def remove(self) -> None:
        """See `EmbeddingSource.remove`."""
        self._handle.remove()

    def _remember(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._encoding_alone:
            return
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise IncompatibleModelError(
                f"{type(module).__name__} gives no pooled state; use a controller with pooling 'mean'"
            )
        alone = pooled if pooled.shape[0] == 1 else self._encode_alone(module, args, kwargs, pooled.shape[0])
        for states, z in zip(output.last_hidden_state, alone, strict=True):
            self._known[_digest(states)] = z.detach().cpu().double()
            self._known.move_to_end(_digest(states))
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _encode_alone(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], rows: int) -> Tensor:
        def row(value: Any, index: int) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
            return value[index : index + 1] if batched else value

        self._encoding_alone = True
        try:
            with torch.no_grad():
                outputs = [
                    module(*(row(a, i) for a in args), **{k: row(v, i) for k, v in kwargs.items()})
                    for i in range(rows)
                ]
        finally:
            self._encoding_alone = False
        return torch.cat([output.pooler_output for output in outputs])


def _digest(states: Tensor) -> bytes:
    # Bytes, not values: bfloat16 has no numpy type.
    raw = states.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).digest()
