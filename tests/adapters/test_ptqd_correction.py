"""The correction of the sampler: collecting its statistics, and the recipe's `correction:` section."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from qlip_plugins import BitPlan, load_backend, load_base_quantizer
from qlip_plugins.adapter import CorrectionFit, load_correction
from qlip_plugins.cli import main
from qlip_plugins.controller import apply, load_base, load_ranges
from qlip_plugins.embeddings import PromptEmbeddings
from qlip_plugins.errors import (
    AdapterNotFoundError,
    ArtefactError,
    BitsError,
    IncompatibleModelError,
    QlipError,
    RecipeError,
)
from qlip_plugins.generation import Settings, load_pipeline, noise_seeds, sample
from qlip_plugins.grids import Ranges
from qlip_plugins.layers import controlled
from qlip_plugins.recipe import ActivationBits, RangesSection, Recipe, StaticController, TableController
from qlip_ptqd import CorrectedDDIMScheduler, CorrectionStatistics, PTQDCorrectionConfig, statistics_of_errors
from qlip_ptqd.collecting import Collector, leading
from qlip_ptqd.following import interpolation
from qlip_ptqd.scheduler import corrected as corrected_scheduler
from qlip_ptqd.scheduler import schedule_facts
from qlip_ptqd.statistics import StepStatistics, Validity

SETTINGS = Settings(steps=4, guidance_scale=3.0)
TIMESTEPS = (1, 251, 501, 751)
# One of them comes twice, so that it meets another noise.
PROMPTS = ("row 0", "row 1", "row 0")


def golden_recipe(**update: Any) -> Recipe:
    return Recipe.load("golden-w4a8").model_copy(update=update)


def static(bits: Any, **update: Any) -> Recipe:
    return golden_recipe(controller=StaticController(kind="static", bits=bits), **update)


def base(golden: Path, case: str, **options: Any) -> Any:
    config: Any = load_base_quantizer("qdiffusion").config_class
    return config(checkpoint=golden / "qdiffusion" / case / "ckpt.pth", **options)


def weights_only(golden: Path) -> Recipe:
    return static("base", base=base(golden, "w4"), ranges=None)


def corrected(recipe: Recipe, statistics: Path) -> Recipe:
    return recipe.model_copy(update={"correction": PTQDCorrectionConfig(statistics=statistics)})


def fit(
    folder: Path,
    recipe: Recipe | None = None,
    settings: Settings = SETTINGS,
    prompts: Sequence[str] = PROMPTS,
    batch: int = 3,
    own_plan: bool = False,
) -> Path:
    """Collect into `folder`; returns the file."""
    out = folder / "statistics.safetensors"
    what = CorrectionFit(
        recipe=recipe or golden_recipe(),
        prompts=prompts,
        settings=settings,
        own_plan=own_plan,
        batch=batch,
        work=folder / "work",
        out=out,
    )
    load_correction("ptqd").fit(what, lambda remark: None)
    return out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the golden recipe at every width of its menu."""
    return fit(tmp_path_factory.mktemp("correction"))


@pytest.fixture(scope="module")
def statistics(file: Path) -> CorrectionStatistics:
    return CorrectionStatistics.load(file)


@pytest.fixture
def pipe() -> Any:
    return load_pipeline(golden_recipe())


def run(pipe: Any, recipe: Recipe, settings: Settings = SETTINGS, prompts: Sequence[str] = PROMPTS) -> Tensor:
    latents: Tensor = sample(pipe, recipe, prompts, settings)
    return latents


@contextmanager
def unchanged(pipe: Any) -> Iterator[None]:
    """The pipeline is afterwards what it was."""
    scheduler, processors = pipe.scheduler, dict(pipe.unet.attn_processors)
    before = run(pipe, golden_recipe(), prompts=["row 5"])
    yield
    assert pipe.scheduler is scheduler
    assert pipe.unet.attn_processors == processors
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    assert torch.equal(run(pipe, golden_recipe(), prompts=["row 5"]), before)


def difference(first: StepStatistics, second: StepStatistics) -> float:
    """Greatest absolute difference of slopes, deviations and biases."""
    assert first.timesteps == second.timesteps
    parts = ("slope", "deviation", "bias")
    return max(float((getattr(first, name) - getattr(second, name)).abs().max()) for name in parts)


# collecting


