"""Adapters between frozen bases that come from the base weight's own decomposition.

The bases need not be stored: whoever has the base weight can make them again. So a delta's state
holds the fingerprint of the weight and a signature of the bases, and loading refuses another
weight or other bases by name. Where singular values repeat, the bases are not determined by the
weight and travel with the state.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from ..core.errors import CheckpointError, ConfigError, Conflict
from ..core.method import Context, generator_of, seed_of
from .adapted import Delta, delta_dtype
from .svd import Decomposition, hollow
from .targets import is_linear

Selection = Literal["principal", "minor", "random"]
Embed = Literal["auto", "always", "never"]

_SIGNATURE_TOLERANCE = 1e-2  # of entries around 1; bases that are stored in bfloat16 err by 2e-3


class SpectralDelta(Delta):
    """What SVFit and LaMDA share: frozen bases as buffers, and what their state means.

    Args:
        name: Path of the layer, for errors.
        mark: Fingerprint of the base weight, 32 hexadecimal digits.
        bases: Frozen tensors by buffer name.
        probe: The basis that the signature is taken of, directions as rows.
        embed: Keep the bases in the state.
        allow_rebuild: Accept a state that was trained on another base weight.
        quantized: The base weight cannot be written, so the delta cannot be merged into it.

    Attributes:
        fingerprint: Content hash of the base weight, 16 bytes.
        signature: One number a direction that changes if the direction does.
    """

    fingerprint: UInt8[Tensor, " 16"]
    signature: Float[Tensor, " r"]

    def __init__(
        self,
        name: str,
        mark: str,
        bases: Mapping[str, Tensor],
        probe: Float[Tensor, "r width"],
        embed: bool,
        allow_rebuild: bool = False,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.layer_name, self.embedded = name, embed
        self.allow_rebuild, self.quantized = allow_rebuild, quantized
        self.base_names = tuple(bases)
        for key, value in bases.items():
            self.register_buffer(key, value, persistent=embed)
        marks = torch.tensor(list(bytes.fromhex(mark)), dtype=torch.uint8)
        self.register_buffer("fingerprint", marks)
        self.register_buffer("signature", _signature(probe))

    def frozen_bytes(self) -> int:
        """Bytes of the frozen bases, which stay in memory beside the base weight."""
        return sum(t.numel() * t.element_size() for t in map(self.get_buffer, self.base_names))

    def refuse_quantized(self) -> None:
        """Refuse to speak of a weight that cannot be written.

        Raises:
            Conflict: If the base weight is quantized.
        """
        if self.quantized:
            raise Conflict(
                f"the weight of {self.layer_name!r} is quantized: a delta cannot be merged into it",
                "keep the adapter beside the base, or merge into the unquantized model",
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Compare weight and bases with those of the state before anything is taken over.

        Raises:
            CheckpointError: If they differ and `allow_rebuild` does not allow it.
        """
        mark, seen = (state_dict.get(prefix + key) for key in ("fingerprint", "signature"))
        embeds = all(prefix + key in state_dict for key in self.base_names)
        if mark is not None and not hollow(self.fingerprint) and not self.allow_rebuild:
            same = torch.equal(mark.to(self.fingerprint.device), self.fingerprint)
            if not same:
                raise CheckpointError(
                    f"the adapter of {self.layer_name!r} was trained on another base weight",
                    "load the base model it was trained on, or set allow_rebuild=True to put it "
                    "on the bases of this one",
                )
            if seen is not None and not embeds and not _agree(seen, self.signature):
                raise CheckpointError(
                    f"the bases of {self.layer_name!r} cannot be made again on this machine as "
                    "they were where the adapter was trained",
                    "save the adapter again with embed_bases='always', or set allow_rebuild=True",
                )
        for key in ("fingerprint", "signature"):
            # What this module's bases are is a fact of this module, unless it takes over bases.
            if key == "fingerprint" or not embeds:
                state_dict[prefix + key] = self.get_buffer(key)
        if embeds and not self.embedded:  # taken over once, they travel from now on
            self._non_persistent_buffers_set -= set(self.base_names)
            self.embedded = True
        elif self.embedded and not embeds:
            state_dict |= {prefix + key: self.get_buffer(key) for key in self.base_names}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _signature(probe: Float[Tensor, "r width"]) -> Float[Tensor, " r"]:
    """Directions seen along one fixed random vector: of size 1, changed by any turn or flip."""
    if hollow(probe):
        return probe.new_empty(len(probe))
    vector = torch.randn(probe.shape[1], generator=generator_of("signature"), dtype=torch.float64)
    return (probe.double().cpu() @ vector).to(probe.device, torch.float32)


