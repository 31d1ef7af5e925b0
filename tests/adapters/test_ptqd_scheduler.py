"""The corrected sampler, against the traces that the real PTQD code recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.state import CalibratedState
from qlip_ptqd import CorrectedDDIMScheduler, CorrectionStatistics
from qlip_ptqd.scheduler import corrected
from qlip_ptqd.statistics import StepStatistics, Validity

CASES = ("w4a8", "w8a8")
GUIDANCE = 3.0
STEPS = 20


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def folder_of(golden: Path, case: str) -> Path:
    return golden / "ptqd" / case / "correct_data" / f"imagenet_20steps_{case}"


def scheduler_for(golden: Path, case: str) -> Any:
    scheduler = CorrectedDDIMScheduler(statistics=folder_of(golden, case))
    scheduler.set_timesteps(STEPS)
    return scheduler


def guided(outputs: Tensor) -> Tensor:
    unconditional, conditional = outputs.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def noise_of(trace: Mapping[str, Tensor], eta: int, step: int) -> Tensor:
    """The noise that was drawn; the trace holds it times its deviation."""
    if eta == 0:
        return torch.zeros(2, 4, 8, 8)
    sigma, scaled = trace["eta1.sigma_t"][step], trace["eta1.noise"][step]
    return torch.where(sigma > 0, scaled / sigma.clamp(min=1e-12), torch.zeros_like(scaled))


@pytest.fixture(scope="module")
def traces(golden: Path) -> Mapping[str, Mapping[str, Tensor]]:
    return {case: load_file(golden / "ptqd" / case / "ddim_trace.safetensors") for case in CASES}


@pytest.fixture(scope="module")
def bases(golden: Path) -> Mapping[str, CalibratedState]:
    adapter = load_base_quantizer("ptqd")
    config: Any = adapter.config_class
    return {
        case: adapter.load(
            config(
                checkpoint=golden / "ptqd" / case / f"quant{case}_ldm_brecq.pth",
                zero_points=golden / "ptqd" / case / "quantizers.json",
            )
        )
        for case in CASES
    }


def test_the_schedule_is_ldms(golden: Path) -> None:
    """Timesteps, alphas and deviations of 20 steps as PTQD's sampler recorded them."""
    told = json.loads((golden / "ptqd" / "w4a8" / "correct_data.json").read_text())
    scheduler = scheduler_for(golden, "w4a8")
    assert scheduler.timesteps.tolist() == told["ddim_timesteps"][::-1]
    for timestep, alpha, before in zip(
        told["ddim_timesteps"], told["ddim_alphas"], told["ddim_alphas_prev"], strict=True
    ):
        assert [float(value) for value in scheduler._alphas(timestep)] == pytest.approx(
            [alpha, before], rel=1e-6
        )


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_every_recorded_step(
    golden: Path, traces: Mapping[str, Mapping[str, Tensor]], case: str, eta: int
) -> None:
    """From the recorded sample and model output to the recorded sample before, its origin and its noise."""
    trace, scheduler = traces[case], scheduler_for(golden, case)
    worst = 0.0
    for step in range(STEPS):
        timestep = int(trace[f"eta{eta}.t"][step, 0])
        assert timestep == int(scheduler.timesteps[step])
        out = scheduler.step(
            guided(trace[f"eta{eta}.model_out_uncond_cond"][step]),
            timestep,
            trace[f"eta{eta}.x"][step],
            eta=float(eta),
            variance_noise=noise_of(trace, eta, step),
        )
        worst = max(
            worst,
            relative(out.prev_sample, trace[f"eta{eta}.x_prev"][step]),
            relative(out.pred_original_sample, trace[f"eta{eta}.pred_x0"][step]),
        )
    print(f"{case}, eta {eta}: steps from recorded outputs within {worst:.1e}")
    assert worst <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_variance_is_corrected(
    golden: Path, traces: Mapping[str, Mapping[str, Tensor]], case: str
) -> None:
    """sigma' as it was recorded; smaller than DDIM's own at some steps, and 0 where nothing is left."""
    trace, scheduler = traces[case], scheduler_for(golden, case)
    smaller = 0
    for step in range(STEPS):
        timestep = int(trace["eta1.t"][step, 0])
        output = guided(trace["eta1.model_out_uncond_cond"][step])
        sigma = scheduler._sigma(
            *scheduler._alphas(timestep), 1.0, scheduler.following.rows(timestep, output)
        )
        assert float(sigma) == pytest.approx(float(trace["eta1.sigma_t"][step]), rel=2e-5, abs=1e-6)
        smaller += float(sigma) < float(trace["uncorrected_eta1.sigma_t"][step])
    assert smaller >= STEPS // 2


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_steps_with_the_real_unet(
    golden: Path,
    model: GoldenModel,
    bases: Mapping[str, CalibratedState],
    traces: Mapping[str, Mapping[str, Tensor]],
    case: str,
    eta: int,
) -> None:
    trace, scheduler, unet = traces[case], scheduler_for(golden, case), model.unet()
    load_backend("torch").install(unet, bases[case])
    context = torch.cat([trace["uncond"], trace["cond"]])
    errors = []
    for step in range(STEPS):
        timestep, x = int(trace[f"eta{eta}.t"][step, 0]), trace[f"eta{eta}.x"][step]
        with torch.no_grad():
            output = guided(unet(torch.cat([x, x]), timestep, context).sample)
        found = scheduler.step(
            output, timestep, x, eta=float(eta), variance_noise=noise_of(trace, eta, step), return_dict=False
        )
        errors.append(relative(found[0], trace[f"eta{eta}.x_prev"][step]))
    print(f"{case}, eta {eta}: steps with the UNet within {max(errors):.1e}")
    assert max(errors) <= 5e-2