@torch.no_grad()
def by_hand(pipe: Any, recipe: Recipe, width: int) -> StepStatistics:
    """What the collector does, as a plain loop: one trajectory, both models called at its samples."""
    assert recipe.model.prompt_embeddings is not None
    table = PromptEmbeddings.load(recipe.model.prompt_embeddings)
    context = torch.cat([table.of([""] * len(PROMPTS)), table.of(PROMPTS)])
    noise = [
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for seed in noise_seeds(PROMPTS, SETTINGS.seed)
    ]
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    ddim.set_timesteps(SETTINGS.steps)

    def guided(x: Tensor, timestep: Tensor) -> Tensor:
        unconditional, conditional = pipe.unet(torch.cat([x, x]), timestep, context).sample.chunk(2)
        guided: Tensor = unconditional + SETTINGS.guidance_scale * (conditional - unconditional)
        return guided

    x, trajectory, exact = torch.cat(noise), [], []
    for timestep in ddim.timesteps:
        trajectory.append(x)
        exact.append(guided(x, timestep))
        x = ddim.step(exact[-1], timestep, x, eta=0.0).prev_sample
    state = load_base(recipe, pipe.unet)
    quantizers = load_backend("torch").install(pipe.unet, state, load_ranges(recipe.ranges, state))
    for name in controlled(state.activations, attention=False):
        quantizers[name].set_bits(width)
    errors = [
        (prediction, guided(x, timestep) - prediction, timestep.repeat(len(PROMPTS)))
        for timestep, x, prediction in zip(ddim.timesteps, trajectory, exact, strict=True)
    ]
    quantizers.remove()
    return statistics_of_errors(errors)


@pytest.mark.parametrize("width", [8, 16, 32])
def test_the_statistics_are_those_of_a_plain_loop(
    pipe: Any, statistics: CorrectionStatistics, width: int
) -> None:
    found, expected = statistics.widths[width], by_hand(pipe, golden_recipe(), width)
    assert found.timesteps == TIMESTEPS
    assert float(expected.deviation.min()) > 1e-4, "there is an error to speak of"
    assert difference(found, expected) < 1e-6


def test_what_they_hold_for_is_written_down(pipe: Any, statistics: CorrectionStatistics) -> None:
    recipe, validity = golden_recipe(), statistics.validity
    state = load_base(recipe, pipe.unet)
    assert tuple(statistics.widths) == (8, 16, 32)
    assert statistics.prompts == 3
    assert validity.base_fingerprint == state.fingerprint
    assert validity.ranges_digest == load_ranges(recipe.ranges, state).digest()
    assert (validity.attention, validity.plan) == ("base", None)
    assert (validity.guidance_scale, validity.steps) == (3.0, 4)
    assert validity.schedule is not None
    assert (validity.schedule["beta_end"], validity.schedule["steps_offset"]) == (0.012, 1)


def test_more_bits_leave_less_error(statistics: CorrectionStatistics) -> None:
    deviation = {width: float(found.deviation.mean()) for width, found in statistics.widths.items()}
    assert deviation[8] > deviation[16] > 0.99 * deviation[32]


def test_prompts_at_a_time_do_not_matter(golden: Path, tmp_path: Path) -> None:
    recipe = weights_only(golden)
    one, three = (
        CorrectionStatistics.load(fit(tmp_path / str(batch), recipe, batch=batch)) for batch in (1, 3)
    )
    assert one.validity == three.validity
    assert difference(one.widths[32], three.widths[32]) < 1e-5


def test_prompts_at_a_time_hardly_matter_to_quantized_activations(
    statistics: CorrectionStatistics, tmp_path: Path
) -> None:
    """Their rounding can make a whole step of a difference in the last bit."""
    single = CorrectionStatistics.load(fit(tmp_path, batch=1))
    assert single.validity == statistics.validity
    for width, found in statistics.widths.items():
        assert difference(single.widths[width], found) < 0.2 * float(found.deviation.mean())


