"""T2Q and Q2B together: a prompt's embedding in, a bit plan out; a folder on disk."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .budget import Costs, widths_within
from .checkpoint import check_finite
from .embeddings import Pooling
from .errors import ArtefactError, IncompatibleModelError
from .files import folder_written_whole
from .plan import BitPlan
from .q2b import Q2B, choose
from .recipe import ActivationBits, Budget
from .schema import StrictModel
from .t2q import T2Q

FORMAT: Literal["qlip-plugins controller"] = "qlip-plugins controller"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TRAINING_NAME = "training.json"
CURVES_NAME = "curves.png"
OWNED = (WEIGHTS_NAME, TRAINING_NAME, CURVES_NAME)
"""What may lie beside `config.json` in a controller's folder."""

C = TypeVar("C", bound=BaseModel)


class TextToBitsConfig(StrictModel):
    """What a controller is made for, and of which sizes.

    Args:
        embedding_dim: D, the length of z.
        pooling: how z comes from the text encoder's states: the end-of-text token's, as CLIP pools, or
            the mean over tokens.
        hidden: width of T2Q's inner layers.
        menu: the widths it chooses from.
        layers: the K quantizers it steers, in the order of its parameters:
            `qlip_plugins.layers.controlled(state.activations, attention=False)`.
        timesteps: of the schedule it is made for, T of them in sampling order.
        group: M.
        early: m.
        base_fingerprint: of the base it was made on, `CalibratedState.fingerprint`.
        origin: how it came to be, in words: trained (on what), or set by hand.
        population: predicted qualities of prompts that stand for all, for budgets that their mean is to
            meet; may be empty.
        quality_error: how far predicted qualities lay off on prompts that T2Q had not seen, root mean square;
            None where nobody has looked. No plan depends on it.
    """

    format: Literal["qlip-plugins controller"] = FORMAT
    version: Literal[1] = 1
    embedding_dim: int = Field(ge=1)
    pooling: Pooling
    hidden: int = Field(default=256, ge=1)
    menu: ActivationBits
    layers: tuple[str, ...] = Field(strict=False, min_length=1)
    timesteps: tuple[float, ...] = Field(strict=False, min_length=1)
    group: int = Field(default=1, ge=1)
    early: int = Field(default=0, ge=0)
    base_fingerprint: str
    origin: str
    population: tuple[float, ...] = Field(strict=False, default=())
    quality_error: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if max(self.group, self.early) > len(self.timesteps):
            raise PydanticCustomError("sizes", "group and early cannot exceed the number of timesteps")
        if len(set(self.layers)) < len(self.layers) or len(set(self.timesteps)) < len(self.timesteps):
            raise PydanticCustomError("sizes", "a layer or a timestep is listed twice")
        return self


@torch.no_grad()
def judged(t2q: T2Q, embeddings: Tensor) -> Tensor:
    """The quality `(P,)`, float64, that T2Q predicts of `(P, D)` embeddings.

    Every prompt is judged alone, in float64 on the CPU, and its quality rounded to six decimals, so
    that it depends neither on the batch around it nor on the order of a sum.
    """
    t2q = copy.deepcopy(t2q).cpu().double()
    alone = [t2q(embedding[None]) for embedding in embeddings.detach().cpu().double()]
    return torch.cat(alone).mul(1e6).round().div(1e6)


