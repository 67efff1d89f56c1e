"""Pre-train on a mixture of denoisers: short spans, long spans, and continuations of a text.

Tay et al., arXiv:2205.05131 (ICLR 2023). Each training example is drawn one of several denoisers;
the text is corrupted as it says, and a mode token in front of the inputs names its kind: `[NLU]`
regular, `[S2S]` sequential, `[NLG]` extreme. See `nn.denoising` for the denoisers themselves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import nn

from ...core.card import Card
from ...core.errors import ConfigError, Conflict, DataError
from ...core.live import Live
from ...core.losses import Batch
from ...core.method import (
    Context,
    Draw,
    Example,
    OnBatch,
    OnModel,
    OnStep,
    Seen,
    Step,
    Watcher,
)
from ...nn.denoising import (
    IGNORED,
    MODE_TOKENS,
    PRESETS,
    CausalDenoising,
    Denoiser,
    Mixture,
    PrefixDenoising,
    SpanCorruption,
    arranged,
    check_sentinels,
    corrupt,
    denoise,
    sentinel_names,
)
from ...nn.prefix_attention import check_prefix_attention, prefix_attention

_Spans = tuple[Literal["R", "X"], Annotated[float, Ge(1)], float]
_Suffix = tuple[Literal["S"], float]


@dataclass(frozen=True, kw_only=True)
class UL2(OnBatch, OnModel, OnStep):
    """Mixture of denoisers with mode tokens.

    A row's tokens are raw text: `input_ids` in causal language modeling, both halves of a block in
    sequence to sequence. All denoisers get rows of one length, the longest that fits `batch.length`
    whichever is drawn, so that no text is thrown away and what an example holds does not depend on
    the draw; the published preprocessing fills the inputs of each denoiser from texts of its own
    length. Validation and test rows are not corrupted. What a row does not score stays unscored.
    The log shows `loss.R`, `loss.S` and `loss.X` beside the loss.

    Attributes:
        preset: "uniform" (all seven denoisers equally often, as in the paper's appendix), "s20"
            (section 4.5: 20 % sequential, 20 % each regular, 10 % each extreme), "ul2r" (arXiv
            2210.11399: half sequential, a quarter long spans, a quarter regular) or "t5" (regular
            spans of 3 tokens, 15 %).
        denoisers: In place of the preset's: ("R", mean span, rate), ("X", mean span, rate) or
            ("S", mean rate); ("S", 1.0) predicts everything, as a causal model does.
        rates: Weight of each denoiser; by default the preset's, or equal ones.
        mode_tokens: Put the mode's token in front of the inputs.
        format: "encoder_decoder", "prefix_lm" (inputs and targets in one row, attention both ways
            over the inputs), "causal" (the same with causal attention) or "auto": the first in
            sequence to sequence, the second in causal language modeling.
        split: How "S" draws the suffix: "mean" varies evenly up to twice the rate (25 % on average,
            as in the paper's table), "uniform" has every length equally often (50 %, as in the
            appendix's code).
        roll: Let spans lie anywhere. Without it the last span ends the text, as published, and a
            single one is always a suffix.
        sentinels: Tokens that stand for spans; 100 as in T5's vocabulary.
    """

    card: ClassVar[Card] = Card(
        name="ul2",
        title="UL2: Unifying Language Learning Paradigms",
        paper=27,
        arxiv="2205.05131",
        group="objectives",
        summary="Pre-train on a mixture of denoisers, with mode tokens that name their kind.",
        authors="Yi Tay, Mostafa Dehghani, Vinh Q. Tran, Xavier Garcia, Jason Wei, Xuezhi Wang, "
        "Hyung Won Chung, Siamak Shakeri, Dara Bahri, Tal Schuster, Huaixiu Steven Zheng, "
        "Denny Zhou, Neil Houlsby, Donald Metzler",
        year=2022,
        claims=("example.corruption",),
        saves=("tokens",),
    )
    preset: Literal["uniform", "s20", "ul2r", "t5"] = "uniform"
    denoisers: tuple[_Spans | _Suffix, ...] | None = None
    rates: tuple[Annotated[float, Ge(0)], ...] | None = None
    mode_tokens: bool = True
    format: Literal["auto", "prefix_lm", "causal", "encoder_decoder"] = "auto"
    split: Literal["mean", "uniform"] = "mean"
    roll: bool = False
    sentinels: Annotated[int, Ge(1)] = 100

    def validate(self) -> None:
        """Refuse denoisers and rates that do not go together."""
        try:
            _ = self.mixture
        except ConfigError as error:
            named = error.problem.startswith(("rates", "denoisers"))
            field = "ul2." if named else "ul2.denoisers: "
            raise ConfigError(f"{field}{error.problem}", error.remedy) from None

    @property
    def mixture(self) -> Mixture:
        """The denoisers and their weights."""
        return _mixture(self)

    # ---- before anything is encoded --------------------------------------------------------------

    def tokens(self, tokenizer: Any) -> tuple[str, ...]:
        """The sentinels, and the tokens of the modes that are drawn."""
        modes = dict.fromkeys(MODE_TOKENS[d.mode] for d in self.mixture.used)
        return (*sentinel_names(self.sentinels), *(modes if self.mode_tokens else ()))

    def raw_length(self, length: int, task: str) -> int:
        """Most raw tokens that fit `length` with any denoiser, sentinels and mode token counted.

        Raises:
            ConfigError: If the task has no text to predict, the length leaves no room, or there are
                fewer sentinels than a row may need.
        """
        joint = self.format_for(task) != "encoder_decoder"
        raw = _longest(self.mixture, length - self.mode_tokens, joint)
        if not raw:
            raise ConfigError(
                f"batch.length = {length} leaves no room for corrupted text", "raise batch.length"
            )
        check_sentinels(self.mixture.used, raw, self.sentinels)
        return raw

    def format_for(self, task: str) -> str:
        """How an example is laid out in a task.

        Raises:
            ConfigError: If the task predicts no text, or the format is not one of its own.
        """
        fitting = {
            "causal-language-modeling": ("prefix_lm", "causal"),
            "sequence-to-sequence": ("encoder_decoder",),
        }.get(task)
        if fitting is None:
            raise ConfigError(
                f"'ul2' makes text to predict, and the task is {task or 'not known'}",
                "use causal-language-modeling or sequence-to-sequence; mode_token goes with others",
            )
        if self.format == "auto":
            return fitting[0]
        if self.format not in fitting:
            raise ConfigError(
                f"ul2.format = {self.format!r} does not go with {task}",
                f"use {' or '.join(map(repr, fitting))}",
            )
        return self.format

    # ---- every example ---------------------------------------------------------------------------

    def transform(self, example: Example, draw: Draw, step: Step, context: Context) -> Example:
        """Inputs and targets of one denoiser, drawn from the example's own streams.

        Raises:
            DataError: If the row is no text, or a single token.
            Conflict: If another method has put a mode token in front already.
        """
        form = self.format_for(context.task)
        tokenizer = context.tokenizer
        end = tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                "'ul2' ends targets with an end-of-text token, and the tokenizer has none",
                "use another model.tokenizer",
            )
        tokens, scored = _raw(example, form)
        if context.length is not None:
            most = self.raw_length(context.length, context.task)
            tokens, scored = tokens[:most], scored[:most]
        if len(tokens) > 2 and tokens[-1] == end:
            # One is put behind the targets anyway.
            tokens, scored = tokens[:-1], scored[:-1]
        self._refuse_mode_token(tokens, tokenizer)
        mixture = self.mixture
        index = mixture.draw(draw(example, "ul2 denoiser"))
        denoiser = mixture.denoisers[index]
        ids = _ids(tokenizer, self.sentinels)
        try:
            noise, inputs, targets = denoise(tokens, denoiser, draw(example, "ul2 spans"), ids)
        except ConfigError as error:
            raise DataError(f"row {example['id']!r}: {error.problem}", error.remedy) from None
        labels, end_label = targets, end
        if IGNORED in scored:
            spans = ids if isinstance(denoiser, SpanCorruption) else None
            labels = corrupt(scored, noise, spans)[1]
            if all(label == IGNORED for label in scored):
                labels, end_label = [IGNORED] * len(labels), IGNORED
        token = MODE_TOKENS[denoiser.mode]
        mode = tokenizer.convert_tokens_to_ids(token) if self.mode_tokens else None
        made = arranged(inputs, targets, labels, form, mode, end, end_label)
        return {**example, **made, "denoiser_id": index}

    def _refuse_mode_token(self, tokens: Sequence[int], tokenizer: Any) -> None:
        known = tokenizer.get_added_vocab()
        if tokens and tokens[0] in [known.get(name) for name in MODE_TOKENS.values()]:
            raise Conflict(
                "'mode_token' puts a mode token in front of every row, and 'ul2' one of its own",
                "give them different stages",
            )

    # ---- the model -------------------------------------------------------------------------------

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """The model as it is: only what it attends to differs, and `bind` tells it."""
        return model

    def bind(self, model: nn.Module, batch: Batch) -> contextlib.AbstractContextManager[Any]:
        """Attention both ways over the contexts of a batch, where it has any."""
        return prefix_attention(model, batch)

    def watch(self, live: Live) -> Watcher:
        """Loss of each mode for the log; the prefix attention is proved first.

        Raises:
            Conflict: If the model does not attend as it is told.
        """
        if self.format_for(live.context.task) == "prefix_lm":
            check_prefix_attention(live.model)
        return _ByMode([d.mode for d in self.mixture.denoisers], live.context)


@functools.lru_cache(maxsize=64)
def _mixture(method: UL2) -> Mixture:
    known = PRESETS[method.preset]
    if method.denoisers is None:
        denoisers, rates = known.denoisers, method.rates or known.rates
    else:
        denoisers, rates = tuple(map(_denoiser, method.denoisers)), method.rates or ()
    return Mixture(tuple(_settled(d, method) for d in denoisers), rates)


def _denoiser(entry: tuple[Any, ...]) -> Denoiser:
    if entry[0] != "S":
        return SpanCorruption(entry[1], entry[2], entry[0])
    return CausalDenoising() if entry[1] == 1 else PrefixDenoising(entry[1])


def _settled(denoiser: Denoiser, method: UL2) -> Denoiser:
    if isinstance(denoiser, SpanCorruption):
        return replace(denoiser, roll=method.roll)
    if isinstance(denoiser, PrefixDenoising):
        return replace(denoiser, distribution=method.split)
    return denoiser


@functools.lru_cache(maxsize=256)
def _longest(mixture: Mixture, room: int, joint: bool) -> int:
    return mixture.raw_length(room, joint=joint)


def _ids(tokenizer: Any, count: int) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(sentinel_names(count)))


def _raw(example: Example, form: str) -> tuple[list[int], list[int]]:
    """Raw tokens of a row, and the same with -100 for those that are not scored."""
    tokens, labels = example["input_ids"], example["labels"]
    if form != "encoder_decoder":
        return tokens, labels
    if any(label < 0 for label in labels):
        raise DataError(
            f"row {example['id']!r}: a target is left out, so the text is not known",
            "use data.blocks: true on plain text",
        )
    joined = [*tokens, *labels]
    return joined, joined


class _ByMode(Watcher):
    """Shows the step's plain loss by mode."""

    def __init__(self, modes: Sequence[str], context: Context) -> None:
        self.modes, self.context = modes, context
        self._drawn: list[int] = []

    def before_forward(self, step: Step, batches: list[Batch]) -> None:
        """Which denoiser each example of the step has."""
        self._drawn = [index for batch in batches for index in batch["denoiser_id"].tolist()]

    def after_backward(self, step: Step, seen: Seen) -> None:
        """Mean over the scored tokens (or sequences) of each mode, in nats."""
        drawn, self._drawn = [self.modes[index] for index in self._drawn], []
        for mode in sorted(set(drawn)):
            mine = torch.tensor([found == mode for found in drawn], device=seen.values.device)
            weights = seen.weights[mine]
            if float(weights.sum()) > 0:
                mean = (seen.values[mine] * weights).sum() / weights.sum()
                self.context.show(f"loss.{mode}", float(mean))