def test_an_interrupted_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = fit(whole, batch=1).read_bytes()
    assert [path.name for path in whole.iterdir()] == ["statistics.safetensors"], "the work folder is gone"
    original, begun = Collector.collect, []

    def interrupted(self: Collector, what: CorrectionFit, first: int, done: Any) -> Any:
        begun.append(first)
        if begun == [0, 1]:
            # Amid a batch, with the quantized model installed.
            raise KeyboardInterrupt
        return original(self, what, first, done)

    monkeypatch.setattr(Collector, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(parts, batch=1)
    assert {path.name for path in (parts / "work").iterdir()} == {"work.json", "prompts-000000.safetensors"}
    assert fit(parts, batch=1).read_bytes() == expected
    assert begun == [0, 1, 1, 2], "nothing is done twice"
    assert [path.name for path in parts.iterdir()] == ["statistics.safetensors"]


def test_the_pipeline_is_itself_again_when_a_batch_fails(pipe: Any) -> None:
    """A quantized run that breaks leaves neither the base nor the leading scheduler behind."""
    recipe = golden_recipe()
    collector = Collector(pipe, recipe, load_base(recipe, pipe.unet), {"8": static(8), "5": static(5)})
    what = CorrectionFit(recipe, PROMPTS, SETTINGS, False, 1, Path("work"), Path("out"))
    with unchanged(pipe), pytest.raises(IncompatibleModelError, match="for 5 bits"):
        collector.collect(what, 0, lambda text: None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": replace(SETTINGS, guidance_scale=5.0)}, "settings.guidance_scale: 3.0, now 5.0"),
        ({"settings": replace(SETTINGS, seed=1)}, "settings.seed: 0, now 1"),
        ({"prompts": ("row 0", "row 1", "row 2")}, "prompts: "),
        ({"batch": 2}, "batch: 1, now 2"),
        ({"own_plan": True}, r"variants: \['8', '16', '32'\], now \['plan'\]"),
        ({"recipe": static(8)}, "recipe.controller.kind: 'qlip', now 'static'"),
    ],
)
def test_a_work_folder_of_other_settings_is_refused(
    change: Mapping[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Collector, what: CorrectionFit, first: int, done: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "collect", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, batch=1)
    with pytest.raises(RecipeError, match=rf"begun otherwise \(.*{says}") as caught:
        fit(tmp_path, **{"batch": 1, **change})
    assert str(tmp_path / "work") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_folder_of_something_else_is_no_work_folder(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    with pytest.raises(ArtefactError, match=r"is no work folder \(correction\)"):
        fit(tmp_path)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "precious"


def test_own_plans(pipe: Any, tmp_path: Path) -> None:
    recipe = golden_recipe()
    file = fit(tmp_path, own_plan=True)
    found = CorrectionStatistics.load(file)
    with apply(pipe, recipe) as controller:
        assert found.validity.plan == controller.planner.digest()
    assert list(found.widths) == [None]
    with apply(pipe, corrected(recipe, file)):
        assert torch.isfinite(run(pipe, recipe)).all()
    other = corrected(static(8), file)
    with apply(pipe, static(8)) as controller:
        theirs = controller.planner.digest()
    with unchanged(pipe), pytest.raises(IncompatibleModelError) as caught:
        apply(pipe, other)
    assert f"plan: collected at {str(found.validity.plan)[:12]}..., used at {theirs[:12]}..." in str(
        caught.value
    )


def test_weights_only(golden: Path, pipe: Any, tmp_path: Path) -> None:
    recipe = weights_only(golden)
    file = fit(tmp_path, recipe)
    assert list(CorrectionStatistics.load(file).widths) == [32]
    plain = run(pipe, recipe)
    with apply(pipe, corrected(recipe, file)):
        found = run(pipe, recipe)
    assert not torch.equal(found, plain)
    with pytest.raises(RecipeError, match="quantizes no activations, so there is no plan"):
        fit(tmp_path, recipe, own_plan=True)


def test_a_static_width_outside_the_menu_is_collected(golden: Path, tmp_path: Path) -> None:
    """And without guidance any scale up to 1 is the same."""
    recipe = static(12, ranges=RangesSection(keep_calibrated=True))
    unguided = replace(SETTINGS, guidance_scale=0.0)
    file = fit(tmp_path, recipe, settings=unguided, prompts=["row 0"])
    found = CorrectionStatistics.load(file)
    assert tuple(found.widths) == (8, 12, 16, 32)
    assert found.validity.guidance_scale == 1.0
    pipe = load_pipeline(recipe)
    with apply(pipe, corrected(recipe, file)):
        for scale in (0.0, 1.0):
            run(pipe, recipe, replace(SETTINGS, guidance_scale=scale))
    base_width = fit(tmp_path, static("base"), prompts=["row 0"])
    assert tuple(CorrectionStatistics.load(base_width).widths) == (8, 16, 32)


def test_a_width_without_a_range_is_found_out_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collector, "collect", lambda *args: pytest.fail("the work has begun"))
    with pytest.raises(IncompatibleModelError, match=r"no range of .* for 12 bits"):
        fit(tmp_path, static(12))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["zero_points", "calibration_inputs"])
