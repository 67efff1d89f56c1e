"""Tiny causal models of each family, and ragged prompts."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 97
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


def tiny(family: str = "llama", implementation: str = "sdpa", **changes: Any) -> Any:
    """A causal language model of two layers, in evaluation mode, with large enough weights."""
    import transformers as t

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    configs = {
        "llama": t.LlamaConfig, "qwen2": t.Qwen2Config, "mistral": t.MistralConfig,
        "qwen3": t.Qwen3Config,
    }  # fmt: skip
    if family == "gpt2":
        config: Any = t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
            initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        if family == "qwen3":
            shape["head_dim"] = 8
        config = configs[family](**shape | changes)
    config._attn_implementation = implementation
    return t.AutoModelForCausalLM.from_config(config).eval()


def ragged(lengths: tuple[int, ...] = (7, 1, 12, 3, 2, 9, 1, 5), seed: int = 1) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]
