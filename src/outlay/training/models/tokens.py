"""Tokenizers from local folders, one of plain bytes, and rows for tokens that are added."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.method import generator_of

_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
          "sentencepiece.bpe.model")  # fmt: skip
_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
# Noise of a new row, in standard deviations of the rows that are there.
NEW_ROW_NOISE = 0.1


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder; never looks anywhere else.

    Raises:
        ConfigError: If the folder holds no tokenizer, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    from .quiet import quiet_transformers

    if not any((folder / name).is_file() for name in _FILES):
        raise ConfigError(
            f"{str(folder)!r} holds no tokenizer",
            "save the model's tokenizer there, or name another folder with model.tokenizer",
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"the tokenizer in {str(folder)!r} cannot be read ({type(error).__name__}: "
            f"{reason[0][:120] if reason else ''})",
            "save it again with tokenizer.save_pretrained(folder)",
        ) from None
    with_padding(tokenizer)
    return tokenizer


def with_padding(tokenizer: Any) -> Any:
    """Give a tokenizer without a pad token its end-of-text (or unknown) token for padding.

    Padded positions are masked and never scored, so no token needs to be added for them.
    """
    if tokenizer.pad_token is None:
        for name in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
            if name is not None:
                tokenizer.pad_token = name
                return tokenizer
        raise ConfigError(
            "the tokenizer has no pad, end-of-text or unknown token",
            "set pad_token in its tokenizer_config.json",
        )
    return tokenizer


def train_tokenizer(
    rows: Sequence[Mapping[str, Any]], size: int | None, folder: Path | None = None
) -> str:
    """Train byte-level byte-pair encoding on the texts of rows; kept in the cache folder.

    Args:
        rows: Training rows with `text` (or `prompt` and `completion`).
        size: Tokens in all, 256 bytes and 4 special ones included; 4,096 by default.
        folder: Where trained tokenizers are kept; the cache folder by default.

    Returns:
        The tokenizer as `tokenizer_of` reads it.

    Raises:
        ConfigError: If `size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = 4096 if size is None else size
    letters = pre_tokenizers.ByteLevel.alphabet()
    if size < len(letters) + len(_SPECIALS):
        raise ConfigError(
            f"model.vocabulary = {size} leaves no room for 256 bytes and {len(_SPECIALS)} special "
            "tokens",
            "raise it, or leave model.tokenizer out: then bytes are the tokens",
        )
    texts = [row[key] for row in rows for key in ("text", "prompt", "completion") if key in row]
    digest = hashlib.blake2b(f"1\x1f{size}".encode(), digest_size=16)
    for text in texts:
        digest.update(b"\x1f" + text.encode())
    if folder is None:
        from ...assets.sources import cache_folder

        folder = cache_folder() / "tokenizers"
    place = folder / f"{digest.hexdigest()}.json"
    if place.is_file():
        return place.read_text(encoding="utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(_SPECIALS),
        initial_alphabet=sorted(letters),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    text = backend.to_str()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        spare = place.with_name(f".{place.name}.{os.getpid()}")
        spare.write_text(text, encoding="utf-8")
        spare.replace(place)
    except OSError:
        pass  # what cannot be kept is trained again next time
    return text


def tokenizer_of(text: str) -> Any:
    """A tokenizer from what `train_tokenizer` gave."""
    from tokenizers import Tokenizer

    return _wrapped(Tokenizer.from_str(text))


def byte_tokenizer(ends: bool = False) -> Any:
    """A tokenizer of 256 bytes and 4 special tokens: reads any text, learns from none.

    Args:
        ends: Put the end-of-text token behind every text by itself, as T5's tokenizers do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*_SPECIALS, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>",
            pair="$A </s> $B </s>",
            special_tokens=[("</s>", vocabulary["</s>"])],
        )
    return _wrapped(backend)


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk = _SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def token_bytes(tokenizer: Any) -> Tensor:
    """Bytes of text that each token id stands for, 0 for special tokens. Shape (vocabulary,).

    Exact for byte-level, byte-fallback and WordPiece vocabularies up to the spaces that a
    tokenizer drops or adds by itself.
    """
    size = len(tokenizer)
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    byte_level = '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
    counts = torch.zeros(size, dtype=torch.long)
    for index, piece in enumerate(pieces):
        if index in special or piece is None:
            continue
        if byte_level:
            counts[index] = len(piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            counts[index] = 1
        else:
            counts[index] = len(piece.removeprefix("##").replace("▁", " ").encode())
    return counts


def grow_tokens(
    model: nn.Module | None, tokenizer: Any, names: Sequence[str], seed: int = 0
) -> tuple[int, ...]:
    """Add tokens to a tokenizer and rows for them to a model's embeddings.

    A new row is the mean of the rows that are there plus noise of 0.1 of their standard
    deviation, drawn from (seed, token): the same token starts the same in every run with that
    seed, whatever else is added. Tied embeddings stay tied.

    Args:
        model: Grown in place; None grows the tokenizer alone.
        tokenizer: Grown in place.
        names: Tokens; those that exist already are left alone.
        seed: The run's seed.

    Returns:
        Ids of the tokens that were added.
    """
    known = set(tokenizer.get_vocab())
    fresh = [name for name in dict.fromkeys(names) if name not in known]
    if not fresh:
        return ()
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in fresh], True)
    if model is not None:
        grow_rows(model, tokenizer, fresh, seed)
    return tuple(int(tokenizer.convert_tokens_to_ids(name)) for name in fresh)


def grow_rows(model: nn.Module, tokenizer: Any, names: Sequence[str], seed: int = 0) -> None:
    """Give a model rows for tokens that its tokenizer has already, as `grow_tokens` does.

    Args:
        model: Grown in place; on the meta device shapes alone change.
        tokenizer: Knows the tokens.
        names: Tokens whose rows are drawn anew; all others are left alone.
        seed: The run's seed.
    """
    ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in dict.fromkeys(names)}
    body: Any = model
    before = body.get_input_embeddings().weight.shape[0]
    if max(ids.values()) >= before:
        # transformers draws the rows that it adds from the global generator; they are replaced.
        with torch.random.fork_rng(devices=[]):
            body.resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
    old = min(before, min(ids.values()))
    done: set[int] = set()
    for stream, layer in (
        ("token", body.get_input_embeddings()),
        ("output token", body.get_output_embeddings()),
    ):
        weight = getattr(layer, "weight", None)
        if weight is None or id(weight) in done or weight.is_meta:
            continue
        done.add(id(weight))
        with torch.no_grad():
            rows = weight[:old].double()
            mean, spread = rows.mean(0), rows.std(0)
            for name, index in ids.items():
                noise = torch.randn(mean.shape, generator=generator_of(seed, stream, name))
                weight[index] = (mean + NEW_ROW_NOISE * spread * noise.to(mean)).to(weight.dtype)
            bias = getattr(layer, "bias", None)
            if bias is not None and bias.shape[0] == weight.shape[0]:
                for index in ids.values():
                    bias[index] = bias[:old].mean()