def test_on_a_base_of_ptqd(source: str, golden: Path, tmp_path: Path) -> None:
    """Its zero points may come from a run of the model: the base is the same each time it is read."""
    theirs = golden / "ptqd" / "w4a8"
    files = {"zero_points": "quantizers.json", "calibration_inputs": "act_init_batch.safetensors"}
    config: Any = load_base_quantizer("ptqd").config_class
    section = config(checkpoint=theirs / "quantw4a8_ldm_brecq.pth", **{source: theirs / files[source]})
    recipe = static("base", base=section, ranges=RangesSection(keep_calibrated=True))
    file = fit(tmp_path, recipe, prompts=["row 0"])
    pipe = load_pipeline(recipe)
    with apply(pipe, corrected(recipe, file)):
        assert torch.isfinite(run(pipe, recipe)).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"prompts": []}, "at least one prompt"), ({"batch": 0}, "one at a time")],
)
def test_nothing_to_collect(change: Mapping[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        fit(tmp_path, **change)
    assert not list(tmp_path.iterdir())


# the section


def test_the_scheduler_is_replaced_and_given_back(pipe: Any, file: Path) -> None:
    recipe = golden_recipe()
    original = pipe.scheduler
    with apply(pipe, recipe):
        plain = run(pipe, recipe)
    with unchanged(pipe):
        controller = apply(pipe, corrected(recipe, file))
        assert isinstance(pipe.scheduler, CorrectedDDIMScheduler)
        first = run(pipe, recipe)
        assert not torch.equal(first, plain)
        assert "sampled with CorrectedDDIMScheduler in place of PNDMScheduler" in str(controller.report())
        assert torch.equal(run(pipe, recipe), first)
        controller.remove()
        assert pipe.scheduler is original
        controller.remove()


def test_a_generation_that_fails_gives_the_pipeline_back(pipe: Any, file: Path) -> None:
    recipe = corrected(golden_recipe(), file)
    with unchanged(pipe), pytest.raises(IncompatibleModelError), apply(pipe, recipe):  # noqa: PT012
        run(pipe, recipe)
        run(pipe, recipe, replace(SETTINGS, guidance_scale=5.0))


def test_a_replaced_scheduler_is_refused(pipe: Any, file: Path) -> None:
    recipe = golden_recipe()
    with apply(pipe, corrected(recipe, file)) as controller:
        run(pipe, recipe)
        own = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = own
        with pytest.raises(
            IncompatibleModelError, match=r"scheduler has been replaced by DDIMScheduler.*`correction:`"
        ):
            run(pipe, recipe)
        controller.remove()
    assert pipe.scheduler is own, "what the user has put there stays"
    assert torch.isfinite(run(pipe, recipe)).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (replace(SETTINGS, guidance_scale=5.0), r"guidance_scale: collected at 3.0, used at 5.0"),
        (replace(SETTINGS, guidance_scale=1.0), r"guidance_scale: collected at 3.0, used at 1.0"),
        (replace(SETTINGS, steps=5), r"steps: collected at 4, used at 5"),
    ],
)
def test_other_sampling_is_refused(settings: Settings, says: str, pipe: Any, file: Path) -> None:
    recipe = golden_recipe()
    with (
        unchanged(pipe),
        apply(pipe, corrected(recipe, file)),
        pytest.raises(IncompatibleModelError, match=says) as caught,
    ):
        run(pipe, recipe, settings)
    assert str(file) in str(caught.value)


def others(golden: Path) -> dict[str, Recipe]:
    return {
        "base_fingerprint": static("base", base=base(golden, "w8a8"), ranges=None),
        "ranges_digest": static(8, ranges=RangesSection(keep_calibrated=True)),
        "attention": static(8, attention="controlled"),
    }


@pytest.mark.parametrize("fact", ["base_fingerprint", "ranges_digest", "attention"])
def test_statistics_of_another_recipe_are_refused(
    fact: str, golden: Path, pipe: Any, file: Path, statistics: CorrectionStatistics
) -> None:
    recipe = others(golden)[fact]
    with apply(pipe, recipe) as controller:
        used = {
            "base_fingerprint": f"{controller.state.fingerprint[:12]}...",
            "ranges_digest": f"{controller.ranges.digest()[:12]}...",
            "attention": "controlled",
        }[fact]
    collected = getattr(statistics.validity, fact)
    shown = "base" if fact == "attention" else f"{collected[:12]}..."
    with unchanged(pipe), pytest.raises(IncompatibleModelError) as caught:
        apply(pipe, corrected(recipe, file))
    assert f"{fact}: collected at {shown}, used at {used}" in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_width_is_refused(pipe: Any, statistics: CorrectionStatistics, tmp_path: Path) -> None:
    file = tmp_path / "two.safetensors"
    some: dict[int | None, StepStatistics] = {8: statistics.widths[8], 32: statistics.widths[32]}
    replace(statistics, widths=some).save(file)
    with (
        unchanged(pipe),
        pytest.raises(
            IncompatibleModelError, match=r"no statistics for 16 bits, only for 8, 32.*fit-correction"
        ),
    ):
        apply(pipe, corrected(golden_recipe(), file))
    with apply(pipe, corrected(static(8), file)):
        run(pipe, static(8))


