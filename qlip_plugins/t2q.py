from __future__ import annotations

from torch import Tensor, nn


class T2Q(nn.Module):
    """Text to quality: three linear layers from a prompt's embedding to one number (docs/method.md).

    Width and activation are our choice, the paper gives neither.

    Args:
        dim: length D of the embedding.
        hidden: width of the two inner layers.
    """

    def __init__(self, dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Predicted quality `(N,)` of `(N, D)` embeddings; labels are ranks, so about 0 to 1."""
        quality: Tensor = self.layers(embedding).squeeze(-1)
        return quality