def _agree(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(
        first.float().cpu(), second.float().cpu(), rtol=0, atol=_SIGNATURE_TOLERANCE
    )


def choose(count: int, rank: int, selection: Selection, seed: int) -> list[int]:
    """Which of `count` singular directions are adapted, in order of decreasing value.

    Args:
        count: Directions that there are.
        rank: Directions wanted.
        selection: "principal" the largest, "minor" the smallest, "random" any.
        seed: What "random" draws from.
    """
    if selection == "principal":
        return list(range(rank))
    if selection == "minor":
        return list(range(count - rank, count))
    return sorted(random.Random(seed).sample(range(count), rank))


def embeds(found: Decomposition, indices: Sequence[int], embed: Embed, name: str) -> bool:
    """Whether chosen bases must travel with the state.

    Raises:
        ConfigError: If they must, because singular values repeat, and `embed` is "never".
    """
    loose = found.degenerate(indices)
    if loose and embed == "never":
        raise ConfigError(
            f"embed_bases = 'never', but singular values of {name!r} repeat (gap "
            f"{found.gap(indices):.1e}), so its bases cannot be made again from the weight",
            "set embed_bases='auto'",
        )
    return loose or embed == "always"


def random_bases(
    shape: tuple[int, int], rank: int, seed: int, like: Tensor
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """Random orthonormal bases of the same shapes: the control that spectral bases must beat.

    Args:
        shape: (out, in).
        rank: Directions.
        seed: What they are drawn from.
        like: Gives data type and device.
    """
    if hollow(like):
        return like.new_empty(shape[0], rank), like.new_empty(rank, shape[1])
    draw = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(width, rank, generator=draw, dtype=torch.float64))[0]
        for width in shape
    )
    return u.to(like).contiguous(), v.T.to(like).contiguous()


def seed_for(context: Context | None, *parts: str) -> int:
    """A seed from the run's own (0 without a run) and a name."""
    return seed_of(0 if context is None else context.seed, *parts)


def check_rank(method: str, field: str, rank: int, shape: tuple[int, int], name: str) -> int:
    """The rank, if the layer has so many directions.

    Raises:
        ConfigError: If not.
    """
    if rank > min(shape):
        raise ConfigError(
            f"{method}.{field} = {rank} is above the {min(shape)} directions of {name!r} "
            f"({shape[0]} x {shape[1]})",
            f"give 1 to {min(shape)}, or leave the layer out of target_modules",
        )
    return rank


def basis_type(layer: nn.Module, choice: str) -> torch.dtype:
    """Data type of bases: "float32" (float64 on a float64 base), or "base" for the weight's own."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    floating = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    return weight.dtype if choice == "base" and floating else delta_dtype(layer)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all frozen bases in a model: what trainable counts leave out."""
    return sum(m.frozen_bytes() for m in model.modules() if isinstance(m, SpectralDelta))


def account(model: nn.Module, shapes: Iterable[tuple[int, int]], context: Context | None) -> None:
    """Write what the bases cost into the run's meter.

    The decompositions are charged as "svd" as if each was computed, cached or not, so that a
    FLOP budget does not depend on a cache: 4 m n^2 + 9 n^3 FLOPs for sides m >= n, the usual
    figure for eigenvectors of a Gram matrix and the product that gives the other side.
    """
    if context is None:
        return
    sides = [(max(shape), min(shape)) for shape in shapes]
    flops = sum(4 * m * n * n + 9 * n**3 for m, n in sides)
    context.meter.charge("svd", flops=flops, matrices=len(sides))
    context.meter.facts["resident_frozen_bytes"] = resident_bytes(model)


class _ConvProjection(torch.autograd.Function):
    """A frozen convolution whose backward pass needs the input's shape and not the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.shape, ctx.layer = x.shape, layer
        ctx.save_for_backward(kernel)
        return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (kernel,), layer = ctx.saved_tensors, ctx.layer
        grad = conv2d_input(
            ctx.shape, kernel, grads[0], layer.stride, layer.padding, layer.dilation
        )
        return grad, None, None


def project(
    x: Float[Tensor, "*inputs"], directions: Float[Tensor, "r in"], layer: nn.Module
) -> Float[Tensor, "*rows r"]:
    """Inputs of a layer along frozen directions, which come last; only `directions` is kept.

    Args:
        x: What the layer takes: (..., in), or images (batch, channels, height, width).
        directions: Rows of length in; a convolution's count its kernel.
        layer: The plain layer.

    Raises:
        Conflict: If the layer is a convolution that pads with anything but zeros.
    """
    if is_linear(layer):
        return F.linear(x.to(directions.dtype), directions)
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros":
        raise Conflict(
            f"a convolution pads with {layer.padding_mode!r}",
            "leave it out of target_modules: spectral adapters need zero padding",
        )
    kernel = directions.reshape(-1, *layer.weight.shape[1:])
    seen = _ConvProjection.apply(x.to(directions.dtype), kernel, layer)
    return seen.movedim(1, -1)  # type: ignore[union-attr,return-value]


def channels_last(out: Tensor, layer: nn.Module) -> Tensor:
    """A layer's output with its features last."""
    return out if is_linear(layer) else out.movedim(1, -1)


def channels_back(out: Tensor, layer: nn.Module) -> Tensor:
    """Undo `channels_last`."""
    return out if is_linear(layer) else out.movedim(-1, 1)
