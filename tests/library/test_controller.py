"""The controller inside ordinary diffusers pipelines: whose bits, when, and nothing left behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins import BitPlan, apply, load_backend
from qlip_plugins.embeddings import PromptEmbeddings
from qlip_plugins.errors import BitsError, IncompatibleModelError, RecipeError
from qlip_plugins.layers import controlled
from qlip_plugins.recipe import ActivationBits, QlipController, Recipe, StaticController, TableController
from qlip_plugins.state import CalibratedState
from qlip_plugins.text_to_bits import TextToBits, TextToBitsConfig

SHIPPED = "golden-w4a8"
TIMESTEPS = (901.0, 801.0, 701.0, 601.0, 501.0, 401.0, 301.0, 201.0, 101.0, 1.0)


def embeddings(*prompts: str) -> Tensor:
    path = Recipe.load(SHIPPED).model.prompt_embeddings
    assert path is not None
    return PromptEmbeddings.load(path).of(prompts)


def sample(pipe: Any, *prompts: str, seed: int = 0, **options: Any) -> Tensor:
    """Latents of some rows of the golden text table, each with a noise of its own."""
    noise = [torch.Generator().manual_seed(hash_of(prompt) + seed) for prompt in prompts]
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent", "generator": noise}
    latents: Tensor = pipe(
        prompt_embeds=embeddings(*prompts),
        negative_prompt_embeds=embeddings(*[""] * len(prompts)),
        **(settings | options),
    ).images
    return latents


def hash_of(prompt: str) -> int:
    return int(prompt.split()[1]) * 1000


def changed(**sections: Any) -> Recipe:
    return Recipe.load(SHIPPED).model_copy(update=sections)


STATIC = {"controller": StaticController(kind="static", bits="base")}


def test_plan_and_report(model: GoldenModel) -> None:
    pipe = model.pipe()
    with apply(pipe, SHIPPED) as controller:
        assert controller.plan is None
        with pytest.raises(BitsError, match="nothing has been generated"):
            controller.report()
        sample(pipe, "row 12", "row 21")
        plan, report = controller.plan, controller.report()
    assert plan is not None
    assert plan.bits.shape == (2, 10, 65)
    assert plan.timesteps == TIMESTEPS
    assert set(plan.bits.unique().tolist()) == {8, 16, 32}
    assert (report.calls, report.steps) == (11, 10)  # PNDM visits its second timestep twice
    assert [cost.fab for cost in report.prompts] == pytest.approx(plan.fab())
    low, high = report.prompts
    assert low.quality is not None
    assert high.quality is not None
    assert low.quality < high.quality
    assert low.fab is not None
    assert high.fab is not None
    assert low.fab < high.fab
    assert report.mean.fab == pytest.approx((low.fab + high.fab) / 2)
    assert low.bitops_paper < high.bitops_paper < high.bitops_full
    assert "K = 65 controlled quantizers" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["bitops_are"].startswith("simulated")


def test_the_base_plan_is_the_installed_base(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    """A controller pinned to base bits changes nothing: difference 0."""
    pipe = model.pipe()
    quantizers = load_backend("torch").install(pipe.unet, states["w4a8"])
    alone = sample(pipe, "row 3", "row 4")
    quantizers.remove()
    with apply(pipe, changed(**STATIC)) as controller:
        steered = sample(pipe, "row 3", "row 4")
        assert controller.report().prompts[0].fab == 8.0
    assert torch.equal(alone, steered)


def test_mixed_prompts_do_not_touch_each_other(model: GoldenModel, tmp_path: Path) -> None:
    """Row i of a mixed batch equals row i of the batch where all rows follow prompt i's plan."""
    pipe = model.pipe()
    prompts = ("row 12", "row 21", "row 5", "row 40")
    with apply(pipe, SHIPPED) as controller:
        mixed = sample(pipe, *prompts)
        plan = controller.plan
    assert plan is not None
    assert len({plan.bits[i].numpy().tobytes() for i in range(4)}) > 1
    for index in range(4):
        path = tmp_path / f"{index}.safetensors"
        BitPlan(plan.bits[index : index + 1], plan.timesteps, plan.layers).save(path)
        with apply(pipe, changed(controller=TableController(kind="table", plan=path))):
            alone = sample(pipe, *prompts)
        assert torch.equal(mixed[index], alone[index]), prompts[index]