@pytest.mark.parametrize("name", ["none.safetensors", "broken.safetensors"])
def test_bad_files_leave_the_pipeline_alone(name: str, pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no statistics")
    with unchanged(pipe), pytest.raises(ArtefactError, match=name):
        apply(pipe, corrected(golden_recipe(), tmp_path / name))


def test_ptqd_s_own_statistics_as_a_correction(golden: Path, pipe: Any) -> None:
    """They say nothing of the recipe: only steps, timesteps and channels are compared."""
    recipe = static("base")
    folder = golden / "ptqd" / "w4a8" / "correct_data" / "imagenet_20steps_w4a8"
    with apply(pipe, corrected(recipe, folder)):
        with pytest.raises(IncompatibleModelError, match="steps: collected at 20, used at 4"):
            run(pipe, recipe)
        found = run(pipe, recipe, replace(SETTINGS, steps=20), ["row 1"])
    assert torch.isfinite(found).all()


# mixtures


def made_plan(pipe: Any, prompts: int) -> BitPlan:
    """Random widths, the later prompts with more bits than the first."""
    state = load_base(golden_recipe(), pipe.unet)
    layers = controlled(state.activations, attention=False)
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.multinomial(
            torch.tensor([3.0, 2.0, 1.0 + 4 * row]), 4 * len(layers), replacement=True, generator=generator
        ).reshape(4, -1)
        for row in range(prompts)
    ]
    bits = torch.tensor([8, 16, 32], dtype=torch.uint8)[torch.stack(rows)]
    return BitPlan(bits, tuple(map(float, reversed(TIMESTEPS))), layers)


def far_apart(statistics: CorrectionStatistics) -> CorrectionStatistics:
    """With far more error at few bits, and slopes of both signs: each rule of mixing gives something else."""
    factors = {8: 4.0, 16: 1.0, 32: 0.1}
    found: dict[int | None, StepStatistics] = {
        width: replace(
            statistics.widths[width],
            slope=statistics.widths[width].slope + 0.1 * factor - 0.15,
            deviation=statistics.widths[width].deviation * factor,
            bias=statistics.widths[width].bias * factor,
        )
        for width, factor in factors.items()
    }
    return replace(statistics, widths=found)


def test_the_rows_are_mixed_by_the_written_rule(
    pipe: Any, statistics: CorrectionStatistics, tmp_path: Path
) -> None:
    """By the mean width, between the two of the menu around it: slope and bias linear, the deviation geometric."""
    # Without a guidance that they hold for, steps may be taken outside of the pipeline.
    free = replace(statistics, validity=replace(statistics.validity, guidance_scale=None))
    statistics, file, plan = far_apart(free), tmp_path / "apart.safetensors", made_plan(pipe, 2)
    statistics.save(file)
    plan.save(tmp_path / "plan.safetensors")
    recipe = golden_recipe(controller=TableController(kind="table", plan=tmp_path / "plan.safetensors"))
    generator = torch.Generator().manual_seed(0)
    output, x = torch.randn(2, 2, 4, 8, 8, generator=generator)
    with apply(pipe, corrected(recipe, file)):
        run(pipe, recipe, prompts=PROMPTS[:2])
        scheduler = pipe.scheduler
        plain = DDIMScheduler.from_config(scheduler.config)
        plain.set_timesteps(SETTINGS.steps)
        signs: list[list[bool]] = []
        for timestep in TIMESTEPS:
            rows = scheduler.following.rows(timestep, output)
            for row, widths in enumerate(plan.at(float(timestep)).tolist()):
                mean = sum(widths) / len(widths)
                low, high = (8, 16) if mean < 16 else (16, 32)
                part = (mean - low) / (high - low)
                (s0, d0, b0), (s1, d1, b1) = (statistics.widths[w].at(timestep) for w in (low, high))
                slope = float(s0) + part * float(s1 - s0)
                deviation = float(d0) * float(d1 / d0) ** part
                bias = b0 + part * (b1 - b0)
                assert float(rows.slope[row]) == pytest.approx(slope, rel=1e-5, abs=1e-9)
                assert float(rows.deviation[row]) == pytest.approx(deviation, rel=1e-5)
                assert torch.allclose(rows.bias[row].flatten().double(), bias, rtol=1e-5, atol=1e-9)
                right = (output[row] - bias.float()[:, None, None]) / (1 + max(slope, 0.0))
                found = scheduler.step(output, timestep, x).prev_sample[row]
                expected = plain.step(right[None], timestep, x[row][None]).prev_sample[0]
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
            signs.append([float(slope) > 0 for slope in rows.slope])
            assert not torch.equal(rows.bias[0], rows.bias[1]), "each picture has its own correction"
    assert {sign for row in signs for sign in row} == {True, False}, "slopes of both signs have been met"