@pytest.mark.parametrize("case", CASES)
def test_free_running_latent(
    golden: Path,
    model: GoldenModel,
    bases: Mapping[str, CalibratedState],
    traces: Mapping[str, Mapping[str, Tensor]],
    case: str,
) -> None:
    """At A8 the trajectory is chaotic, so its end is printed and not judged."""
    trace, pipe = traces[case], model.pipe()
    load_backend("torch").install(pipe.unet, bases[case])
    results = {}
    for name in ("eta0.final", "uncorrected_eta0.final"):
        statistics = CorrectionStatistics.load(folder_of(golden, case))
        scheduler: Any = corrected(pipe.scheduler, statistics)
        if name.startswith("un"):
            scheduler = DDIMScheduler.from_config(scheduler.config)
        pipe.scheduler = scheduler
        results[name] = pipe(
            prompt_embeds=trace["cond"],
            negative_prompt_embeds=trace["uncond"],
            latents=trace["x_T"],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
        ).images
        assert torch.isfinite(results[name]).all()
        print(f"{case}: {name}, relative RMS {relative(results[name], trace[name]):.2e}")
    assert not torch.equal(*results.values())


def test_nothing_to_correct_is_ddim() -> None:
    """With zero statistics it is diffusers' own step, eta and clipping included."""
    timesteps = tuple(range(1, 1000, 100))
    zero = torch.zeros(10, dtype=torch.float64)
    statistics = CorrectionStatistics(
        {None: StepStatistics(timesteps, zero, zero, torch.zeros(10, 3).double())}, Validity(steps=10)
    )
    for clip in (False, True):
        ours = CorrectedDDIMScheduler(statistics=statistics, clip_sample=clip, steps_offset=1)
        plain = DDIMScheduler.from_config(ours.config)
        ours.set_timesteps(10)
        plain.set_timesteps(10)
        for timestep in plain.timesteps:
            output, sample = torch.randn(
                2, 2, 3, 5, 7, generator=torch.Generator().manual_seed(int(timestep))
            )
            for eta in (0.0, 0.5, 1.0):
                found, expected = (
                    scheduler.step(
                        output, timestep, sample, eta=eta, generator=torch.Generator().manual_seed(7)
                    )
                    for scheduler in (ours, plain)
                )
                assert torch.allclose(found.prev_sample, expected.prev_sample, atol=1e-5)
                assert torch.allclose(
                    found.pred_original_sample, expected.pred_original_sample, rtol=1e-5, atol=1e-5
                )


