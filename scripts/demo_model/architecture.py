"""The parts of the demo model, as the classes of diffusers and transformers."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, ResNetConfig, ResNetModel

TEXT_WIDTH = 256
JOINT = 256
LATENT_CHANNELS = 4
NOISE_STEPS = 1000


def text_encoder(vocabulary: int, dropout: float = 0.0) -> Any:
    """CLIP's text tower: 256 wide, 4 layers; the two last entries of the vocabulary are start and end of text."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=JOINT,
            attention_dropout=dropout,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


class ImageTower(nn.Module):
    """A small ResNet and its projection: pictures `(N, 3, 64, 64)` in -1 .. 1 -> `(N, 256)`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = ResNetModel(
            ResNetConfig(
                num_channels=3,
                embedding_size=48,
                hidden_sizes=[64, 96, 192, 288],
                depths=[1, 1, 1, 1],
                layer_type="basic",
            )
        )
        # The stock stem halves twice before the first block; 64 pixels cannot spare that.
        self.backbone.embedder.pooler = nn.Identity()
        self.projection = nn.Linear(288, JOINT, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Joint embeddings, not normalised."""
        joint: Tensor = self.projection(self.backbone(images).pooler_output.flatten(1))
        return joint


def autoencoder() -> Any:
    """AutoencoderKL from 64 x 64 x 3 to 16 x 16 x 4."""
    return AutoencoderKL(
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=1.0,
    )


def unet(dropout: float = 0.0) -> Any:
    """A UNet that LDM's UNetModel can express: model_channels 96, channel_mult (1, 2, 2)."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
        dropout=dropout,
    )


def scheduler() -> Any:
    """Stable Diffusion's noise, sampled by DDIM."""
    return DDIMScheduler(
        num_train_timesteps=NOISE_STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def encode_text(encoder: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token states `(N, 77, 256)` and pooled states `(N, 256)`."""
    out = encoder(tokens)
    return out.last_hidden_state, out.pooler_output
