"""What a language model says about each document of a corpus, packed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int
from torch import Tensor, nn

from .bins import pack
from .isolation import check_isolation, isolated
from .packing import Sequences, as_lists, prepack


class DocumentNLL(NamedTuple):
    """Negative log-likelihood of each document, alone.

    Attributes:
        nats: Sum over the predicted tokens of -ln p. Shape (documents,).
        tokens: Predicted tokens: all but the first. Shape (documents,).
    """

    nats: Float64[Tensor, " documents"]
    tokens: Int[Tensor, " documents"]

    @property
    def mean(self) -> Float64[Tensor, " documents"]:
        """Nats a predicted token; NaN for a document of one token."""
        return self.nats / self.tokens


@torch.no_grad()
def packed_nll(
    model: nn.Module,
    corpus: Sequences,
    *,
    capacity: int | None = None,
    method: str = "bfd",
    rows: int = 4,
    attention: str = "auto",
) -> DocumentNLL:
    """Negative log-likelihood of every document, none of them seeing another.

    The whole corpus is packed, then read a few rows at a time. To have the first token
    predicted too, start every document with the model's first token.

    Args:
        model: A causal transformers language model in evaluation mode.
        corpus: Tokens of each document, at least one.
        capacity: Tokens that a row may hold; the longest document by default.
        method: How they are packed: see `pack`.
        rows: Rows of one forward pass; memory is rows x capacity x vocabulary.
        attention: How documents are kept apart: see `isolated`.

    Raises:
        ConfigError: An empty document, or one longer than the capacity.
        Conflict: The model's attention does not keep documents apart.
    """
    documents = as_lists(corpus)
    check_isolation(model, attention)
    device = next(model.parameters()).device
    nats = torch.zeros(len(documents), dtype=torch.float64)
    lengths = [len(document) for document in documents]
    bins = pack(lengths, capacity, method)
    room = max(lengths) if capacity is None else capacity
    for start in range(0, len(bins), rows):
        chosen = [number for some in bins[start : start + rows] for number in some]
        batch = prepack([documents[n] for n in chosen], room, method).to(device)
        with isolated(model, batch, attention) as told:
            logits = model(**told, use_cache=False).logits
        nats[chosen] = _nats(logits, batch.input_ids, batch.segment_ids, len(chosen))
    return DocumentNLL(nats, torch.tensor(lengths) - 1)


def _nats(logits: Tensor, tokens: Tensor, owner: Tensor, count: int) -> Any:
    """Sum of -ln p over the tokens that follow one of their own segment."""
    inside = (owner[:, 1:] == owner[:, :-1]) & (owner[:, 1:] >= 0)
    each = F.cross_entropy(logits[:, :-1][inside].float(), tokens[:, 1:][inside], reduction="none")
    sums = torch.zeros(count, dtype=torch.float64)
    return sums.index_add(0, owner[:, 1:][inside].cpu(), each.double().cpu())
