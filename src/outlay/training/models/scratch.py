"""Configs of small models from scratch: LLaMA-, GPT-2-, BERT-, T5- and ViT-shaped, and a CNN."""

from __future__ import annotations

from typing import Any

from ...core.errors import ConfigError
from ..data.labels import Labels
from ..specs import ModelSpec

# Tasks that each shape has a head for.
TASKS_OF = {
    "llama": ("sequence-classification", "regression", "multi-label-classification",
              "causal-language-modeling"),
    "gpt2": ("sequence-classification", "regression", "multi-label-classification",
             "causal-language-modeling"),
    "bert": ("sequence-classification", "regression", "multi-label-classification",
             "masked-language-modeling"),
    "t5": ("sequence-classification", "regression", "multi-label-classification",
           "sequence-to-sequence"),
    "vit": ("image-classification", "masked-image-modeling"),
    "cnn": ("image-classification",),
}  # fmt: skip


def scratch_config(spec: ModelSpec, task: str, labels: Labels, tokenizer: Any, length: int) -> Any:
    """A config of the asked shape; the feed-forward part is the family's usual multiple."""
    import transformers

    kind = str(spec.config)
    if task not in TASKS_OF[kind]:
        fitting = [name for name, tasks in TASKS_OF.items() if task in tasks]
        raise ConfigError(
            f"model.config = {kind!r} has no head for {task}", f"use {' or '.join(fitting)}"
        )
    width, layers = spec.width or 128, spec.layers or 4
    heads = spec.heads or max(1, width // 32)
    if kind != "cnn" and (width % heads or (kind == "llama" and (width // heads) % 2)):
        raise ConfigError(
            f"model.heads = {heads} does not divide model.width = {width}"
            + (" into even parts" if kind == "llama" else ""),
            "choose width = heads * 32",
        )
    if kind in ("vit", "cnn"):
        return _image_config(kind, width, layers, heads, labels)
    size = spec.vocabulary or len(tokenizer)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    positions = max(512, length)
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=size, hidden_size=width, num_hidden_layers=layers,
            intermediate_size=-(-8 * width // 24) * 8, num_attention_heads=heads,
            max_position_embeddings=positions, tie_word_embeddings=True, **ids,
        )  # fmt: skip
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=size, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions,
            **ids,
        )  # fmt: skip
    if kind == "bert":
        return transformers.BertConfig(
            vocab_size=size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, max_position_embeddings=positions, **ids,
        )  # fmt: skip
    start = tokenizer.pad_token_id
    return transformers.T5Config(
        vocab_size=size, d_model=width, num_layers=layers, num_heads=heads, d_kv=width // heads,
        d_ff=4 * width, pad_token_id=start, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=start,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


def _image_config(kind: str, width: int, layers: int, heads: int, labels: Labels) -> Any:
    if len(labels.image) != 3:
        raise ConfigError("the data holds no images", "give rows with pixel_values")
    channels, height, breadth = labels.image
    if kind == "cnn":
        from .convnet import ConvNetConfig

        return ConvNetConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            image_size=(height, breadth),
            num_channels=channels,
        )
    import transformers

    # The smallest patch that leaves at most 64 of them.
    fitting = [p for p in range(1, min(height, breadth) + 1) if not (height % p or breadth % p)]
    small = [p for p in fitting if p > 1 and (height // p) * (breadth // p) <= 64]
    return transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, image_size=(height, breadth), num_channels=channels,
        patch_size=small[0] if small else fitting[-1], hidden_dropout_prob=0.0,
    )  # fmt: skip