def test_decisions_are_the_prompt_s_own(model: GoldenModel) -> None:
    """At every batch size and order a prompt has the same bits."""
    pipe = model.pipe()
    prompts = [f"row {row}" for row in (12, 21, 5, 40, 53)]
    found: dict[str, set[bytes]] = {prompt: set() for prompt in prompts}
    with apply(pipe, SHIPPED) as controller:
        for batch in ([p] for p in prompts):
            sample(pipe, *batch, num_inference_steps=4)
            _note(found, batch, controller.plan)
        for batch in (prompts, prompts[::-1], prompts[1:4], [prompts[0]] * 3):
            sample(pipe, *batch, num_inference_steps=4)
            _note(found, batch, controller.plan)
    assert all(len(decisions) == 1 for decisions in found.values())


def _note(found: dict[str, set[bytes]], batch: list[str], plan: BitPlan | None) -> None:
    assert plan is not None
    for index, prompt in enumerate(batch):
        found[prompt].add(plan.bits[index].numpy().tobytes())


def test_a_plan_is_made_once_a_generation(model: GoldenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = model.pipe()
    calls: list[int] = []
    original = TextToBits.plan

    def counted(self: TextToBits, z: Tensor, *more: Any) -> BitPlan:
        calls.append(len(z))
        return original(self, z, *more)

    monkeypatch.setattr(TextToBits, "plan", counted)
    with apply(pipe, SHIPPED):
        sample(pipe, "row 1", "row 2")
        assert calls == [2]
        sample(pipe, "row 1", "row 2", seed=1)
        assert calls == [2, 2]


def test_guidance_halves_share_bits_and_images_share_their_prompt_s(model: GoldenModel) -> None:
    pipe = model.pipe()
    seen: list[Any] = []
    with apply(pipe, SHIPPED) as controller:
        layer: Any = controller.quantizers["down_blocks.0.resnets.0.conv1"]
        original = layer.set_bits

        def set_bits(bits: Any) -> None:
            seen.append(bits)
            original(bits)

        layer.set_bits = set_bits
        sample(pipe, "row 12", "row 21")
        guided = [bits for bits in seen if isinstance(bits, Tensor)]
        assert guided
        assert all(torch.equal(bits[:2], bits[2:]) for bits in guided)
        noise = [torch.Generator().manual_seed(i) for i in range(4)]
        sample(pipe, "row 12", "row 21", num_images_per_prompt=2, generator=noise)
        plan = controller.plan
    assert plan is not None
    assert plan.bits.shape[0] == 4
    assert torch.equal(plan.bits[0], plan.bits[1])
    assert torch.equal(plan.bits[2], plan.bits[3])


def test_without_guidance(model: GoldenModel) -> None:
    pipe = model.pipe()
    with apply(pipe, SHIPPED) as controller:
        sample(pipe, "row 12", "row 21")
        guided, cost = controller.plan, controller.report().prompts[0]
        sample(pipe, "row 12", "row 21", guidance_scale=1.0)
        alone, cost_alone = controller.plan, controller.report().prompts[0]
    assert guided is not None
    assert alone is not None
    assert guided.digest() == alone.digest()
    assert cost.bitops_full == pytest.approx(2 * cost_alone.bitops_full)
    assert cost.bitops_paper == pytest.approx(cost_alone.bitops_paper)


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (PNDMScheduler, 11),
        (DDIMScheduler, 10),
        (EulerDiscreteScheduler, 10),
        (HeunDiscreteScheduler, 19),
        (DPMSolverMultistepScheduler, 10),
    ],
)
def test_schedulers(model: GoldenModel, scheduler: Any, calls: int) -> None:
    """At every call each handle has the bits that the plan gives the call's own timestep."""
    pipe = model.pipe()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with apply(pipe, SHIPPED) as controller:
        layers = {name: _Recorder(controller.quantizers[name]) for name in FEW_LAYERS}
        seen: list[tuple[float, dict[str, Any]]] = []

        def look(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            seen.append((float(args[1]), {name: layer.bits for name, layer in layers.items()}))

        hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)  # after the controller's
        latents = sample(pipe, "row 12", "row 21")
        hook.remove()
        report, plan = controller.report(), controller.plan
    assert plan is not None
    assert torch.isfinite(latents).all()
    assert len(seen) == report.calls == calls
    assert report.steps == len(plan.timesteps) == 10
    assert {t for t, _ in seen} == set(plan.timesteps)
    for timestep, bits in seen:
        for name, found in bits.items():
            expected = plan.bits[:, plan.timesteps.index(timestep), plan.layers.index(name)].tolist()
            assert found == expected * 2, (timestep, name)
    assert len({tuple(bits[FEW_LAYERS[0]]) for _, bits in seen}) > 1, "the plan varies over the steps"


