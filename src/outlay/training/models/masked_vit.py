"""A masked auto-encoder around a ViT: sees a few patches, predicts the pixels of the others.

After arXiv:2111.06377, section 3. Encoder names and shapes are those of
`ViTForImageClassification`, so that either takes the other's encoder. Two departures: positions
are learned, as the encoder's are, and the decoder has the encoder's width.

B images, C channels, P patches, V of them seen, D the width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedImageModeling, ViTConfig, ViTModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTLayer, ViTPreTrainedModel

_OF_THE_FILE = ("architectures", "transformers_version")


class MaskedViTConfig(ViTConfig):
    """Settings of `MaskedViT`: a ViT's, and how deep the decoder is.

    Args:
        decoder_layers: Blocks of the decoder.
        rest: As `ViTConfig` takes them.
    """

    model_type = "outlay_masked_vit"

    def __init__(self, decoder_layers: int = 1, **rest: Any) -> None:
        self.decoder_layers = decoder_layers
        super().__init__(**rest)


def masked_config(config: ViTConfig) -> MaskedViTConfig:
    """The masked auto-encoder around a ViT's config."""
    return MaskedViTConfig(**_shared(config))


def plain_config(config: MaskedViTConfig) -> ViTConfig:
    """The encoder's config alone."""
    return ViTConfig(**_shared(config))


def _shared(config: ViTConfig) -> dict[str, Any]:
    kept = (f.name for f in dataclasses.fields(ViTConfig) if f.name not in _OF_THE_FILE)
    return {name: getattr(config, name) for name in kept}


class PatchDecoder(nn.Module):
    """Fills in the patches that were not seen and predicts the pixels of all."""

    def __init__(self, config: MaskedViTConfig, patches: int, pixels: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pixels = nn.Linear(width, pixels)

    def forward(
        self, states: Float[Tensor, "b v1 d"], visible: Int[Tensor, "b v"]
    ) -> Float[Tensor, "b p pixels"]:
        """Pixels of every patch, from the class token and the visible patches."""
        states = self.embed(states)
        places = visible[..., None].expand(-1, -1, states.shape[-1])
        holes = self.mask_token.expand(len(states), self.positions.shape[1] - 1, -1)
        filled = holes.to(states.dtype).scatter(1, places, states[:, 1:])
        states = torch.cat([states[:, :1], filled], 1) + self.positions
        for layer in self.layers:
            states = layer(states)
        return self.pixels(self.norm(states[:, 1:]))


class MaskedViT(ViTPreTrainedModel):
    """A masked auto-encoder; without `visible`, its encoder on all patches."""

    config_class = MaskedViTConfig

    def __init__(self, config: MaskedViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        patch: Any = self.vit.embeddings.patch_embeddings.projection
        pixels = patch.in_channels * patch.kernel_size[0] * patch.kernel_size[1]
        patches = int(self.vit.embeddings.patch_embeddings.num_patches)
        self.decoder = PatchDecoder(config, patches, pixels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchDecoder):
            module.mask_token.normal_(std=self.config.initializer_range)
            module.positions.normal_(std=self.config.initializer_range)

    def forward(
        self,
        pixel_values: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b v"] | None = None,
        output_hidden_states: bool = False,
    ) -> ImageClassifierOutput:
        """Pixels of every patch as logits, and the encoder's states, the last one after its norm.

        Args:
            pixel_values: Images.
            visible: Indices of the patches that are seen, rising. All, and no logits, by default.
            output_hidden_states: Give the states as well, shape (B, V + 1, D) each.
        """
        states = self.vit.embeddings(pixel_values)
        if visible is not None:
            places = (visible + 1)[..., None].expand(-1, -1, states.shape[-1])
            states = torch.cat([states[:, :1], states.gather(1, places)], 1)
        found = [states]
        for layer in self.vit.layers:
            found.append(layer(found[-1]))
        found[-1] = self.vit.layernorm(found[-1])
        return ImageClassifierOutput(
            logits=None if visible is None else self.decoder(found[-1], visible),
            hidden_states=tuple(found) if output_hidden_states else None,
        )


AutoConfig.register(MaskedViTConfig.model_type, MaskedViTConfig, exist_ok=True)
AutoModelForMaskedImageModeling.register(MaskedViTConfig, MaskedViT, exist_ok=True)