def test_interpolation() -> None:
    """The two widths around a number of bits, and the end's alone beyond the ends."""
    found = interpolation(torch.tensor([4.0, 5.0, 6.0, 7.5, 2.0, 32.0]).double(), (8, 4, 6))
    expected = [[0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0.75, 0, 0.25], [0, 1, 0], [1, 0, 0]]
    assert torch.allclose(found, torch.tensor(expected).double())


def test_a_picture_s_correction_is_that_of_its_own_plan(pipe: Any, file: Path, tmp_path: Path) -> None:
    """Of two prompts the second goes as it goes alone under its part of the plan."""
    plan, path = made_plan(pipe, 2), tmp_path / "plan.safetensors"
    recipe = golden_recipe(controller=TableController(kind="table", plan=path))
    rows = []
    for part in (plan, plan.only(0), plan.only(1)):
        part.save(path)
        with apply(pipe, corrected(recipe, file)):
            run(pipe, recipe, prompts=PROMPTS[: part.prompts])
            rows.append(pipe.scheduler.following.rows(751, torch.zeros(part.prompts, 4, 8, 8)))
    both, first, second = rows
    assert torch.allclose(both.bias, torch.cat([first.bias, second.bias]), rtol=1e-6)
    assert torch.allclose(both.slope, torch.cat([first.slope, second.slope]), rtol=1e-6)


def test_noise_of_ddpm_under_a_mixed_plan(pipe: Any, file: Path, tmp_path: Path) -> None:
    """With eta 1 each picture has a deviation and a generator of its own."""
    path = tmp_path / "plan.safetensors"
    made_plan(pipe, 2).save(path)
    recipe = golden_recipe(controller=TableController(kind="table", plan=path))
    assert recipe.model.prompt_embeddings is not None
    table = PromptEmbeddings.load(recipe.model.prompt_embeddings)
    found = []
    with apply(pipe, corrected(recipe, file)):
        for eta in (0.0, 1.0, 1.0):
            latents = pipe(
                prompt_embeds=table.of(PROMPTS[:2]),
                negative_prompt_embeds=table.of(["", ""]),
                generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
                num_inference_steps=SETTINGS.steps,
                guidance_scale=SETTINGS.guidance_scale,
                output_type="latent",
                eta=eta,
            ).images
            found.append(latents)
    assert torch.isfinite(torch.stack(found)).all()
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_one_width_throughout_is_that_width_s_statistics(
    pipe: Any, file: Path, statistics: CorrectionStatistics
) -> None:
    for width in (8, 16, 32):
        recipe = static(width)
        with apply(pipe, corrected(recipe, file)):
            run(pipe, recipe, prompts=["row 0"])
            rows = pipe.scheduler.following.rows(501, torch.zeros(1, 4, 8, 8))
        slope, deviation, bias = statistics.widths[width].at(501)
        assert float(rows.slope) == pytest.approx(float(slope), rel=1e-6)
        assert float(rows.deviation) == pytest.approx(float(deviation), rel=1e-6)
        assert torch.allclose(rows.bias.flatten(), bias.float())


def test_other_pictures_than_the_plan_has(pipe: Any, file: Path) -> None:
    recipe = corrected(golden_recipe(), file)
    with apply(pipe, recipe):
        output, following = torch.zeros(2, 4, 8, 8), pipe.scheduler.following
        with pytest.raises(IncompatibleModelError, match="steps 2 pictures, the recipe has no plan yet"):
            following.rows(751, output)
        run(pipe, recipe)
        with pytest.raises(IncompatibleModelError, match="steps 2 pictures, the recipe has a plan of 3"):
            following.rows(751, output)


