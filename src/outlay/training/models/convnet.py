"""A small convolutional network that is saved and loaded like a transformers model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput


class ConvNetConfig(PreTrainedConfig):
    """Settings of `ConvNetForImageClassification`.

    Args:
        hidden_size: Channels of the last block; the first has hidden_size / 2^(halvings).
        num_hidden_layers: Residual blocks.
        image_size: (height, width) in pixels.
        num_channels: Channels of the image.
        hidden_dropout_prob: Dropout before the head.
    """

    model_type = "outlay_convnet"

    def __init__(
        self,
        hidden_size: int = 64,
        num_hidden_layers: int = 3,
        image_size: tuple[int, int] | list[int] = (8, 8),
        num_channels: int = 1,
        hidden_dropout_prob: float = 0.0,
        **rest: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.image_size = list(image_size)
        self.num_channels = num_channels
        self.hidden_dropout_prob = hidden_dropout_prob
        super().__init__(**rest)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; normalized over groups, so rows never touch."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(channels), channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1)
        self.norm2 = nn.GroupNorm(_groups(out_channels), out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        same = channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Normalize, activate, convolve, twice, and add the shortcut."""
        inner = self.conv1(nn.functional.gelu(self.norm1(hidden)))
        inner = self.conv2(nn.functional.gelu(self.norm2(inner)))
        return self.shortcut(hidden) + inner


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


class ConvNet(nn.Module):
    """Convolution, residual blocks that halve the image while it is larger than 2, norm, mean."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        side, width, strides = min(config.image_size), config.hidden_size, []
        for _ in range(config.num_hidden_layers):
            strides.append(2 if side >= 4 else 1)
            side //= strides[-1]
        # The width doubles where the image halves, up to what was asked for, at most 4 times.
        factor = min(4, 2 ** strides.count(2))
        while width % factor:
            factor //= 2
        channels = width // factor
        self.embeddings = nn.Conv2d(config.num_channels, channels, 3, 1, 1)
        layers = []
        for stride in strides:
            out = min(width, channels * stride)
            layers.append(ConvBlock(channels, out, stride))
            channels = out
        self.layers = nn.ModuleList(layers)
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.width = channels

    def forward(
        self, pixels: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b width"], tuple[Tensor, ...]]:
        """Features, and the image after each part."""
        states = [self.embeddings(pixels)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return nn.functional.gelu(self.norm(states[-1])).mean((2, 3)), tuple(states)


class ConvNetForImageClassification(PreTrainedModel):
    """`ConvNet` and a linear head."""

    config_class = ConvNetConfig
    base_model_prefix = "convnet"
    main_input_name = "pixel_values"

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        self.convnet = ConvNet(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(self.convnet.width, int(config.num_labels or 2))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], output_hidden_states: bool = False
    ) -> ImageClassifierOutput:
        """Logits of shape (b, classes)."""
        features, states = self.convnet(pixel_values)
        return ImageClassifierOutput(
            logits=self.classifier(self.dropout(features)),
            hidden_states=states if output_hidden_states else None,
        )


AutoConfig.register(ConvNetConfig.model_type, ConvNetConfig, exist_ok=True)
AutoModelForImageClassification.register(
    ConvNetConfig, ConvNetForImageClassification, exist_ok=True
)
