"""Tiny pipelines of every family, with random weights and their own tokenizers and text encoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from qlip_plugins.calibration.nearest import nearest_state
from qlip_plugins.controller import BitController, apply
from qlip_plugins.embeddings import encode
from qlip_plugins.families import family_of
from qlip_plugins.layers import controlled
from qlip_plugins.packed import read_packed, write_packed
from qlip_plugins.recipe import Recipe
from qlip_plugins.text_to_bits import TextToBits, TextToBitsConfig

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = 8
MENU = (4, 6, 8)
PROMPTS = ["a red fox", "the quick brown dog"]
BASE_BITS = 8


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )


def _clip_config(tokenizer: CLIPTokenizer, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=16,
        shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def _unet(**changes: Any) -> UNet2DConditionModel:
    options: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **changes,
    }
    return UNet2DConditionModel(**options).eval()


def _sd(folder: Path, **changes: Any) -> Any:
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        unet=_unet(**changes),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd(folder: Path) -> Any:
    """Stable Diffusion 1.x."""
    return _sd(folder)


def bk_sdm(folder: Path) -> Any:
    """BK-SDM Small: no middle block, fewer layers a block in the decoder."""
    return _sd(folder, mid_block_type=None)


def sdxl(folder: Path) -> Any:
    """Stable Diffusion XL: two text encoders, pooled text and sizes beside the states."""
    tokenizer = clip_tokenizer(folder)
    # 32 states wide; 6 sizes of 8 numbers beside 12 of pooled text.
    unet = _unet(
        cross_attention_dim=32,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, projection_dim=12)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )


def flux(folder: Path) -> Any:
    """FLUX: a transformer, T5 states and CLIP's pooled text."""
    tokenizer = clip_tokenizer(folder)
    return FluxPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=3 + len(LETTERS), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ).eval(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {"sd": sd, "bk-sdm": bk_sdm, "sdxl": sdxl, "flux": flux}


def make(name: str, folder: Path) -> Any:
    """A tiny pipeline, the same one each time."""
    torch.manual_seed(0)
    pipe = PIPELINES[name](folder / "tokenizer")
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe


def call_options(name: str) -> dict[str, Any]:
    """What every generation is called with."""
    options: dict[str, Any] = {"height": 16, "width": 16, "output_type": "latent"}
    return {**options, "max_sequence_length": TOKENS} if name == "flux" else options


def one_call(name: str, pipe: Any) -> dict[str, Any]:
    """The arguments of the denoiser's first call in a generation."""
    caught: list[dict[str, Any]] = []

    def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        family = family_of(pipe)
        names = (family.sample, "timestep")
        caught.append({**dict(zip(names, args, strict=False)), **kwargs, "return_dict": False})

    denoiser = family_of(pipe).denoiser_of(pipe)
    handle = denoiser.register_forward_pre_hook(catch, with_kwargs=True)
    pipe(prompt=["a b", "c d"], num_inference_steps=1, guidance_scale=1.0, **call_options(name))
    handle.remove()
    # From the middle of the noise, where the time says something.
    return {**caught[0], "timestep": torch.full((2,), 0.501 if name == "flux" else 501.0)}


def qlip_recipe(name: str, pipe: Any, folder: Path, seed: int = 0) -> Recipe:
    """A recipe on disk: a round-to-nearest base and a controller with random parameters."""
    family = family_of(pipe)
    denoiser = family.denoiser_of(pipe)
    made = nearest_state(denoiser, one_call(name, pipe), 4, BASE_BITS)
    write_packed(folder / "base", made.with_activations({}), {BASE_BITS: made.activations}, {}, "a test")
    state = read_packed(folder / "base", BASE_BITS)
    found = family.encoded(pipe, "a b")
    pooled = found.pooled if family.pooled else None
    width = 16 if pooled is None else pooled.shape[1]
    controller = TextToBits(
        TextToBitsConfig(
            embedding_dim=width,
            pooling="pooled" if family.pooled else "eos",
            hidden=8,
            menu={"low": MENU[0], "medium": MENU[1], "high": MENU[2]},  # type: ignore[arg-type]
            layers=controlled(state.activations, attention=False),
            timesteps=(900.0, 500.0, 100.0),
            base_fingerprint=state.fingerprint,
            origin="random, for tests",
            population=(0.3, 0.5, 0.7),
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controller.q2b.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
        for parameter in controller.t2q.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        # Steep, and turned between two prompts, so that they differ in bits whatever the encoders' random weights.
        quality = controller.quality(encode(pipe, None, PROMPTS).embeddings)
        controller.q2b.slope.mul_(10 / float((quality[0] - quality[1]).abs()))
        controller.q2b.offset.copy_(-(float(quality.mean()) - 0.5) * controller.q2b.slope)
    controller.save_pretrained(folder / "controller")
    pipe.save_pretrained(folder / "pipeline") if name != "flux" else (folder / "pipeline").mkdir()
    text = f"""
schema_version: 1
model: {{pipeline: {folder / "pipeline"}}}
base: {{adapter: packed, folder: {folder / "base"}, activation_bits: {BASE_BITS}}}
backend: torch
activation_bits: {{low: {MENU[0]}, medium: {MENU[1]}, high: {MENU[2]}}}
ranges: {{keep_calibrated: true}}
controller: {{kind: qlip, path: {folder / "controller"}}}
"""
    (folder / "recipe.yaml").write_text(text)
    return Recipe.from_yaml(folder / "recipe.yaml")


def steered(name: str, folder: Path) -> tuple[Any, Recipe, BitController]:
    """A tiny pipeline under its recipe."""
    pipe = make(name, folder)
    recipe = qlip_recipe(name, pipe, folder)
    return pipe, recipe, apply(pipe, recipe)