def test_a_pipeline_that_shares_the_scheduler_is_refused(pipe: Any, file: Path) -> None:
    """Its guidance is its own; and once the recipe is gone, so is what the scheduler corrects."""
    recipe = corrected(static(8), file)
    with apply(pipe, recipe):
        run(pipe, recipe)
        parts = {name: part for name, part in pipe.components.items()}
        other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        with pytest.raises(IncompatibleModelError, match="call the pipeline that the recipe was applied to"):
            run(other, recipe, replace(SETTINGS, guidance_scale=7.5))
    with pytest.raises(IncompatibleModelError, match="a recipe that has been removed"):
        run(other, recipe)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
        DDIMScheduler(clip_sample=False),
        DDIMScheduler(beta_start=0.001, beta_end=0.02, set_alpha_to_one=False, clip_sample=False),
        DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012),
    ],
    ids=["euler", "ddim's defaults", "ddim", "dpm"],
)
def test_one_schedule_from_collecting_to_sampling(
    scheduler: Any, statistics: CorrectionStatistics, tmp_path: Path
) -> None:
    """What statistics are collected on is what they are used on, whatever the pipeline's own solver."""
    led = leading(scheduler)
    validity = Validity(schedule=schedule_facts(led.config))
    for made in (
        corrected_scheduler(scheduler, replace(statistics, validity=validity)),
        CorrectedDDIMScheduler.from_config(
            scheduler.config, statistics=replace(statistics, validity=validity), bits=8
        ),
    ):
        assert torch.equal(made.alphas_cumprod, led.alphas_cumprod)
        assert torch.allclose(made.alphas_cumprod, scheduler.alphas_cumprod)
        assert made.final_alpha_cumprod == led.final_alpha_cumprod
        assert made.config.steps_offset == led.config.steps_offset == scheduler.config.steps_offset
        assert made.config.timestep_spacing == scheduler.config.timestep_spacing


def test_a_table_beyond_the_menu_is_collected(pipe: Any, tmp_path: Path) -> None:
    plan = made_plan(pipe, 1)
    BitPlan(torch.full_like(plan.bits, 32), plan.timesteps, plan.layers).save(tmp_path / "plan.safetensors")
    menu = ActivationBits(low=6, medium=8, high=16)
    recipe = golden_recipe(
        controller=TableController(kind="table", plan=tmp_path / "plan.safetensors"),
        activation_bits=menu,
        ranges=RangesSection(keep_calibrated=True),
    )
    out = fit(tmp_path, recipe, prompts=("row 0",), batch=1)
    assert list(CorrectionStatistics.load(out).widths) == [6, 8, 16, 32]
    with apply(pipe, corrected(recipe, out)):
        run(pipe, recipe, prompts=("row 0",))


