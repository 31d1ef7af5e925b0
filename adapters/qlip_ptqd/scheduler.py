"""DDIM that allows for the quantization error of its noise prediction (PTQD).

Source: He et al., "PTQD: Accurate Post-Training Quantization for Diffusion Models", NeurIPS 2023,
arXiv 2305.10657. The error of the guided prediction is taken as k times the float model's prediction,
plus a bias in each channel, plus noise of a known deviation.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from qlip_plugins.errors import IncompatibleModelError

from .following import Following, Rows
from .statistics import CorrectionStatistics, Validity

if TYPE_CHECKING:
    from qlip_plugins.controller import BitController
    from qlip_plugins.recipe import Recipe

_FACTS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
    *("set_alpha_to_one", "steps_offset", "prediction_type", "timestep_spacing"),
)


class CorrectedDDIMScheduler(DDIMScheduler):  # type: ignore[misc]
    """A DDIM scheduler for any pipeline whose denoiser is quantized; eta, channels and steps are free.

    `pipe.scheduler = CorrectedDDIMScheduler.from_config(pipe.scheduler.config, statistics="folder")`. It
    corrects what the pipeline hands to `step`, hence after guidance. In a recipe, `correction:` makes one.

    Args:
        statistics: of the error, or where they are: a file of ours, or PTQD's `correct_data` folder.
        bits: whose of the statistics to use, where there are several and no recipe steers the bits.
        beta_start: this and the others are DDIM's own options; by default the schedule of latent diffusion.

    Raises:
        ArtefactError: the statistics are missing, damaged or refused.
        IncompatibleModelError: they do not hold for this schedule, or it does not predict noise.
    """

    # Not decorated with `register_to_config`: DDIM's own `__init__` is, and the configuration stays DDIM's.
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = False,
        steps_offset: int = 1,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        statistics: CorrectionStatistics | str | Path,
        bits: int | None = None,
    ) -> None:
        # By keyword: diffusers takes values given by place for defaults, and leaves them out elsewhere.
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        check_ddim(self.config)
        if not isinstance(statistics, CorrectionStatistics):
            statistics = CorrectionStatistics.load(Path(statistics))
        self.statistics = statistics
        self.following = Following(statistics, bits)
        self._check(Validity(schedule=schedule_facts(self.config)))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """See diffusers; `statistics` among the options. The schedule is that of `config`, its defaults included."""
        return super().from_config(ddim_config(config), return_unused_kwargs, **options)

    def follow(self, recipe: Recipe, controller: BitController) -> None:
        """Take the widths from a recipe's controller from now on.

        Raises:
            IncompatibleModelError: the statistics do not hold for the recipe.
        """
        self.following.follow(recipe, controller)
        self._check(self.following.validity)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """See diffusers; checks that the statistics hold for these steps.

        Raises:
            IncompatibleModelError: they hold for others.
        """
        super().set_timesteps(num_inference_steps, device)
        self._check(Validity(steps=num_inference_steps))
        for timestep in self.timesteps.tolist():
            self.statistics.check_has(timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step back along the trajectory.

        Args:
            model_output: `(N, C, h, w)`, the guided noise prediction.
            timestep: of the schedule.
            sample: `(N, C, h, w)`, the noisy sample.
            eta: 0 is deterministic, 1 is DDPM's noise.
            use_clipped_model_output: must stay off: it would undo the correction.
            generator: of the noise; one, or one for each row.
            variance_noise: `(N, C, h, w)`, in place of drawn noise.
            return_dict: whether to return diffusers' `DDIMSchedulerOutput`, or a tuple.

        Raises:
            IncompatibleModelError: the statistics do not hold for what is sampled.
        """
        if self.num_inference_steps is None:
            raise IncompatibleModelError("the scheduler has no timesteps yet: call set_timesteps() first")
        if use_clipped_model_output:
            raise IncompatibleModelError("use_clipped_model_output would undo the correction: leave it off")
        self._check(self.following.found())
        rows = self.following.rows(int(timestep), model_output)
        alpha, before = self._alphas(int(timestep))
        sigma = self._sigma(alpha, before, eta, rows)
        noise = rows.corrected(model_output.float())
        origin = (sample.float() - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        if self.config.clip_sample:
            origin = origin.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        earlier = before.sqrt() * origin + (1 - before - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device,
                    dtype=model_output.dtype,
                )
            earlier = earlier + sigma * variance_noise
        earlier, origin = earlier.to(sample.dtype), origin.to(sample.dtype)
        if not return_dict:
            return (earlier, origin)
        return DDIMSchedulerOutput(prev_sample=earlier, pred_original_sample=origin)

    def _alphas(self, timestep: int) -> tuple[Tensor, Tensor]:
        """Cumulative alphas of this timestep and of the next one on the way, `()` each."""
        earlier = timestep - self.config.num_train_timesteps // self.num_inference_steps
        before = self.alphas_cumprod[earlier] if earlier >= 0 else self.final_alpha_cumprod
        return self.alphas_cumprod[timestep], before

    def _sigma(self, alpha: Tensor, before: Tensor, eta: float, rows: Rows) -> Tensor:
        """DDIM's deviation less what the error's own noise brings along, `(N or 1, 1, 1, 1)`."""
        sigma = eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
        weight = (1 - before - sigma**2).sqrt() - (before * (1 - alpha) / alpha).sqrt()
        room = sigma**2 - (weight * rows.noise()) ** 2
        return room.clamp(min=0).sqrt()

    def _check(self, found: Validity) -> None:
        differences = self.statistics.validity.differences(found)
        if differences:
            raise IncompatibleModelError(
                f"{self.statistics.source or 'correction statistics'}: do not hold here: {'; '.join(differences)}. "
                "Collect statistics for this use (`qlip-plugins fit-correction`), or use them as they were collected"
            )


def check_ddim(config: Mapping[str, Any]) -> None:
    """Check that a DDIM configuration is one that the correction is defined for.

    Raises:
        IncompatibleModelError: the model does not predict noise, or samples are thresholded.
    """
    if config["prediction_type"] != "epsilon":
        raise IncompatibleModelError(
            f"the correction is defined for predictions of noise (epsilon), this model predicts "
            f"{config['prediction_type']!r}"
        )
    for name in ("thresholding", "rescale_betas_zero_snr"):
        if config[name]:
            raise IncompatibleModelError(f"the correction is not defined under {name}=True")


def schedule_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a DDIM configuration the error's statistics depend on."""
    facts = {name: config[name] for name in _FACTS}
    betas = config["trained_betas"]
    facts["trained_betas"] = (
        betas and hashlib.sha256(json.dumps(list(map(float, betas))).encode()).hexdigest()
    )
    return facts


def ddim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """DDIM's options on the schedule of any scheduler's configuration.

    What another solver does not have is set as for Stable Diffusion: no clipping, and the first alpha of the
    schedule at the end.

    Raises:
        IncompatibleModelError: it has no schedule of betas.
    """
    if "beta_start" not in config:
        name = config.get("_class_name", "the scheduler")
        raise IncompatibleModelError(
            f"{name} has no betas: the correction is defined for DDIM, on a schedule of them"
        )
    options = inspect.signature(DDIMScheduler.__init__).parameters
    defaults = {name: option.default for name, option in options.items() if name != "self"}
    defaults |= {"clip_sample": False, "set_alpha_to_one": False}
    # Not by diffusers' own merging: it forgets values that were defaults elsewhere.
    return {name: config.get(name, default) for name, default in defaults.items()}


def corrected(scheduler: Any, statistics: CorrectionStatistics) -> CorrectedDDIMScheduler:
    """A corrected DDIM scheduler on the schedule of another one.

    Raises:
        IncompatibleModelError: the other has no such schedule, or the statistics do not hold for it.
    """
    return CorrectedDDIMScheduler(**ddim_config(scheduler.config), statistics=statistics)