class TextToBits(nn.Module):
    """The trained part of QLIP: z -> quality -> bits."""

    def __init__(self, config: TextToBitsConfig) -> None:
        super().__init__()
        self.config = config
        self.t2q = T2Q(config.embedding_dim, config.hidden)
        self.q2b = Q2B(len(config.layers), config.timesteps, config.group, config.early)

    def forward(self, embedding: Tensor, timesteps: tuple[float, ...]) -> Tensor:
        """Probabilities of low, medium and high, `(N, S, K, 3)`, of `(N, D)` embeddings."""
        probabilities: Tensor = self.q2b(self.t2q(embedding), timesteps)
        return probabilities

    @torch.no_grad()
    def quality(self, embeddings: Tensor) -> Tensor:
        """The predicted quality `(P,)`, float64, of `(P, D)` embeddings; see `judged`."""
        return judged(self.t2q, embeddings)

    def plan(
        self,
        embeddings: Tensor,
        timesteps: tuple[float, ...],
        budget: Budget | None = None,
        costs: Costs | None = None,
    ) -> BitPlan:
        """The plan of `(P, D)` embeddings at S timesteps.

        Args:
            embeddings: z of each prompt.
            timesteps: of the scheduler.
            budget: turn the dial to this cost; None: as trained.
            costs: of the generation at hand, for a budget.

        Raises:
            BitsError: the budget cannot be met.
        """
        return self.plan_of(self.quality(embeddings), timesteps, budget, costs)

    @torch.no_grad()
    def plan_of(
        self,
        quality: Tensor,
        timesteps: tuple[float, ...],
        budget: Budget | None = None,
        costs: Costs | None = None,
    ) -> BitPlan:
        """The plan of P prompts with predicted qualities `(P,)` float64; otherwise as `plan`."""
        q2b, menu = copy.deepcopy(self.q2b).double(), self.config.menu.widths
        if budget is None:
            widths = torch.tensor(menu, dtype=torch.uint8)
            bits = torch.stack([widths[choose(q2b(one, timesteps)[0])] for one in quality.split(1)])
        else:
            assert costs is not None  # whoever asks for a budget says what things cost
            population = torch.tensor(self.config.population, dtype=torch.float64)
            bits = widths_within(q2b, quality, population, timesteps, menu, budget, costs)
        return BitPlan(bits, timesteps, self.config.layers, tuple(quality.tolist()))

    def digest(self) -> str:
        """SHA-256 of sizes and weights."""
        left = {"quality_error"} if self.config.population else {"quality_error", "population"}
        found = hashlib.sha256(self.config.model_dump_json(exclude=left).encode())
        for name, tensor in self.state_dict().items():
            found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def check_made_for(self, fingerprint: str, menu: ActivationBits, layers: tuple[str, ...]) -> None:
        """Check that this controller belongs to a base, a menu and a controlled set, in whatever order.

        Raises:
            IncompatibleModelError: it belongs to another; says which part differs.
        """
        ours = self.config
        if ours.base_fingerprint != fingerprint:
            raise IncompatibleModelError(
                f"the controller was made on the base {ours.base_fingerprint[:12]}..., this base is "
                f"{fingerprint[:12]}...: other weights, bits or calibration. A controller has to be "
                "made on this base (docs/method.md, Train)"
            )
        if ours.menu != menu:
            raise IncompatibleModelError(
                f"the controller was made for the widths {ours.menu.widths}, the recipe says {menu.widths}"
            )
        odd = sorted(set(ours.layers) ^ set(layers))
        if odd:
            raise IncompatibleModelError(
                f"the controller steers {len(ours.layers)} quantizers, the recipe {len(layers)} "
                f"(differing: {', '.join(odd[:3])}): was `attention:` or `time_layers:` changed?"
            )

    def check_order(self, layers: tuple[str, ...]) -> None:
        """Check that costs and tables of `layers` hold for this controller's columns, too.

        Raises:
            IncompatibleModelError: it was made on the same base in another form, which lists them otherwise.
        """
        if self.config.layers != layers:
            raise IncompatibleModelError(
                "the controller lists its quantizers in another order than this base: one of the two was converted. "
                "Use the base in the form that the controller was made on"
            )

    def save_pretrained(self, folder: str | Path, record: Mapping[str, bytes] | None = None) -> None:
        """Write `config.json` and `model.safetensors`, both or neither.

        Args:
            folder: to write; an older controller there is replaced.
            record: what else is written into it, `training.json` and `curves.png`, of how it was trained.

        Raises:
            ArtefactError: a parameter is NaN or infinite, or the folder holds something else.
        """
        check_finite(Path(folder), self.state_dict())
        with folder_written_whole(Path(folder), FORMAT, CONFIG_NAME, *OWNED) as temporary:
            for name, content in (record or {}).items():
                (temporary / name).write_bytes(content)
            (temporary / CONFIG_NAME).write_text(
                self.config.model_dump_json(indent=2) + "\n", encoding="utf-8"
            )
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, temporary / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            ArtefactError: missing, damaged, not a controller, or newer than this package.
        """
        folder = Path(folder)
        config = read_config(folder / CONFIG_NAME, TextToBitsConfig, "controller")
        # Loading must not move the random numbers that pictures are drawn with.
        with torch.random.fork_rng(devices=[]):
            model = cls(config)
        weights = folder / WEIGHTS_NAME
        try:
            tensors: dict[str, Tensor] = load_file(weights)
            model.load_state_dict(tensors)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{weights}: missing or damaged: {error}") from None
        except RuntimeError as error:
            raise ArtefactError(f"{weights}: does not fit {CONFIG_NAME}: {error}") from None
        check_finite(weights, tensors)
        return model.eval()


def read_config(path: Path, kind: type[C], what: str) -> C:
    """The description of a trained part.

    Args:
        path: its JSON file.
        kind: of description.
        what: the part, in a word.

    Raises:
        ArtefactError: missing, damaged, or of another kind.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        return kind.model_validate(data)
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror}, expected a {what}'s {CONFIG_NAME}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtefactError(f"{path}: not a {what}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ArtefactError(f"{path}: not JSON: {error}") from None
