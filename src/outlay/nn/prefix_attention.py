"""Attention of a prefix language model: both ways over the context, causal over the targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..core.errors import Conflict
from ..core.losses import Batch


def prefix_mask(
    bidirectional: Shaped[Tensor, "rows width"],
    attention_mask: Tensor,
    segment_ids: Tensor | None = None,
) -> Bool[Tensor, "rows 1 width width"]:
    """Which position sees which.

    Every position sees itself and what comes before it; positions of the context see the whole
    context. Padding on the right sees and is seen as the given mask says, and itself.

    Args:
        bidirectional: Above 0 for the context of a row.
        attention_mask: Above 0 for tokens, shape (rows, width); or which position sees which in
            rows that are packed, boolean, shape (rows, 1, width, width).
        segment_ids: Example of each position of packed rows: contexts stay apart.
    """
    context, width = bidirectional > 0, bidirectional.shape[1]
    both = context[:, :, None] & context[:, None, :]
    if attention_mask.dim() == 4:
        seen = attention_mask[:, 0].bool()
    else:
        ones = torch.ones(width, width, dtype=torch.bool, device=context.device)
        seen = ones.tril() & (attention_mask > 0)[:, None, :] | torch.eye(
            width, dtype=torch.bool, device=context.device
        )
    if segment_ids is not None:
        both = both & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return (seen | both)[:, None]


@contextlib.contextmanager
def prefix_attention(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside, the model attends as `batch["bidirectional"]` says; without it as ever.

    The batch keeps its own mask, which says what is padding.

    Args:
        model: A causal transformers model, plain or adapted.
        batch: Its rows, on the model's device.
    """
    if "bidirectional" not in batch:
        yield
        return
    mask: Tensor = prefix_mask(
        batch["bidirectional"], batch["attention_mask"], batch.get("segment_ids")
    )
    if _implementation(model) == "eager":
        # This implementation adds the mask to the scores.
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        blank = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        mask = blank.masked_fill_(~mask, torch.finfo(dtype).min)

    def told(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    handle = model.register_forward_pre_hook(told, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_prefix_attention(model: nn.Module) -> None:
    """Prove that a model reads a context both ways and never a target beforehand.

    A changed target must leave every earlier output as it was, bit for bit; a changed last token of
    the context must change the output at the first.

    Raises:
        Conflict: Naming the attention implementation.
    """
    implementation = _implementation(model)
    if implementation not in ("sdpa", "eager"):
        raise Conflict(
            f"the attention implementation {implementation!r} takes no mask of a context",
            'load the model with attn_implementation="sdpa", or use format="causal"',
        )
    config = _config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    narrow = getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")
    if kinds != {"full_attention"} or narrow:
        raise Conflict(
            "the model has layers that see a part of the text alone, which one mask for all layers "
            "cannot say",
            'use format="causal"',
        )
    first = next(model.parameters())
    if first.is_meta or isinstance(first, FakeTensor):  # planned, not run
        return
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    row = torch.arange(1, 7, device=first.device) % size
    target, context = row.clone(), row.clone()
    target[4] = (row[4] + 1) % size
    context[2] = (row[2] + 1) % size
    # One by one: where a row stands in a batch may change the last bit.
    plain, late, early = (_outputs(model, some) for some in (row, target, context))
    if not torch.equal(plain[:4], late[:4]):
        wrong = "lets a target change what is predicted before it"
    elif torch.equal(plain[0], early[0]):
        wrong = "does not read a context both ways"
    else:
        return
    raise Conflict(
        f"with the attention implementation {implementation!r} the model {wrong}",
        'load it with attn_implementation="sdpa", or use format="causal"',
    )


@torch.no_grad()
def _outputs(model: nn.Module, row: Tensor) -> Tensor:
    """Logits of a row whose first three tokens are context."""
    rows = row[None]
    context = torch.arange(rows.shape[1], device=rows.device)[None] < 3
    batch = {"bidirectional": context, "attention_mask": torch.ones_like(rows)}
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with prefix_attention(model, batch):
            return model(input_ids=rows, attention_mask=batch["attention_mask"]).logits[0]
    finally:
        for module, mode in modes:
            module.training = mode


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise Conflict("the model is no transformers model", 'use format="causal"')
    return config.get_text_config(decoder=True)


def _implementation(model: nn.Module) -> str:
    return str(getattr(_config(model), "_attn_implementation", None) or "eager")