def test_half_precision_is_computed_in_float32(golden: Path) -> None:
    scheduler = scheduler_for(golden, "w4a8")
    output, sample = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = scheduler.step(output.half().float(), 951, sample.half().float()).prev_sample
    found = scheduler.step(output.half(), 951, sample.half()).prev_sample
    assert found.dtype == torch.float16
    assert torch.equal(found, exact.half())


def test_wrong_uses_are_refused(golden: Path) -> None:
    folder = folder_of(golden, "w4a8")
    scheduler = scheduler_for(golden, "w4a8")
    with pytest.raises(IncompatibleModelError, match="steps: collected at 20, used at 25"):
        scheduler.set_timesteps(25)
    scheduler.set_timesteps(STEPS)
    output = torch.zeros(1, 3, 8, 8)
    with pytest.raises(IncompatibleModelError, match="4 channels, the prediction has 3"):
        scheduler.step(output, 951, output)
    output = torch.zeros(1, 4, 8, 8)
    with pytest.raises(IncompatibleModelError, match="no statistics for timestep 950"):
        scheduler.step(output, 950, output)
    with pytest.raises(IncompatibleModelError, match="use_clipped_model_output"):
        scheduler.step(output, 951, output, use_clipped_model_output=True)
    with pytest.raises(IncompatibleModelError, match="call set_timesteps"):
        CorrectedDDIMScheduler(statistics=folder).step(output, 951, output)
    for option in (
        {"prediction_type": "v_prediction"},
        {"thresholding": True},
        {"rescale_betas_zero_snr": True},
    ):
        config: Any = option
        with pytest.raises(IncompatibleModelError, match=next(iter(option)).partition("_")[0]):
            CorrectedDDIMScheduler(statistics=folder, **config)
    with pytest.raises(IncompatibleModelError, match="timestep"):
        CorrectedDDIMScheduler(statistics=folder, steps_offset=0).set_timesteps(STEPS)
    with pytest.raises(IncompatibleModelError, match="timestep"):
        CorrectedDDIMScheduler(statistics=folder, timestep_spacing="trailing").set_timesteps(STEPS)
    with pytest.raises(ArtefactError, match="neither a file nor a folder"):
        CorrectedDDIMScheduler(statistics=folder / "nothing")
    with pytest.raises(IncompatibleModelError, match="leave `bits` out, found 6"):
        CorrectedDDIMScheduler(statistics=folder, bits=6)


def test_statistics_of_another_schedule_are_refused(golden: Path) -> None:
    statistics = CorrectionStatistics.load(folder_of(golden, "w4a8"))
    for key, other in (("beta_end", 0.02), ("beta_schedule", "linear"), ("timestep_spacing", "trailing")):
        held = replace(statistics, validity=Validity(schedule={key: other}))
        with pytest.raises(IncompatibleModelError, match=f"schedule.{key}: collected at {other}"):
            CorrectedDDIMScheduler(statistics=held)


def test_a_scheduler_without_betas_is_refused(golden: Path) -> None:
    class Without:
        config: Mapping[str, Any] = {}

    with pytest.raises(IncompatibleModelError, match="has no betas"):
        corrected(Without(), CorrectionStatistics.load(folder_of(golden, "w4a8")))


def test_made_of_another_scheduler(golden: Path) -> None:
    """The schedule of the pipeline's own scheduler is kept, whatever its solver."""
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    scheduler = corrected(euler, CorrectionStatistics.load(folder_of(golden, "w4a8")))
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps[0] == 951
    assert not scheduler.config.clip_sample