FEW_LAYERS = ("mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv2")


class _Recorder:
    """Remembers what was last set on a handle, as a list of four rows."""

    def __init__(self, handle: Any) -> None:
        self.bits: list[int] = []
        original = handle.set_bits

        def set_bits(bits: Any) -> None:
            self.bits = bits.tolist() if isinstance(bits, Tensor) else [bits] * 4
            original(bits)

        handle.set_bits = set_bits


def test_attach_and_detach_a_hundred_times(model: GoldenModel) -> None:
    pipe = model.pipe()
    before = sample(pipe, "row 7")
    weights = {name: (id(p), p.clone()) for name, p in pipe.unet.named_parameters()}
    hooks = _hooks(pipe.unet)
    processors = dict(pipe.unet.attn_processors)
    recipe = Recipe.load(SHIPPED)
    for _ in range(100):
        apply(pipe, recipe).remove()
    assert _hooks(pipe.unet) == hooks
    assert pipe.unet.attn_processors == processors
    for name, parameter in pipe.unet.named_parameters():
        assert id(parameter) == weights[name][0]
        assert torch.equal(parameter, weights[name][1])
    assert torch.equal(sample(pipe, "row 7"), before)


def _hooks(unet: torch.nn.Module) -> int:
    return sum(
        len(value)
        for module in unet.modules()
        for key, value in vars(module).items()
        if key.endswith(("_hooks", "_with_kwargs")) and isinstance(value, dict)
    )


def test_an_error_inside_the_block_still_detaches(model: GoldenModel) -> None:
    pipe = model.pipe()
    before = sample(pipe, "row 7")
    with pytest.raises(KeyboardInterrupt), apply(pipe, SHIPPED):
        raise KeyboardInterrupt
    assert torch.equal(sample(pipe, "row 7"), before)


def test_a_copy_of_a_steered_denoiser_refuses_to_run(model: GoldenModel) -> None:
    pipe = model.pipe()
    with apply(pipe, SHIPPED):
        copied = copy.deepcopy(pipe.unet)
        with pytest.raises(IncompatibleModelError, match="is a copy of one that a recipe steers"):
            copied(**model.call(0))


def test_static_widths_and_the_base_differ(model: GoldenModel) -> None:
    pipe = model.pipe()
    latents = {}
    for bits in ("base", 16, 32):
        recipe = changed(controller=StaticController.model_validate({"kind": "static", "bits": bits}))
        with apply(pipe, recipe) as controller:
            latents[bits] = sample(pipe, "row 3")
            assert controller.report().prompts[0].fab == (8 if bits == "base" else bits)
    assert not torch.equal(latents["base"], latents[16])
    assert not torch.equal(latents[16], latents[32])


def test_attention_operands_join_k_when_the_recipe_says_so(model: GoldenModel) -> None:
    pipe = model.pipe()
    recipe = changed(attention="controlled", controller=StaticController(kind="static", bits=16))
    with apply(pipe, recipe) as controller:
        sample(pipe, "row 3", num_inference_steps=3)
        assert controller.report().controlled["attention_operand"] == 32


def test_keeping_the_calibrated_range_reports_what_it_loses(model: GoldenModel) -> None:
    from qlip_plugins.recipe import RangesSection

    pipe = model.pipe()
    recipe = changed(
        ranges=RangesSection(keep_calibrated=True), controller=StaticController(kind="static", bits=4)
    )
    with apply(pipe, recipe) as controller:
        sample(pipe, "row 3", num_inference_steps=3)
        report = controller.report()
    losses = report.range_losses["down_blocks.0.resnets.0.conv1"][4]
    assert 0 <= losses["clipped"] < 0.1
    assert 0 < losses["zeroed"] < 1
    assert "calibrated ranges kept at 4 bits" in str(report)


