"""The quality metrics of this package as plug-ins: their options, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .adapter import Scope, load_quality_metric
from .errors import RecipeError
from .schema import RecipePath, StrictModel

if TYPE_CHECKING:
    from .prompts import PromptSet
    from .quality import Quality


class GiqaConfig(StrictModel):
    """What both GIQA metrics need."""

    features: str
    """What describes the pictures: NAME, or NAME=PATH of its weights."""
    references: RecipePath
    """A folder of pictures that are known to be good."""
    standardise: bool = False
    """Divide each feature by its deviation over the references."""
    exclude: str | None = "concept"
    """A picture is not judged by references whose tag of this name is that of its prompt; null: by all."""


class KnnGiqaConfig(GiqaConfig):
    """Options of `knn-giqa`."""

    k: Annotated[int, Field(ge=1)] = 50
    """How many nearest references count."""


class GmmGiqaConfig(GiqaConfig):
    """Options of `gmm-giqa`."""

    components: Annotated[int, Field(ge=1)] = 5
    """Gaussians of a mixture."""
    covariance: Literal["diag", "full"] = "diag"
    """Full covariances need many references: their ranks disagree between seeds where there are few."""
    pca: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the variance that principal components keep, such as 0.95; null: no projection."""
    folds: Annotated[int, Field(ge=2)] = 8
    """Parts of the concepts; each is judged by a mixture fitted on the others."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the fits."""


class ClipScoreConfig(StrictModel):
    """Options of `clip-score`."""

    model: RecipePath
    """A folder with a CLIP model and its tokenizer, as transformers saves them."""


class KnnGiqaMetric:
    """KNN-GIQA; see `quality.KnnGiqa`."""

    config_class: ClassVar[type[StrictModel]] = KnnGiqaConfig
    scope: ClassVar[Scope] = "across_prompts"
    higher_is_better: ClassVar[bool] = True

    def open(self, config: KnnGiqaConfig, pipe: Any, prompts: PromptSet, device: str) -> Quality:
        """See `qlip_plugins.adapter.QualityMetric.open`."""
        from .giqa import open_knn_giqa

        return open_knn_giqa(config, prompts, device)


class GmmGiqaMetric:
    """GMM-GIQA; see `giqa.GmmGiqa`."""

    config_class: ClassVar[type[StrictModel]] = GmmGiqaConfig
    scope: ClassVar[Scope] = "across_prompts"
    higher_is_better: ClassVar[bool] = True

    def open(self, config: GmmGiqaConfig, pipe: Any, prompts: PromptSet, device: str) -> Quality:
        """See `qlip_plugins.adapter.QualityMetric.open`."""
        from .giqa import open_gmm_giqa

        return open_gmm_giqa(config, prompts, device)


class ClipScoreMetric:
    """Cosine of a picture's and its prompt's CLIP embeddings; see `clip_score.ClipScore`."""

    config_class: ClassVar[type[StrictModel]] = ClipScoreConfig
    scope: ClassVar[Scope] = "within_prompt"
    higher_is_better: ClassVar[bool] = True

    def open(self, config: ClipScoreConfig, pipe: Any, prompts: PromptSet, device: str) -> Quality:
        """See `qlip_plugins.adapter.QualityMetric.open`."""
        from .clip_score import ClipScore

        return ClipScore(config.model, device)


knn_giqa = KnnGiqaMetric()
gmm_giqa = GmmGiqaMetric()
clip_score = ClipScoreMetric()


def parse_options(settings: Sequence[str]) -> dict[str, Any]:
    """The options of a command line, each `KEY=VALUE` with a YAML scalar.

    Raises:
        RecipeError: one is not of that form, or a key comes twice.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {setting}: expected KEY=VALUE")
        if key.strip() in options:
            raise RecipeError(f"--set {setting}: {key.strip()!r} is set twice")
        try:
            options[key.strip()] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise RecipeError(
                f"--set {setting}: the value is no YAML: {str(error).splitlines()[0]}"
            ) from None
    return options


def metric_config(name: str, options: Mapping[str, Any]) -> Any:
    """The checked options of a metric.

    Raises:
        AdapterNotFoundError: there is no such metric.
        RecipeError: an option is unknown, missing, or has a wrong value; the message names all of them.
    """
    try:
        return load_quality_metric(name).config_class.model_validate(options)
    except ValidationError as error:
        found = [f"metric {name}, --set {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError("\n".join(found)) from None
