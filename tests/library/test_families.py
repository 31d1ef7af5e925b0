"""Every family, steered: the right prompt's bits in every call, whatever the scheduler, or a refusal that says why."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from family_models import MENU, PIPELINES, PROMPTS, call_options, make, one_call, qlip_recipe
from qlip_plugins.controller import BitController, apply
from qlip_plugins.embeddings import PromptEmbeddings, encode
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.families import FAMILIES, denoiser_of, family_of, scheduled
from qlip_plugins.generation import text_arguments
from qlip_plugins.recipe import Recipe
from qlip_plugins.text_to_bits import TextToBits

DIFFUSION = (
    DDIMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
FLOW: tuple[tuple[Any, dict[str, Any]], ...] = (
    (FlowMatchEulerDiscreteScheduler, {}),
    (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": True}),
    (
        DPMSolverMultistepScheduler,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True},
    ),
    (UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
)
CASES = [
    *((name, kind, {}) for name in ("sd", "bk-sdm", "sdxl") for kind in DIFFUSION),
    *(("flux", kind, options) for kind, options in FLOW),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Recipe]]:
    made = {}
    for name in PIPELINES:
        folder = tmp_path_factory.mktemp(name)
        pipe = make(name, folder)
        made[name] = (pipe, qlip_recipe(name, pipe, folder))
    return made


def run(name: str, pipe: Any, prompts: list[str], guided: bool = True, **options: Any) -> Tensor:
    guidance: dict[str, Any] = {"guidance_scale": 3.0 if guided else 1.0}
    if name == "flux" and guided:
        guidance |= {"true_cfg_scale": 3.0, "negative_prompt": ["blurry"] * len(prompts)}
    options = {"num_inference_steps": 4, **call_options(name), **guidance, **options}
    if "prompt_embeds" not in options:
        options["prompt"] = prompts
    torch.manual_seed(1)
    images: Tensor = pipe(**options).images
    return images


class Watch:
    """Notes what every quantizer is set to, call by call."""

    def __init__(self, controller: BitController, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, list[int]]] = []
        self._controller = controller
        for name, quantizer in controller.quantizers.items():
            monkeypatch.setattr(quantizer, "set_bits", self._noting(name, quantizer.set_bits))

    def _noting(self, name: str, set_bits: Any) -> Any:
        def noted(bits: int | Tensor) -> None:
            if name == self._controller.planner.layers[0]:
                self.calls.append({})
            self.calls[-1][name] = torch.as_tensor(bits).reshape(-1).tolist()
            set_bits(bits)

        return noted


def plan_alone(recipe: Recipe, pipe: Any, prompt: str, timesteps: tuple[float, ...]) -> Tensor:
    """What the controller gives a prompt, worked out apart from the pipeline's call."""
    assert recipe.controller.kind == "qlip"
    controller = TextToBits.from_pretrained(recipe.controller.path)
    return controller.plan(encode(pipe, None, [prompt]).embeddings, timesteps).bits[0]


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_every_call_has_its_prompts_bits(
    models: dict[str, tuple[Any, Recipe]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: Any,
    options: dict[str, Any],
) -> None:
    pipe, recipe = models[name]
    unknown = set(options) - set(inspect.signature(kind.__init__).parameters)
    if unknown or (
        "use_flow_sigmas" in options and "use_flow_sigmas" not in inspect.getsource(type(pipe).__call__)
    ):
        pytest.skip(
            f"this diffusers has no such scheduler for the pipeline ({', '.join(unknown) or 'flow sigmas'})"
        )
    monkeypatch.setattr(pipe, "scheduler", kind(**options))
    before = run(name, pipe, PROMPTS)
    with apply(pipe, recipe) as controller:
        watch = Watch(controller, monkeypatch)
        assert not torch.equal(run(name, pipe, PROMPTS), before), "quantized"
        plan, visits = controller.plan, controller.visits
        assert plan is not None
        timesteps = [float(t) for t in pipe.scheduler.timesteps]
        alone = [plan_alone(recipe, pipe, prompt, plan.timesteps) for prompt in PROMPTS]
    assert plan.timesteps == tuple(dict.fromkeys(timesteps))
    for row, expected in enumerate(alone):
        assert torch.equal(plan.bits[row], expected)
    assert not torch.equal(alone[0], alone[1]), "two prompts that differ in bits"
    assert set(plan.bits.unique().tolist()) <= set(MENU)
    twice = 2 if name == "flux" else 1
    assert len(watch.calls) == twice * len(timesteps)
    for number, call in enumerate(watch.calls):
        step = plan.timesteps.index(timesteps[number // twice])
        for column, layer in enumerate(plan.layers):
            rows = plan.bits[:, step, column].tolist()
            copies = rows if name == "flux" else rows * 2
            assert call[layer] in (copies, [rows[0]] if len(set(rows)) == 1 else copies), (number, layer)
    assert sum(visits.values()) == len(timesteps), "a guided step counts once, with two rows"
    assert {rows for _, rows in visits} == {2}
    monkeypatch.setattr(pipe, "scheduler", kind(**options))
    assert torch.equal(run(name, pipe, PROMPTS), before), "removed without a trace"


@pytest.mark.parametrize("name", PIPELINES)
def test_images_of_a_prompt_share_its_bits_and_negative_prompts_change_none(
    models: dict[str, tuple[Any, Recipe]], name: str
) -> None:
    pipe, recipe = models[name]
    with apply(pipe, recipe) as controller:
        run(name, pipe, PROMPTS, guided=False, num_images_per_prompt=2)
        plan = controller.plan
        run(name, pipe, PROMPTS, negative_prompt=["ugly", "dull"])
        other = controller.plan
    assert plan is not None
    assert other is not None
    assert plan.prompts == 4
    assert torch.equal(plan.bits[0], plan.bits[1])
    assert torch.equal(plan.bits[2], plan.bits[3])
    assert torch.equal(other.bits, plan.bits[[0, 2]])


@pytest.mark.parametrize("name", PIPELINES)
def test_embeddings_given_directly_have_the_same_bits(
    models: dict[str, tuple[Any, Recipe]], name: str
) -> None:
    pipe, recipe = models[name]
    foreign = encode(pipe, None, PROMPTS)
    with apply(pipe, recipe) as controller:
        run(name, pipe, PROMPTS, guided=False)
        expected = controller.plan
        given = encode(pipe, None, PROMPTS)
        own: dict[str, Any] = {"prompt_embeds": given.states}
        if given.pooled is not None:
            own["pooled_prompt_embeds"] = given.pooled
        run(name, pipe, PROMPTS, guided=False, **own)
        assert controller.plan is not None
        assert expected is not None
        assert torch.equal(controller.plan.bits, expected.bits)
        if given.pooled is None:
            # Of states made elsewhere nothing tells the pooled one.
            with pytest.raises(IncompatibleModelError, match="`prompt_embeds` made elsewhere"):
                run(name, pipe, PROMPTS, guided=False, prompt_embeds=foreign.states + 1e-3)


@pytest.mark.parametrize("name", ["sd", "bk-sdm", "sdxl"])
def test_clip_skip_is_refused_or_changes_no_bits(models: dict[str, tuple[Any, Recipe]], name: str) -> None:
    pipe, recipe = models[name]
    with apply(pipe, recipe) as controller:
        run(name, pipe, PROMPTS)
        expected = controller.plan
        if name != "sdxl":
            if not hasattr(pipe.text_encoder, "text_model"):
                pytest.skip("diffusers' own clip_skip does not work with this transformers")
            with pytest.raises(IncompatibleModelError, match="clip_skip"):
                run(name, pipe, PROMPTS, clip_skip=1)
            return
        run(name, pipe, PROMPTS, clip_skip=1)
        assert controller.plan is not None
        assert expected is not None
        assert torch.equal(controller.plan.bits, expected.bits), "the pooled text is not skipped"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd", StableDiffusionImg2ImgPipeline),
        ("bk-sdm", StableDiffusionImg2ImgPipeline),
        ("sdxl", StableDiffusionXLImg2ImgPipeline),
        ("flux", FluxImg2ImgPipeline),
    ],
)
def test_image_to_image_starts_late_with_the_same_bits(
    models: dict[str, tuple[Any, Recipe]], name: str, kind: Any
) -> None:
    pipe, recipe = models[name]
    parts = {key: part for key, part in pipe.components.items() if part is not None or key != "image_encoder"}
    if name == "flux":
        parts = {
            key: part for key, part in parts.items() if key not in ("feature_extractor", "image_encoder")
        }
    other = kind(**parts) if name != "sdxl" else kind(**parts, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    start = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with apply(other, recipe) as controller:
        options = {
            key: value for key, value in call_options(name).items() if name == "flux" or key == "output_type"
        }
        torch.manual_seed(0)
        other(
            prompt=PROMPTS,
            image=start,
            strength=0.5,
            num_inference_steps=4,
            guidance_scale=1.0,
            **options,
        )
        plan, visits = controller.plan, controller.visits
        assert plan is not None
        expected = [plan_alone(recipe, other, prompt, plan.timesteps) for prompt in PROMPTS]
    assert torch.equal(plan.bits, torch.stack(expected))
    assert sum(visits.values()) == 2


def test_a_pipeline_of_no_family_is_refused_with_the_known_ones() -> None:
    strange = SimpleNamespace(unet=torch.nn.Linear(1, 1))
    with pytest.raises(
        IncompatibleModelError, match=r"its denoiser: unet: Linear; known: sd: a UNet2DCondition"
    ):
        family_of(strange)


def test_families_are_told_apart(models: dict[str, tuple[Any, Recipe]]) -> None:
    found = {name: family_of(pipe).name for name, (pipe, _) in models.items()}
    assert found == {"sd": "sd", "bk-sdm": "sd", "sdxl": "sdxl", "flux": "flux"}
    for pipe, _ in models.values():
        assert sum(family.matches(denoiser_of(pipe)) for family in FAMILIES) == 1


@pytest.mark.parametrize(("pooling", "name"), [("pooled", "sd"), ("eos", "sdxl"), ("eos", "flux")])
def test_a_controller_of_another_pooling_is_refused(
    models: dict[str, tuple[Any, Recipe]], tmp_path: Path, pooling: str, name: str
) -> None:
    pipe, recipe = models[name]
    assert recipe.controller.kind == "qlip"
    made = TextToBits.from_pretrained(recipe.controller.path)
    changed = TextToBits(made.config.model_copy(update={"pooling": pooling}))
    changed.save_pretrained(tmp_path / "other")
    section = recipe.controller.model_copy(update={"path": tmp_path / "other"})
    with pytest.raises(IncompatibleModelError, match="needs a controller with pooling"):
        apply(pipe, recipe.model_copy(update={"controller": section}))


def test_flux_s_calls_are_told_by_their_samples(
    models: dict[str, tuple[Any, Recipe]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts one after the other at each timestep are no guided step; the same prompt twice is."""
    pipe, recipe = models["flux"]
    text = encode(pipe, None, PROMPTS)
    assert text.pooled is not None
    calls = [one_call("flux", pipe) for _ in PROMPTS]
    with apply(pipe, recipe) as controller:
        pipe.scheduler.set_timesteps(2, mu=0.5)
        digests = []
        for t in pipe.scheduler.timesteps:
            for row, call in enumerate(calls):
                call["hidden_states"] = torch.randn(1, *call["hidden_states"].shape[1:])
                call |= {"encoder_hidden_states": text.states[row : row + 1], "timestep": t.reshape(1) / 1000}
                call["txt_ids"] = torch.zeros(text.states.shape[1], 3)
                call |= {"pooled_projections": text.pooled[row : row + 1], "guidance": torch.ones(1)}
                pipe.transformer(**call)
                assert controller.plan is not None
                digests.append(controller.plan.digest())
        assert digests[0] == digests[2] != digests[1] == digests[3]
        run("flux", pipe, PROMPTS, negative_prompt=PROMPTS)
        assert {rows for _, rows in controller.visits} == {2}, "guided away from the prompt itself"


@pytest.mark.parametrize("name", PIPELINES)
def test_encoded_prompts_are_sampled_as_the_pipeline_does(
    models: dict[str, tuple[Any, Recipe]], name: str
) -> None:
    pipe, _ = models[name]
    small = {"height": 16, "width": 16}
    encoded = encode(pipe, None, PROMPTS)
    arguments = text_arguments(pipe, encoded)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    found = pipe(**small, **arguments, generator=generators, **options).images
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipe(**small, prompt=PROMPTS, generator=generators, **options).images
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_table_of_states_does_not_serve_a_family_with_pooled_text(
    models: dict[str, tuple[Any, Recipe]], tmp_path: Path
) -> None:
    pipe, _ = models["sdxl"]
    PromptEmbeddings(("", "a"), torch.zeros(2, 8, 32)).save(tmp_path / "table.safetensors")
    with pytest.raises(IncompatibleModelError, match="passes a pooled embedding, too"):
        encode(pipe, tmp_path / "table.safetensors", ["a"])


def test_coarse_timesteps_are_told_by_the_pipeline_or_refused() -> None:
    flux = next(family for family in FAMILIES if family.name == "flux")
    known = [999.0, 998.0, 500.0]
    coarse = float((torch.tensor(998.0).bfloat16() / 1000) * 1000)
    assert scheduled(flux, coarse, known, torch.bfloat16, 998.0) == 998.0
    near = [1000.0, 998.5, 500.0]
    assert scheduled(flux, 1000.0, near, torch.bfloat16, 998.5) == 998.5, "998.5 is 1000 in bfloat16"
    with pytest.raises(IncompatibleModelError, match="2 that are the same in"):
        scheduled(flux, coarse, known, torch.bfloat16, None)
    half = float((torch.tensor(500.0).bfloat16() / 1000) * 1000)
    assert scheduled(flux, half, known, torch.bfloat16, None) == 500.0
    with pytest.raises(IncompatibleModelError, match="none like it"):
        scheduled(flux, 123.0, known, torch.float32, None)
