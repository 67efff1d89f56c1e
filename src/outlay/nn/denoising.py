r"""Text into inputs and targets: masks of whole spans, sentinels, and the way back.

Span corruption is T5's (arXiv 1910.10683), as UL2's preprocessor calls it: of L tokens,
$m = \mathrm{clamp}(\mathrm{round}(L r), 1, L - 1)$ are noise in
$s = \max(1, \mathrm{round}(m / \mu))$ spans; noise and kept tokens are each split into s parts,
uniformly among all compositions, and interleaved, a kept span first. How many tokens and spans are
noise is the same in every draw; where they lie is not.

Tay et al., arXiv 2205.05131 (preprocessor in appendix 9.2), mix seven such settings in three modes:
regular (R), sequential (S) and extreme (X).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..core.errors import ConfigError

IGNORED = -100
FORMATS = ("encoder_decoder", "prefix_lm", "causal")
# What says to the model which mode a text was made in, or which one is wanted.
MODE_TOKENS = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}


def random_composition(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Positive parts of a whole number, uniform among all its compositions of so many parts.

    Args:
        total: What the parts add up to.
        parts: At most `total`.
        generator: The only source of randomness.
    """
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].tolist()
    bounds = [0, *sorted(cut + 1 for cut in cuts), total]
    return [end - start for start, end in itertools.pairwise(bounds)]


def span_counts(length: int, mean_span: float, rate: float) -> tuple[int, int]:
    """Noise tokens and noise spans of a text, equal in every draw.

    There are never more spans than noise tokens or kept tokens, so that each has a part.

    Args:
        length: Tokens of the text, >= 2.
        mean_span: Mean length of a noise span, >= 1.
        rate: Share of noise tokens, in (0, 1).
    """
    noise = min(max(round(length * rate), 1), length - 1)
    return noise, min(max(1, round(noise / mean_span)), noise, length - noise)


def span_mask(
    length: int, mean_span: float, rate: float, generator: torch.Generator, roll: bool = False
) -> list[bool]:
    """Which tokens are noise: whole spans, the first of them kept and the last one noise.

    One span alone is therefore always a suffix.

    Args:
        length: Tokens of the text, >= 2.
        mean_span: Mean length of a noise span, >= 1.
        rate: Share of noise tokens, in (0, 1).
        generator: The only source of randomness.
        roll: Turn the mask by a random number of tokens, so that spans lie anywhere; one may be
            cut in two by the ends.
    """
    noise, spans = span_counts(length, mean_span, rate)
    lost = random_composition(noise, spans, generator)
    kept = random_composition(length - noise, spans, generator)
    mask = [is_noise for k, n in zip(kept, lost) for is_noise in [False] * k + [True] * n]
    if not roll:
        return mask
    turn = int(torch.randint(length, (), generator=generator))
    return mask[-turn:] + mask[:-turn] if turn else mask


