"""From glassllm's own arrays to a plain transformers LLaMA folder with a tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from .sources import Source

VERSION = 1  # raised when the conversion changes, so that a cached folder is written anew
_SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")


def convert(source: Source, language: str, folder: Path) -> None:
    """Write config, weights and tokenizer of one language into an existing folder.

    The package rotates adjacent coordinates of queries and keys, transformers rotates halves:
    the rows of both projections are permuted, which leaves every attention score as it is.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    with np.load(io.BytesIO(source.read("weights", f"{language}.npz")), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    settings = json.loads(str(arrays.pop("__config__")))
    weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    head_width = settings["d_model"] // settings["n_heads"]
    halves = [*range(0, head_width, 2), *range(1, head_width, 2)]

    def projection(name: str, rotated: bool = False) -> Any:
        matrix = weights[name].T
        if rotated:
            matrix = matrix.reshape(-1, head_width, matrix.shape[1])[:, halves].flatten(0, 1)
        return matrix.contiguous()

    state = {
        "model.embed_tokens.weight": weights["E"],
        "model.norm.weight": weights["norm_f.gamma"],
    }
    for layer in range(settings["n_layers"]):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        state |= {
            f"{there}input_layernorm.weight": weights[f"{here}norm1.gamma"],
            f"{there}post_attention_layernorm.weight": weights[f"{here}norm2.gamma"],
            f"{there}self_attn.q_proj.weight": projection(f"{here}attn.W_Q", rotated=True),
            f"{there}self_attn.k_proj.weight": projection(f"{here}attn.W_K", rotated=True),
            f"{there}self_attn.v_proj.weight": projection(f"{here}attn.W_V"),
            f"{there}self_attn.o_proj.weight": projection(f"{here}attn.W_O"),
            f"{there}mlp.gate_proj.weight": projection(f"{here}ffn.W1"),
            f"{there}mlp.up_proj.weight": projection(f"{here}ffn.W3"),
            f"{there}mlp.down_proj.weight": projection(f"{here}ffn.W2"),
        }
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _tokenizer(source, language, settings["max_len"]).save_pretrained(str(folder))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": settings["vocab_size"], "hidden_size": settings["d_model"],
        "intermediate_size": weights["blocks.0.ffn.W1"].shape[1],
        "num_hidden_layers": settings["n_layers"], "num_attention_heads": settings["n_heads"],
        "num_key_value_heads": settings["n_kv_heads"], "hidden_act": "silu",
        "max_position_embeddings": settings["max_len"], "rms_norm_eps": settings["eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": settings["rope_base"]},
        "initializer_range": settings["init_std"], "tie_word_embeddings": True, "dtype": "float32",
        "attention_bias": False, "mlp_bias": False,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    # Last, for this file says that the folder is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tokenizer(source: Source, language: str, length: int) -> Any:
    """The package's character BPE as a fast tokenizer: NFC, "▁" for a space, whole words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    parts = json.loads(source.read("weights", f"{language}.tokenizer.json"))
    merges = [(left, right) for left, right in parts["merges"]]
    pieces = [*_SPECIALS, *parts["alphabet"], *(left + right for left, right in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n|▁*[^▁\n]+|▁+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>",
        eos_token="<eos>", model_max_length=length, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