def test_other_ranges_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies at the path of the ranges counts, not its name."""
    section = golden_recipe().ranges
    assert section is not None
    assert section.table is not None
    ranges = Ranges.load(section.table)
    table = tmp_path / "ranges.safetensors"
    ranges.save(table)
    recipe = golden_recipe(ranges=RangesSection(table=table))
    monkeypatch.setattr(Collector, "collect", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, recipe)
    wider = {
        name: {width: replace(grid, scale=2 * grid.scale) for width, grid in grids.items()}
        for name, grids in ranges.fitted.items()
    }
    replace(ranges, fitted=wider).save(table)
    with pytest.raises(RecipeError, match=r"begun otherwise.*ranges_digest"):
        fit(tmp_path, recipe)


def _interrupted(*given: Any) -> Any:
    raise KeyboardInterrupt


def test_a_timestep_outside_the_plan(pipe: Any, file: Path, tmp_path: Path) -> None:
    plan = made_plan(pipe, 1)
    path = tmp_path / "plan.safetensors"
    BitPlan(plan.bits[:, :2], plan.timesteps[:2], plan.layers).save(path)
    recipe = golden_recipe(controller=TableController(kind="table", plan=path))
    with (
        unchanged(pipe),
        apply(pipe, corrected(recipe, file)),
        pytest.raises(BitsError, match="timestep 251 is not in the plan"),
    ):
        run(pipe, recipe)


# recipe and program


def write_recipe(path: Path, section: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """The shipped golden recipe with `section` after it."""
    capsys.readouterr()
    assert main(["recipe", "show", "golden-w4a8"]) == 0
    path.write_text(capsys.readouterr().out + section)
    return path


@pytest.mark.parametrize(
    ("section", "line", "says"),
    [
        (
            "correction:\n  adapter: ptdq\n",
            1,
            r"no correction 'ptdq'; did you mean 'ptqd'\? \(installed: ptqd\)",
        ),
        ("correction:\n  adapter: ptqd\n", 1, "correction.*: the key 'statistics' is missing"),
        ("correction:\n  statistics: a.safetensors\n", 1, "the key `adapter` is missing"),
        ("correction: ptqd\n", 1, "a section with the key `adapter` is needed"),
        ("correction:\n  adapter: ptqd\n  statistics: a\n  eta: 1\n", 4, "correction.eta: "),
        ("correction:\n  adapter: ptqd\n  statistics: 5\n", 3, "correction.statistics: "),
    ],
)
def test_errors_in_the_section(
    section: str, line: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "r.yaml", section, capsys)
    first = path.read_text().splitlines().index(section.splitlines()[0]) + 1
    with pytest.raises(RecipeError, match=rf"r.yaml:{first + line - 1}: .*{says}"):
        Recipe.from_yaml(path)
    assert main(["recipe", "check", str(path)]) == 2


def test_no_correction_in_so_many_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path / "r.yaml", "correction: null\n", capsys)
    assert Recipe.from_yaml(path).correction is None


def test_check_reports_missing_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    section = "correction: {{adapter: ptqd, statistics: {}}}\n"
    path = write_recipe(tmp_path / "r.yaml", section.format("none.safetensors"), capsys)
    assert main(["recipe", "check", str(path)]) == 3
    assert f"correction.statistics: {tmp_path / 'none.safetensors'}: no such file" in capsys.readouterr().err
    path = write_recipe(tmp_path / "r.yaml", section.format(file), capsys)
    assert main(["recipe", "check", str(path)]) == 0


def test_the_schema_has_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"$ref": "#/$defs/correction-ptqd"} in schema["properties"]["correction"]["anyOf"]
    options = schema["$defs"]["correction-ptqd"]
    assert options["properties"].keys() == {"adapter", "statistics"}
    assert set(options["required"]) == {"adapter", "statistics"}
    assert "correction" not in schema["required"]
    assert {"type": "null"} in schema["properties"]["correction"]["anyOf"]
    assert {"type": "null"} not in schema["properties"]["base"]["anyOf"]
    assert "base-ptqd" in schema["$defs"]


def test_fit_correction_and_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], statistics: CorrectionStatistics
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "found.safetensors"
    command = [
        *("fit-correction", "golden-w4a8", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(out)),
        *("--steps", "4", "--guidance", "3", "--batch-size", "3"),
    ]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert (facts["prompts"], facts["steps"], facts["guidance_scale"]) == (3, 4, 3.0)
    assert facts["means_over_timesteps"].keys() == {"8", "16", "32"}
    assert facts["means_over_timesteps"]["8"]["deviation"] == pytest.approx(
        float(statistics.widths[8].deviation.mean())
    )
    assert f"use it with `correction: {{adapter: ptqd, statistics: {out}}}`" in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "found.safetensors"}
    found = CorrectionStatistics.load(out)
    assert max(difference(found.widths[width], statistics.widths[width]) for width in found.widths) == 0

    first = out.read_bytes()
    assert main([*command, "--work", str(tmp_path / "elsewhere")]) == 0
    assert "8: slope " in capsys.readouterr().out
    assert out.read_bytes() == first

    recipe = write_recipe(
        tmp_path / "r.yaml", "correction: {adapter: ptqd, statistics: found.safetensors}\n", capsys
    )
    sampling = ["--prompt", "row 1", "--steps", "4", "--guidance"]
    assert main(["generate", str(recipe), *sampling, "3", "--out", str(tmp_path / "o"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["correction"] == {"adapter": "ptqd", "statistics": str(out)}
    assert main(["generate", str(recipe), *sampling, "5", "--out", str(tmp_path / "p")]) == 4
    assert "guidance_scale: collected at 3.0, used at 5.0" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        (["--out", "found.txt"], RecipeError, "correction statistics are a .safetensors file"),
        (["--method", "ptdq"], AdapterNotFoundError, "no correction 'ptdq'; did you mean 'ptqd'"),
        (["--batch-size", "0"], RecipeError, "one at a time"),
        (["--prompts", "none.txt"], RecipeError, "--prompts none.txt: cannot be read"),
    ],
)
def test_fit_correction_refuses(
    more: list[str],
    error: type[QlipError],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("row 1\n")
    command = ["fit-correction", "golden-w4a8", "--prompts", "prompts.txt", "--out", "found.safetensors"]
    assert main([*command, "--steps", "4", *more]) == error.exit_code
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
