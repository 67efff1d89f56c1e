"""A mixture of denoisers for any DataLoader: raw token ids in, padded batches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..core.context import generator_of
from ..core.errors import ConfigError, DataError, nearest
from .denoising import (
    FORMATS,
    IGNORED,
    MODE_TOKENS,
    PRESETS,
    Denoiser,
    Mixture,
    arranged,
    check_sentinels,
    denoise,
    sentinel_names,
)


def prepare_tokenizer(tokenizer: Any, sentinels: int = 100, mode_tokens: bool = True) -> int:
    """Add the sentinels and mode tokens that a tokenizer lacks.

    Args:
        tokenizer: A transformers tokenizer; changed in place.
        sentinels: How many stand for spans.
        mode_tokens: Add `[NLU]`, `[S2S]` and `[NLG]`.

    Returns:
        Rows that the model's embedding needs: `model.resize_token_embeddings(rows)`, before the
        first step.
    """
    known = tokenizer.get_vocab()
    wanted = [*sentinel_names(sentinels), *(MODE_TOKENS.values() if mode_tokens else ())]
    tokenizer.add_tokens([name for name in wanted if name not in known], special_tokens=True)
    return 1 + max(tokenizer.get_vocab().values())


class MixtureOfDenoisers:
    """Collates texts into a batch, each corrupted by a denoiser of its own (arXiv 2205.05131).

    An example is a list or a tensor of token ids, or a map with `input_ids` and, if it is to be the
    same whatever worker makes it, `index`, its number in the data set. With an index, what is drawn
    depends on (seed, epoch, index) alone: call `set_epoch` before each epoch. Without one, a stream
    of the collator's own is drawn from, which `state_dict` saves; workers cannot share it, so they
    refuse.

    Args:
        tokenizer: Has an end-of-text token, the sentinels and the mode tokens, see
            `prepare_tokenizer`.
        length: Room for the inputs (for inputs and targets together in one row).
        target_length: Room for the targets of an encoder-decoder; `length` by default.
        mixture: A `Mixture`, or the name of a preset: "uniform", "s20", "ul2r" or "t5".
        denoisers: In place of the mixture's.
        rates: Weight of each denoiser; by default the mixture's, or equal ones.
        mode_tokens: Put the mode's token in front of the inputs.
        format: "encoder_decoder", "prefix_lm" or "causal".
        sentinels: Tokens that stand for spans.
        seed: Of everything that is drawn.
        pad_to: Widths are rounded up to a multiple of this.
        decoder_start: First token of `decoder_input_ids`; the pad token by default.

    Attributes:
        raw_length: Most tokens that fit whichever denoiser is drawn: cut texts to it.

    Raises:
        ConfigError: If a setting is not allowed, or the tokenizer lacks a token.
    """

    def __init__(
        self,
        tokenizer: Any,
        length: int = 512,
        *,
        target_length: int | None = None,
        mixture: Mixture | str = "uniform",
        denoisers: Sequence[Denoiser] | None = None,
        rates: Sequence[float] | None = None,
        mode_tokens: bool = True,
        format: str = "prefix_lm",
        sentinels: int = 100,
        seed: int = 0,
        pad_to: int = 8,
        decoder_start: int | None = None,
    ) -> None:
        if format not in FORMATS:
            raise ConfigError(
                f"format = {format!r} is unknown",
                f"{nearest(format, FORMATS)}use {', '.join(FORMATS)}",
            )
        self.mixture = _mixture(mixture, denoisers, rates)
        self.format, self.length = format, length
        self.target_length = length if target_length is None else target_length
        self.seed, self.pad_to = seed, max(1, pad_to)
        self.end = _token(tokenizer.eos_token_id, "an end-of-text token")
        self.pad = _token(tokenizer.pad_token_id, "a pad token")
        self.start = self.pad if decoder_start is None else decoder_start
        known = tokenizer.get_vocab()
        names = sentinel_names(sentinels)
        modes = dict.fromkeys(MODE_TOKENS[d.mode] for d in self.mixture.used) if mode_tokens else ()
        missing = [name for name in (*names, *modes) if name not in known]
        if missing:
            raise ConfigError(
                f"the tokenizer lacks {len(missing)} tokens, first {missing[0]!r}",
                "call prepare_tokenizer(tokenizer) and give the model rows for them",
            )
        self.sentinels = [known[name] for name in names]
        self.modes = {mode: known[name] for mode, name in MODE_TOKENS.items() if name in modes}
        joint = format != "encoder_decoder"
        self.raw_length = self.mixture.raw_length(
            length - mode_tokens, self.target_length, joint=joint
        )
        if not self.raw_length:
            raise ConfigError(f"length = {length} leaves no room for text", "raise length")
        check_sentinels(self.mixture.used, self.raw_length, sentinels)
        self.generator = generator_of(seed, "collator")
        # Shared, so that workers that outlive an epoch see the next one begin.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw anew for examples with an index; call it before iterating."""
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the collator's own stream stands, and the epoch."""
        return {"generator": self.generator.get_state(), "epoch": int(self._epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.generator.set_state(state["generator"])
        self.set_epoch(state["epoch"])

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """One batch.

        Returns:
            `input_ids` (batch, width), `attention_mask` (1 for tokens), `labels` (-100 where
            nothing is scored), `denoiser_id` (batch,) and: for an encoder-decoder
            `decoder_input_ids`; for a prefix language model `bidirectional_mask` (batch, width) and
            `prefix_length` (batch,), see `nn.prefix_attention.prefix_mask`.

        Raises:
            ConfigError: If a text is shorter than 2 tokens, or does not fit.
            DataError: If there is no example.
        """
        if not len(examples):
            raise DataError("there is no example to collate", "give at least one")
        made = [self._made(example) for example in examples]
        ids = _padded([row["input_ids"] for row in made], self.pad, self.pad_to)
        tokens = [[1] * len(row["input_ids"]) for row in made]
        batch = {
            "input_ids": ids,
            "attention_mask": _padded(tokens, 0, self.pad_to),
            "labels": _padded([row["labels"] for row in made], IGNORED, self.pad_to),
            "denoiser_id": torch.tensor([row["denoiser_id"] for row in made]),
        }
        if self.format == "encoder_decoder":
            shown = batch["labels"].masked_fill(batch["labels"] == IGNORED, self.pad)
            first = torch.full_like(shown[:, :1], self.start)
            batch["decoder_input_ids"] = torch.cat([first, shown[:, :-1]], 1)
        elif self.format == "prefix_lm":
            context = _padded([row["bidirectional"] for row in made], 0, self.pad_to)
            batch |= {"bidirectional_mask": context, "prefix_length": context.sum(1)}
        return batch

    def _made(self, example: Any) -> dict[str, Any]:
        tokens, generator = self._drawn(example)
        index = self.mixture.draw(generator)
        denoiser = self.mixture.denoisers[index]
        _, inputs, targets = denoise(tokens, denoiser, generator, self.sentinels)
        row = arranged(
            inputs, targets, targets, self.format, self.modes.get(denoiser.mode), self.end
        )
        rooms = {"input_ids": self.length}
        if self.format == "encoder_decoder":
            rooms["labels"] = self.target_length
        for key, room in rooms.items():
            if len(row[key]) > room:
                raise ConfigError(
                    f"{denoiser} makes {len(row[key])} {key} of {len(tokens)} tokens, and there is "
                    f"room for {room}",
                    f"cut texts to raw_length = {self.raw_length}",
                )
        return {**row, "denoiser_id": index}

    def _drawn(self, example: Any) -> tuple[list[int], torch.Generator]:
        """Token ids of an example, and what it draws from."""
        index = None
        if isinstance(example, Mapping):
            example, index = example["input_ids"], example.get("index")
        tokens = example.tolist() if isinstance(example, Tensor) else list(example)
        if index is not None:
            return tokens, generator_of(self.seed, "collator", int(self._epoch), int(index))
        if get_worker_info() is not None:
            raise ConfigError(
                "workers of a DataLoader would all draw the same",
                'give examples as {"input_ids": ids, "index": number}, or set num_workers=0',
            )
        return tokens, self.generator


def _mixture(
    mixture: Mixture | str, denoisers: Sequence[Denoiser] | None, rates: Sequence[float] | None
) -> Mixture:
    if isinstance(mixture, str):
        if mixture not in PRESETS:
            raise ConfigError(
                f"mixture = {mixture!r} is unknown",
                f"{nearest(mixture, PRESETS)}use {', '.join(PRESETS)}",
            )
        mixture = PRESETS[mixture]
    if denoisers is not None:
        return Mixture(tuple(denoisers), tuple(rates or ()))
    return mixture if rates is None else Mixture(mixture.denoisers, tuple(rates))


def _token(index: int | None, name: str) -> int:
    if index is None:
        raise ConfigError(f"the tokenizer has no {name.partition(' ')[2]}", f"give it {name}")
    return int(index)


def _padded(rows: Sequence[Sequence[int]], filler: int, multiple: int) -> Tensor:
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