def test_a_width_that_would_lose_the_signal_is_an_error(
    model: GoldenModel, edited: Callable[..., Path]
) -> None:
    """A W4A16 file whose steps training blew up: 8 bits inside such ranges are noise, so it is said."""

    def blow_up(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "act_quantizer" in name and name.endswith("delta") and "_w." not in name:
                tensor.mul_(13)  # to 2e-3, as far as training at the default rate was seen to drive them

    base = Recipe.load(SHIPPED).base.model_copy(
        update={"checkpoint": edited("w4a16", blow_up), "activation_bits": 16}
    )
    pipe = model.pipe()
    recipe = changed(base=base, ranges=None, controller=StaticController(kind="static", bits=8))
    before = sample(pipe, "row 3")
    with (
        pytest.raises(BitsError, match=r"8 bits inside the calibrated range .* lose"),
        apply(pipe, recipe),
    ):
        sample(pipe, "row 3")
    assert torch.equal(sample(pipe, "row 3"), before)


REFUSED: dict[str, tuple[Callable[[], Recipe], str]] = {
    "another base's controller": (
        lambda: changed(base=Recipe.load(SHIPPED).base.model_copy(update={"activation_bits": None})),
        "quantizes no activations",
    ),
    "another menu": (
        lambda: changed(activation_bits=ActivationBits(low=4, medium=8, high=32)),
        "made for the widths",
    ),
    "attention now controlled": (
        lambda: changed(attention="controlled"),
        "was `attention:` or `time_layers:` changed",
    ),
    "a static width without a range": (
        lambda: changed(controller=StaticController(kind="static", bits=5)),
        "no range of .* for 5 bits",
    ),
}


@pytest.mark.parametrize(("recipe", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_belong_together_is_refused(
    model: GoldenModel, recipe: Callable[[], Recipe], message: str
) -> None:
    pipe = model.pipe()
    hooks = _hooks(pipe.unet)
    with pytest.raises(IncompatibleModelError, match=message):
        apply(pipe, recipe())
    assert _hooks(pipe.unet) == hooks


def test_ranges_of_another_base_are_refused(model: GoldenModel, golden: Path) -> None:
    base = Recipe.load(SHIPPED).base.model_copy(
        update={"checkpoint": golden / "qdiffusion/w8a8/ckpt.pth", "weight_bits": 8, "softmax_bits": 8}
    )
    with pytest.raises(IncompatibleModelError, match="fitted on the base"):
        apply(model.pipe(), changed(base=base, **STATIC))


def test_a_table_must_cover_the_schedule(model: GoldenModel, tmp_path: Path) -> None:
    layer = "down_blocks.0.resnets.0.conv1"
    path = tmp_path / "plan.safetensors"
    BitPlan(torch.full((1, 2, 1), 16, dtype=torch.uint8), (901.0, 801.0), (layer,)).save(path)
    pipe = model.pipe()
    with (
        pytest.raises(BitsError, match="timestep 701 is not in the plan"),
        apply(pipe, changed(controller=TableController(kind="table", plan=path))),
    ):
        sample(pipe, "row 1")
    BitPlan(torch.full((1, 2, 1), 16, dtype=torch.uint8), (901.0, 801.0), ("nowhere",)).save(path)
    with pytest.raises(IncompatibleModelError, match="that this base has not: nowhere"):
        apply(pipe, changed(controller=TableController(kind="table", plan=path)))


def test_pipelines_without_a_unet_are_refused() -> None:
    with pytest.raises(
        IncompatibleModelError, match=r"of no family that this version steers .its denoiser: none"
    ):
        apply(object(), SHIPPED)


def test_a_pipeline_that_does_not_say_whether_it_guides_is_refused(model: GoldenModel) -> None:
    """Else the empty prompt's half would be decided as prompts of its own."""

    class Silent(StableDiffusionPipeline):  # type: ignore[misc]
        @property
        def do_classifier_free_guidance(self) -> bool:
            raise AttributeError

    pipe = model.pipe()
    pipe.__class__ = Silent
    pipe.scheduler.set_timesteps(10)
    with (
        apply(pipe, SHIPPED),
        torch.no_grad(),
        pytest.raises(IncompatibleModelError, match="does not say whether"),
    ):
        pipe.unet(torch.zeros(2, 4, 8, 8), 901, encoder_hidden_states=embeddings("row 1", "row 2"))
    with apply(pipe, changed(**STATIC)), torch.no_grad():  # a fixed plan needs no telling
        pipe.unet(torch.zeros(2, 4, 8, 8), 901, encoder_hidden_states=embeddings("row 1", "row 2"))


def test_another_pipeline_on_the_same_unet_is_refused(model: GoldenModel) -> None:
    """The steered pipeline's guidance is stale then; the rows of the call show it."""
    pipe = model.pipe()
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with apply(pipe, SHIPPED):
        with pytest.raises(IncompatibleModelError, match="Apply the recipe to the pipeline that you call"):
            sample(other, "row 1", "row 2")
        sample(pipe, "row 1", "row 2", guidance_scale=1.0)
        with pytest.raises(
            IncompatibleModelError, match=r"says that guidance is False, the two halves .* are equal"
        ):
            sample(other, "row 1", "row 2")
        sample(pipe, "row 1", "row 2")
        with pytest.raises(
            IncompatibleModelError, match=r"says that guidance is True, the two halves .* are not equal"
        ):
            sample(other, "row 1", "row 2", guidance_scale=1.0)


def test_prompts_may_share_their_noise(model: GoldenModel) -> None:
    """Without guidance equal halves are then two prompts, not one prompt's two halves."""
    pipe = model.pipe()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    with apply(pipe, SHIPPED) as controller:
        sample(pipe, "row 12", "row 21", latents=noise, guidance_scale=1.0)
        alone = controller.plan
        sample(pipe, "row 12", "row 21", latents=noise)
        guided = controller.plan
    assert alone is not None
    assert guided is not None
    assert alone.prompts == guided.prompts == 2
    assert alone.digest() == guided.digest()


def test_a_second_recipe_is_refused_by_name(model: GoldenModel) -> None:
    pipe = model.pipe()
    with apply(pipe, SHIPPED), pytest.raises(IncompatibleModelError, match=r"a recipe is applied .* already"):
        apply(pipe, SHIPPED)


def test_a_unet_called_before_its_schedule_says_so(model: GoldenModel) -> None:
    pipe = model.pipe()
    pipe.scheduler.timesteps = None
    with apply(pipe, changed(**STATIC)), pytest.raises(IncompatibleModelError, match="has no timesteps yet"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 901, encoder_hidden_states=embeddings("row 1"))


def test_the_global_random_numbers_are_not_touched(model: GoldenModel, tmp_path: Path) -> None:
    """With the global generator and a noisy scheduler, QLIP's latent is that of its plan as a table."""
    pipe = model.pipe()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(0)
    with apply(pipe, SHIPPED) as controller:
        steered = sample(pipe, "row 12", generator=None)
        plan = controller.plan
        before = torch.get_rng_state()
        controller.report()
        assert torch.equal(torch.get_rng_state(), before)
    assert plan is not None
    plan.save(tmp_path / "plan.safetensors")
    torch.manual_seed(0)
    with apply(pipe, changed(controller=TableController(kind="table", plan=tmp_path / "plan.safetensors"))):
        assert torch.equal(sample(pipe, "row 12", generator=None), steered)


def test_guidance_that_a_callback_ends(model: GoldenModel) -> None:
    """The usual recipe for faster sampling: the text states change in mid-run, the generation does not."""

    def end_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    pipe = model.pipe()
    with apply(pipe, SHIPPED) as controller:
        sample(pipe, "row 12", "row 21")
        whole = controller.report()
        sample(
            pipe,
            "row 12",
            "row 21",
            callback_on_step_end=end_guidance,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        report = controller.report()
    assert (report.calls, report.steps) == (11, 10)
    assert report.mean.bitops_paper == pytest.approx(whole.mean.bitops_paper)
    assert 0.5 * whole.mean.bitops_full < report.mean.bitops_full < whole.mean.bitops_full


def test_calls_with_controlnet_residuals_can_be_reported(model: GoldenModel) -> None:
    pipe = model.pipe()
    states = embeddings("row 12")
    with apply(pipe, SHIPPED) as controller, torch.no_grad():
        pipe._guidance_scale = 1.0
        pipe.scheduler.set_timesteps(10)
        sizes = [(12, 8), (12, 8), (12, 4), (24, 4)]
        residuals = tuple(torch.zeros(1, channels, size, size) for channels, size in sizes)
        pipe.unet(
            torch.zeros(1, 4, 8, 8),
            pipe.scheduler.timesteps[0],
            encoder_hidden_states=states,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=torch.zeros(1, 24, 4, 4),
        )
        assert controller.report().calls == 1


def test_a_static_base_needs_no_ranges(
    model: GoldenModel, states: dict[str, CalibratedState], tmp_path: Path
) -> None:
    """A table of other widths does not stand in the way of a plan that uses none of them."""
    from qlip_plugins.grids import Ranges
    from qlip_plugins.recipe import RangesSection

    Ranges(fingerprint=states["w4a8"].fingerprint).save(tmp_path / "r.safetensors")
    recipe = changed(ranges=RangesSection(table=tmp_path / "r.safetensors"), attention="controlled", **STATIC)
    with apply(model.pipe(), recipe):
        pass


@pytest.mark.parametrize("case", ["w4a8", "w8a8", "w4a16"])
def test_sound_ranges_serve_other_widths(
    model: GoldenModel, states: dict[str, CalibratedState], case: str
) -> None:
    """No false alarm on the genuine files, down to 4 bits."""
    unet = model.unet()
    quantizers = load_backend("torch").install(unet, states[case])
    for bits in (4, 5, 6, 10, 16, 24, 31):
        for quantizer in quantizers.values():
            quantizer.set_bits(bits)
        for index in range(6):
            with torch.no_grad():
                assert torch.isfinite(unet(**model.call(index)).sample).all()


def test_kept_ranges_are_reported_without_being_asked_for(model: GoldenModel) -> None:
    pipe = model.pipe()
    recipe = changed(ranges=None, controller=StaticController(kind="static", bits=16))
    with apply(pipe, recipe) as controller:
        sample(pipe, "row 3", num_inference_steps=3)
        assert "calibrated ranges kept at 16 bits" in str(controller.report())


def test_a_run_that_starts_late_counts_the_steps_it_takes(model: GoldenModel) -> None:
    """As img2img does: the schedule is whole, the calls are its second half."""
    pipe = model.pipe()
    states = embeddings("row 12")
    with apply(pipe, SHIPPED) as controller, torch.no_grad():
        pipe._guidance_scale = 1.0
        pipe.scheduler.set_timesteps(10)
        for timestep in pipe.scheduler.timesteps[6:]:
            pipe.unet(torch.zeros(1, 4, 8, 8), timestep, encoder_hidden_states=states)
        report, plan = controller.report(), controller.plan
    assert plan is not None
    assert (report.calls, report.steps) == (5, 5)
    late = plan.bits[0, 5:].double()
    assert report.prompts[0].fab == pytest.approx(float(late.mean()))
    assert plan.fab()[0] > float(late.mean())


def test_unknown_recipes_are_named() -> None:
    with pytest.raises(RecipeError, match="did you mean 'golden-w4a8'"):
        apply(object(), "golden-w4a")


PROMPTS = ["a cat", "dog on a hill", "z", "", "q w e r t y u i o p a s d"]

# --- a pipeline with a text encoder --------------------------------------------------------------


@pytest.fixture
def texted(text_pipe: Any, tmp_path: Path) -> tuple[Any, Recipe]:
    """The pipeline with a text encoder, and a controller on its pooled state."""
    pipe, tokenizer, encoder = text_pipe, text_pipe.tokenizer, text_pipe.text_encoder
    shipped = Recipe.load(SHIPPED)
    assert isinstance(shipped.controller, QlipController)
    old = TextToBits.from_pretrained(shipped.controller.path)
    config = TextToBitsConfig.model_validate(
        {**old.config.model_dump(), "pooling": "eos", "menu": old.config.menu}
    )
    torch.manual_seed(1)
    new = TextToBits(config)
    new.q2b.load_state_dict(old.q2b.state_dict())
    with torch.no_grad():
        tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        raw = new.t2q(encoder(tokens).pooler_output)
        last: Any = new.t2q.layers[-1]
        last.weight.div_(raw.max() - raw.min())
        last.bias.sub_(raw.min()).div_(raw.max() - raw.min())
    new.save_pretrained(tmp_path / "controller")
    return pipe, changed(controller=QlipController(kind="qlip", path=tmp_path / "controller"))


def text_sample(pipe: Any, prompts: list[str], **options: Any) -> Tensor:
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    latents: Tensor = pipe(prompts, **(settings | options)).images
    return latents


def test_prompts_as_text(texted: tuple[Any, Recipe]) -> None:
    pipe, recipe = texted
    found: dict[str, set[bytes]] = {prompt: set() for prompt in PROMPTS}
    with apply(pipe, recipe) as controller:
        for batch in ([p] for p in PROMPTS):
            text_sample(pipe, batch)
            _note(found, batch, controller.plan)
        for batch in (PROMPTS, PROMPTS[::-1], PROMPTS[:2]):
            text_sample(pipe, batch, negative_prompt=["b"] * len(batch))
            _note(found, batch, controller.plan)
    assert all(len(decisions) == 1 for decisions in found.values())
    assert len(set.union(*found.values())) > 1


def test_z_is_the_pooled_state(texted: tuple[Any, Recipe]) -> None:
    pipe, recipe = texted
    with apply(pipe, recipe) as controller:
        text_sample(pipe, ["a cat"])
        plan = controller.plan
    tokens = pipe.tokenizer(["a cat"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = pipe.text_encoder(tokens).pooler_output
    assert isinstance(recipe.controller, QlipController)
    assert plan is not None
    expected = TextToBits.from_pretrained(recipe.controller.path).plan(pooled, plan.timesteps)
    assert plan.quality == expected.quality
    assert plan.digest() == expected.digest()


def test_embeddings_encoded_beforehand_are_recognised(texted: tuple[Any, Recipe]) -> None:
    pipe, recipe = texted
    with apply(pipe, recipe) as controller:
        text_sample(pipe, ["a cat"])
        expected = controller.plan
        states, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
        for _ in range(2):
            pipe(
                prompt_embeds=states,
                negative_prompt_embeds=negative,
                num_inference_steps=3,
                guidance_scale=3.0,
                output_type="latent",
            )
            assert controller.plan is not None
            assert expected is not None
            assert controller.plan.digest() == expected.digest()


def test_embeddings_from_elsewhere_are_refused(texted: tuple[Any, Recipe]) -> None:
    pipe, recipe = texted
    states = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    with apply(pipe, recipe):
        text_sample(pipe, ["a cat"])
        with pytest.raises(
            IncompatibleModelError, match="are not those that the pipeline's text encoder gave"
        ):
            pipe(
                prompt_embeds=states,
                negative_prompt_embeds=states,
                num_inference_steps=3,
                output_type="latent",
            )


def test_the_text_encoder_is_left_as_it_was(texted: tuple[Any, Recipe]) -> None:
    pipe, recipe = texted
    hooks = _hooks(pipe.text_encoder)
    with apply(pipe, recipe):
        assert _hooks(pipe.text_encoder) > hooks
    assert _hooks(pipe.text_encoder) == hooks


def test_k_of_the_shipped_controller(states: dict[str, CalibratedState]) -> None:
    shipped = Recipe.load(SHIPPED)
    assert isinstance(shipped.controller, QlipController)
    config = TextToBits.from_pretrained(shipped.controller.path).config
    assert config.layers == controlled(states["w4a8"].activations, attention=False)
    assert config.base_fingerprint == states["w4a8"].fingerprint
    assert "not trained" in config.origin


def test_half_precision_pipelines_can_be_reported(model: GoldenModel) -> None:
    pipe = model.pipe()
    with apply(pipe, SHIPPED) as controller:
        sample(pipe, "row 12")
        expected = controller.report()
    pipe = pipe.to(torch.bfloat16)
    with apply(pipe, SHIPPED) as controller:
        states = embeddings("row 12", "").to(torch.bfloat16)
        pipe(
            prompt_embeds=states[:1],
            negative_prompt_embeds=states[1:],
            num_inference_steps=10,
            guidance_scale=3.0,
            output_type="latent",
        )
        report = controller.report()
    assert report.mean.bitops_full == pytest.approx(expected.mean.bitops_full, rel=0.05)


def test_a_table_of_several_prompts_gives_each_its_own(model: GoldenModel, tmp_path: Path) -> None:
    pipe = model.pipe()
    path = tmp_path / "plan.safetensors"
    with apply(pipe, SHIPPED) as controller:
        steered = sample(pipe, "row 12", "row 21")
        assert controller.plan is not None
        controller.plan.save(path)
    with apply(pipe, changed(controller=TableController(kind="table", plan=path))):
        assert torch.equal(sample(pipe, "row 12", "row 21"), steered)
        with pytest.raises(BitsError, match="the plan holds 2 prompts, the batch 3"):
            sample(pipe, "row 12", "row 21", "row 5")