def corrupt(
    tokens: Sequence[int], noise: Sequence[bool], sentinels: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Inputs and targets of a masked text.

    In the inputs a sentinel stands for each noise span; in the targets each noise span comes behind
    its sentinel. Without sentinels the inputs are the kept tokens and the targets the others.

    Args:
        tokens: Token ids; or one number a token of any meaning.
        noise: True where a token is noise.
        sentinels: Ids in the order of use.

    Raises:
        ConfigError: If there are more spans than sentinels.
    """
    inputs, targets, spans = [], [], 0
    for index, (token, is_noise) in enumerate(zip(tokens, noise, strict=True)):
        if is_noise and sentinels is not None and (index == 0 or not noise[index - 1]):
            if spans == len(sentinels):
                raise ConfigError(
                    f"a text has more noise spans than the {spans} sentinels that there are",
                    "use more sentinels, longer spans or shorter texts",
                )
            inputs.append(sentinels[spans])
            targets.append(sentinels[spans])
            spans += 1
        if is_noise:
            targets.append(token)
        else:
            inputs.append(token)
    return inputs, targets


def restore(
    inputs: Sequence[int], targets: Sequence[int], sentinels: Sequence[int] | None
) -> list[int]:
    """The text that `corrupt` was given: each sentinel is replaced by what follows it.

    Args:
        inputs: Without mode and end-of-text token.
        targets: The same.
        sentinels: As given to `corrupt`.
    """
    if sentinels is None:
        return [*inputs, *targets]
    known, spans, current = set(sentinels), {}, []
    for token in targets:
        if token in known:
            spans[token] = current = []
        else:
            current.append(token)
    return [t for token in inputs for t in (spans[token] if token in known else [token])]


# ---- denoisers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """The most tokens that a denoiser makes of a text, mode and end-of-text tokens left out.

    Attributes:
        inputs: Of the inputs.
        targets: Of the targets.
        both: Of inputs and targets together.
    """

    inputs: int
    targets: int
    both: int


@dataclass(frozen=True)
class SpanCorruption:
    """Spans of noise, each behind a sentinel.

    Attributes:
        mean_span: Mean length of a noise span in tokens, >= 1.
        rate: Share of noise tokens, in (0, 1).
        mode: "R" (regular) or "X" (extreme).
        roll: Let spans lie anywhere; otherwise the last one ends the text.

    Raises:
        ConfigError: If a value is out of range.
    """

    mean_span: float
    rate: float
    mode: Literal["R", "X"] = "R"
    roll: bool = False

    def __post_init__(self) -> None:
        if not self.mean_span >= 1:
            raise ConfigError(f"{self}: mean_span is {self.mean_span}", "give a length >= 1")
        if not 0 < self.rate < 1:
            raise ConfigError(f"{self}: rate is {self.rate}", "give a share between 0 and 1")

    def mask(self, length: int, generator: torch.Generator) -> list[bool]:
        """Which of `length` tokens are noise."""
        return span_mask(length, self.mean_span, self.rate, generator, self.roll)

    def spans(self, length: int) -> int:
        """The most sentinels that a text needs."""
        return span_counts(length, self.mean_span, self.rate)[1] + self.roll

    def lengths(self, length: int) -> Lengths:
        """What becomes of `length` tokens."""
        noise, spans = span_counts(length, self.mean_span, self.rate)[0], self.spans(length)
        return Lengths(length - noise + spans, noise + spans, length + 2 * spans)


@dataclass(frozen=True)
class PrefixDenoising:
    """A text is continued: its suffix is the noise, and there are no sentinels.

    Attributes:
        rate: Mean share of the suffix, in (0, 0.5]; "uniform" has its own.
        distribution: "mean" draws u uniformly from [0, 2 rate] and removes round(1 + u (L - 1))
            of L tokens; "uniform" has every length of the prefix, 1 to L - 1, equally often.
        mode: "S" (sequential).

    Raises:
        ConfigError: If the rate is out of range.
    """

    rate: float = 0.25
    distribution: Literal["mean", "uniform"] = "mean"
    mode: Literal["S"] = "S"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 0.5:
            raise ConfigError(
                f"{self}: rate is {self.rate}",
                "give a share above 0 and at most 0.5: the suffix varies up to twice the mean",
            )

    def mask(self, length: int, generator: torch.Generator) -> list[bool]:
        """Which of `length` tokens are noise."""
        if self.distribution == "uniform":
            kept = 1 + int(torch.randint(length - 1, (), generator=generator))
        else:
            point = float(torch.rand((), generator=generator, dtype=torch.float64))
            kept = length - self._removed(length, 2 * self.rate * point)
        return [False] * kept + [True] * (length - kept)

    def _removed(self, length: int, share: float) -> int:
        return min(round(1 + share * (length - 1)), length - 1)

    def spans(self, length: int) -> int:
        """None needs a sentinel."""
        return 0

    def lengths(self, length: int) -> Lengths:
        """What becomes of `length` tokens."""
        uniform = self.distribution == "uniform"
        suffix = length - 1 if uniform else self._removed(length, 2 * self.rate)
        return Lengths(length - 1, suffix, length)


@dataclass(frozen=True)
class CausalDenoising:
    """Everything is predicted from what comes before: rate 1.

    Attributes:
        mode: "S" (sequential).
    """

    mode: Literal["S"] = "S"

    def mask(self, length: int, generator: torch.Generator) -> list[bool]:
        """Every token is noise."""
        return [True] * length

    def spans(self, length: int) -> int:
        """None needs a sentinel."""
        return 0

    def lengths(self, length: int) -> Lengths:
        """What becomes of `length` tokens."""
        return Lengths(0, length, length)


Denoiser = SpanCorruption | PrefixDenoising | CausalDenoising


def denoise(
    tokens: Sequence[int],
    denoiser: Denoiser,
    generator: torch.Generator,
    sentinels: Sequence[int],
) -> tuple[list[bool], list[int], list[int]]:
    """Mask, inputs and targets of one text, without mode and end-of-text tokens.

    Args:
        tokens: Token ids, at least two.
        denoiser: What is done.
        generator: The only source of randomness.
        sentinels: Ids in the order of use.

    Raises:
        ConfigError: If the text is too short, or the denoiser needs more sentinels.
    """
    if len(tokens) < 2:
        raise ConfigError(
            f"{denoiser} got a text of {len(tokens)} tokens", "give texts of at least 2 tokens"
        )
    check_sentinels([denoiser], len(tokens), len(sentinels))
    noise = denoiser.mask(len(tokens), generator)
    used = sentinels if isinstance(denoiser, SpanCorruption) else None
    return noise, *corrupt(tokens, noise, used)


def check_sentinels(denoisers: Sequence[Denoiser], length: int, count: int) -> None:
    """Refuse texts that need more sentinels than there are.

    Raises:
        ConfigError: Naming the denoiser; nothing runs on into ordinary ids.
    """
    for denoiser in denoisers:
        if denoiser.spans(length) > count:
            raise ConfigError(
                f"{denoiser} makes {denoiser.spans(length)} spans of {length} tokens and there are "
                f"{count} sentinels",
                f"set sentinels to {denoiser.spans(length)} or more, or use shorter rows",
            )


def raw_length(
    denoiser: Denoiser, inputs: int, targets: int | None = None, *, joint: bool = False
) -> int:
    """Most raw tokens whose inputs and targets fit in any draw; 0 if not even two do.

    An end-of-text token is counted at the end of both, or once where they are joined. A mode token
    is the caller's to leave room for.

    Args:
        denoiser: What is done with them.
        inputs: Room for the inputs; for both if they are joined.
        targets: Room for the targets; that of the inputs by default.
        joint: Inputs and targets stand in one row.
    """

    def fits(raw: int) -> bool:
        made = denoiser.lengths(raw)
        if joint:
            return made.both + 1 <= inputs
        wide = inputs if targets is None else targets
        return made.inputs + 1 <= inputs and made.targets + 1 <= wide

    # What is made never shrinks as a text grows; nothing raw exceeds its inputs and targets.
    most = 2 * max(inputs, targets or 0) + 2
    found = bisect.bisect_left(range(2, most), True, key=lambda raw: not fits(raw)) + 1
    return found if found >= 2 else 0


# ---- mixtures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Denoisers, and how often each is drawn.

    Attributes:
        denoisers: At least one.
        rates: Weight of each, >= 0; equal by default.

    Raises:
        ConfigError: If there is no denoiser, or the rates do not go with them.
    """

    denoisers: tuple[Denoiser, ...]
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.denoisers:
            raise ConfigError("denoisers = () names none", "give at least one")
        if not self.rates:
            object.__setattr__(self, "rates", (1.0,) * len(self.denoisers))
        if len(self.rates) != len(self.denoisers):
            raise ConfigError(
                f"rates = {self.rates} has {len(self.rates)} numbers for "
                f"{len(self.denoisers)} denoisers",
                "give one for each",
            )
        if not (all(0 <= rate < float("inf") for rate in self.rates) and sum(self.rates) > 0):
            raise ConfigError(
                f"rates = {self.rates} is not allowed", "give numbers >= 0, at least one above 0"
            )

    @property
    def used(self) -> tuple[Denoiser, ...]:
        """Those that are ever drawn."""
        return tuple(d for d, rate in zip(self.denoisers, self.rates) if rate > 0)

    def draw(self, generator: torch.Generator) -> int:
        """Index of one denoiser."""
        bounds = list(itertools.accumulate(self.rates))
        point = float(torch.rand((), generator=generator, dtype=torch.float64)) * bounds[-1]
        return bisect.bisect_right(bounds, point)

    def raw_length(self, inputs: int, targets: int | None = None, *, joint: bool = False) -> int:
        """Most raw tokens that fit whichever denoiser is drawn; see `raw_length`."""
        return min(raw_length(d, inputs, targets, joint=joint) for d in self.used)


_REGULAR = (SpanCorruption(3, 0.15), SpanCorruption(8, 0.15))
_LONG = (SpanCorruption(64, 0.15, "X"), SpanCorruption(64, 0.5, "X"))
_SEVEN = (*_REGULAR, PrefixDenoising(), SpanCorruption(3, 0.5, "X"), SpanCorruption(8, 0.5, "X"),
          *_LONG)  # fmt: skip
UL2_UNIFORM = Mixture(_SEVEN)
UL2_S20 = Mixture(_SEVEN, (0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1))
# Half prefix, a quarter regular, a quarter long spans (arXiv 2210.11399). How a quarter is split
# among its settings is not established: equally, here.
UL2R = Mixture((*_REGULAR, PrefixDenoising(), *_LONG), (0.125, 0.125, 0.5, 0.125, 0.125))
T5 = Mixture((SpanCorruption(3, 0.15),))
PRESETS = {"uniform": UL2_UNIFORM, "s20": UL2_S20, "ul2r": UL2R, "t5": T5}


def sentinel_names(count: int) -> tuple[str, ...]:
    """Sentinels as T5's vocabularies name them."""
    return tuple(f"<extra_id_{number}>" for number in range(count))


def arranged(
    inputs: Sequence[int],
    targets: Sequence[int],
    labels: Sequence[int],
    layout: str,
    mode: int | None,
    end: int,
    end_label: int | None = None,
) -> dict[str, list[int]]:
    """One training example of inputs and targets.

    "encoder_decoder": `input_ids` are mode, inputs, end; `labels` the targets' and end. Otherwise
    both stand in one row, mode, inputs, targets, end, and only targets and end are scored;
    "prefix_lm" says with `bidirectional` which tokens see each other both ways.

    Args:
        inputs: Of `corrupt`.
        targets: Of `corrupt`.
        labels: The targets, -100 where one is not scored.
        layout: One of `FORMATS`.
        mode: Mode token, or None.
        end: End-of-text token.
        end_label: What is predicted last; `end` by default.
    """
    context = [*inputs] if mode is None else [mode, *inputs]
    scored = [*labels, end if end_label is None else end_label]
    if layout == "encoder_decoder":
        return {"input_ids": [*context, end], "labels": scored}
    row = [*context, *targets, end]
    example = {"input_ids": row, "labels": [IGNORED] * len(context) + scored}
    if layout == "prefix_lm":
        example["bidirectional"] = [1] * len(context) + [0] * (len(row) - len(context))
    return example
