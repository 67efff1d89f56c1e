"""Small models and data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlay.core.losses import Losses, Objective, Term, model_inputs

F64 = torch.float64


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same weights every time, whatever torch's generators hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


class Net(nn.Module):
    """Two layers and a head, with dropout or batch normalization if asked."""

    base_model_prefix = "body"

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.body = nn.Sequential(
            nn.Linear(6, 8), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Language(nn.Module):
    """Causal averaging over tokens; the output layer is the embedding."""

    base_model_prefix = "body"

    def __init__(self, vocabulary: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.mix = nn.Linear(8, 8)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(8, vocabulary, bias=False)
        self.out.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, mixing: Tensor | None = None
    ) -> Tensor:
        hidden = self.embed(input_ids)
        if mixing is None:
            width = input_ids.shape[1]
            mixing = torch.ones(width, width, dtype=hidden.dtype).tril()
            mixing = mixing / mixing.sum(1, keepdim=True)
        hidden = mixing.to(hidden.dtype) @ hidden
        hidden = hidden + torch.tanh(self.mix(self.drop(hidden)))
        return self.out(hidden)


def vectors(count: int = 48) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "id": i,
            "domain": "abc"[i % 3],
            "x": torch.randn(6, generator=generator, dtype=F64),
            "labels": i % 3,
        }
        for i in range(count)
    ]


def sentences(count: int = 40, masked: bool = False) -> list[dict[str, Any]]:
    """Rows of 3 to 9 tokens; every third has labels that are masked in part."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(count):
        length = 3 + int(torch.randint(0, 7, (), generator=generator))
        tokens = torch.randint(0, 10, (length,), generator=generator).tolist()
        labels = [-100] * length if masked else list(tokens)
        if i % 3 == 0:
            labels[: length // 2 + 1] = [-100] * (length // 2 + 1)
        row = {"id": f"s{i}", "domain": "xy"[i % 2], "input_ids": tokens, "labels": labels}
        rows.append(row)
    return rows


class Plain(Objective):
    """Cross entropy of each row; gives features for couplings."""

    def forward(self, model: nn.Module, batch: Any, step: Any) -> Losses:
        logits = model(**model_inputs(batch))
        values = F.cross_entropy(logits, batch["labels"], reduction="none", ignore_index=-100)
        weights = (batch["labels"] != -100).to(values)
        outputs = {"logits": logits, "features": torch.tanh(logits)}
        return Losses({"task": Term(values, weights)}, "task", outputs)

    def weight_sums(self, batch: Any) -> dict[str, float]:
        return {"task": float((batch["labels"] != -100).sum())}
