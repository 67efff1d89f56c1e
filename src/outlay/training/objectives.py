r"""The tasks' own objectives: from a batch to unreduced nats.

Values are computed in float32 (float64 logits stay float64). Weights come from the batch alone,
so `weight_sums` is known before the first forward pass and equals what `forward` returns.

Outputs that anyone may request: "hidden:i" (hidden state i, (batch, seq, width); of the decoder
where there is one), "encoder_hidden:i", and "features" (the mean of the last hidden state over
the tokens that are not padding, (batch, width)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.errors import ConfigError, Conflict, nearest
from ..core.losses import Batch, Losses, Objective, Term, model_inputs
from ..core.method import Step
from .data.labels import Labels
from .specs import MASKED_IMAGES, MASKED_TEXT

IGNORED = -100
# Requests that others answer: the batch before corruption, and what every objective gives.
_ELSEWHERE = ("clean", "logits", "targets")


class TaskObjective(Objective):
    """Base of the tasks' objectives: one call of the model, one primary term.

    Args:
        requests: Outputs that methods ask for; read at every call, so it may still grow.
    """

    term: str = "cross_entropy"

    def __init__(self, requests: set[str] | None = None) -> None:
        super().__init__()
        self.requests = requests if requests is not None else set()

    def forward(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        """Losses of one micro-batch."""
        inputs = self.inputs(model, batch)
        wanted = self.requests.difference(_ELSEWHERE)
        if wanted:
            inputs["output_hidden_states"] = True
        output = model(**inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        targets, weights = self.targets(batch), self.weights(batch)
        term = Term(self.values(logits, targets), weights)
        outputs = {"logits": self.shaped(logits), "targets": targets}
        outputs |= {name: _requested(name, output, batch) for name in sorted(wanted)}
        return Losses({self.term: term}, self.term, outputs)

    def weight_sums(self, batch: Batch) -> Mapping[str, float]:
        """Sum of the weights that `forward` will return for this batch, added in float64."""
        weights = self.weights(batch)
        return {self.term: float(weights.sum(dtype=_widest(weights)))}

    def inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """What the model is called with."""
        return model_inputs(batch)

    def shaped(self, logits: Tensor) -> Tensor:
        """Logits in the shape of the values, with the classes last where there are any."""
        return logits

    def targets(self, batch: Batch) -> Tensor:
        """Targets in the shape of the values."""
        return batch["labels"]

    def weights(self, batch: Batch) -> Tensor:
        """Weights in the shape of the values."""
        raise NotImplementedError

    def values(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Unreduced nats."""
        raise NotImplementedError


def _widest(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _requested(name: str, output: Any, batch: Batch) -> Tensor:
    kind, _, index = name.partition(":")
    states: Any = getattr(output, "hidden_states", None)
    if states is None:
        states = getattr(output, "decoder_hidden_states", None)
    if kind == "encoder_hidden":
        states = getattr(output, "encoder_hidden_states", None)
    try:
        if states is not None and kind in ("hidden", "encoder_hidden"):
            return states[int(index)]
    except (ValueError, IndexError):
        raise ConfigError(
            f"requested output {name!r} does not exist",
            f"the model has hidden states 0 to {len(states or ()) - 1}",
        ) from None
    if states is not None and name == "features":
        if "segment_ids" in batch:
            raise Conflict(
                "features are one mean a row, and packed rows hold several examples",
                "leave packing out",
            )
        return _mean_pooled(states[-1], batch.get("attention_mask"))
    raise ConfigError(
        f"requested output {name!r} is not one that this objective and model give",
        f'{nearest(kind, ("hidden", "features"))}request "hidden:-1" or "features"',
    )


def _mean_pooled(states: Tensor, mask: Tensor | None) -> Float[Tensor, "batch width"]:
    if states.dim() == 4:
        return states.mean((2, 3))
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    kept = mask.to(states.dtype).unsqueeze(-1)
    return (states * kept).sum(1) / kept.sum(1).clamp(min=1)


def _by_example(weights: Tensor, batch: Batch) -> Tensor:
    """Multiply the batch's own example weights in, one a row or one a value."""
    extra = batch.get("example_weights")
    if extra is None:
        return weights
    extra = extra.to(weights)
    return weights * extra.reshape(extra.shape + (1,) * (weights.dim() - extra.dim()))


class ClassificationObjective(TaskObjective):
    r"""Cross entropy of one class an example, for text and images.

    $(1 - \epsilon)\,(-\log p_y) + \frac{\epsilon}{K} \sum_k -\log p_k$, weighted by the class
    weight of $y$ ($K$ classes, $\epsilon$ the label smoothing). The term is divided by the sum
    of the weights, so class weights change the mixture and not the size of the loss.

    Args:
        labels: Class names and weights.
        label_smoothing: $\epsilon$, in [0, 1).
        requests: Outputs that methods ask for.
    """

    class_weights: Tensor

    def __init__(
        self,
        labels: Labels | None = None,
        label_smoothing: float = 0.0,
        requests: set[str] | None = None,
    ) -> None:
        super().__init__(requests)
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", _vector(labels.weights if labels else ()), False)

    def weights(self, batch: Batch) -> Float[Tensor, " batch"]:
        """Class weight of each labeled example, 0 for a label of -100."""
        labels = batch["labels"]
        known = labels != IGNORED
        weights = known.float()
        if self.class_weights.numel():
            table = self.class_weights.to(labels.device)
            weights = weights * table[labels.clamp(min=0)]
        return _by_example(weights, batch)

    def values(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Cross entropy of each example in nats."""
        return F.cross_entropy(
            logits,
            targets,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


class MultiLabelObjective(TaskObjective):
    """Binary cross entropy, one value an example and label; -100 marks an unknown label.

    Args:
        labels: Label names; their weights hold for the positive side of each label.
        requests: Outputs that methods ask for.
    """

    term = "binary_cross_entropy"
    class_weights: Tensor

    def __init__(self, labels: Labels | None = None, requests: set[str] | None = None) -> None:
        super().__init__(requests)
        self.register_buffer("class_weights", _vector(labels.weights if labels else ()), False)

    def weights(self, batch: Batch) -> Float[Tensor, "batch labels"]:
        """1, or the label's weight where the label holds, or 0 where it is unknown."""
        labels = batch["labels"]
        weights = (labels != IGNORED).float()
        if self.class_weights.numel():
            table = self.class_weights.to(labels.device)
            weights = weights * torch.where(labels > 0, table, torch.ones_like(table))
        return _by_example(weights, batch)

    def values(
        self, logits: Float[Tensor, "batch labels"], targets: Float[Tensor, "batch labels"]
    ) -> Float[Tensor, "batch labels"]:
        """Binary cross entropy of each label in nats."""
        known = targets != IGNORED
        aims = torch.where(known, targets, torch.zeros_like(targets)).to(logits.dtype)
        values = F.binary_cross_entropy_with_logits(logits, aims, reduction="none")
        return torch.where(known, values, torch.zeros_like(values))


class RegressionObjective(TaskObjective):
    r"""Squared error or Huber loss of targets in units of their standard deviation.

    $(\hat y - y / s)^2$, or Huber with threshold $\delta$ on the same difference ($s$ the
    standard deviation of the training targets). A missing target (NaN) has no weight.

    Args:
        labels: Names and scales of the targets.
        loss: "mse" or "huber".
        delta: Huber's threshold, in standard deviations.
        requests: Outputs that methods ask for.
    """

    term = "squared_error"
    scale: Tensor

    def __init__(
        self,
        labels: Labels | None = None,
        loss: str = "mse",
        delta: float = 1.0,
        requests: set[str] | None = None,
    ) -> None:
        super().__init__(requests)
        self.loss, self.delta = loss, delta
        self.term = "squared_error" if loss == "mse" else "huber"
        self.register_buffer("scale", _vector(labels.scale if labels else ()), False)

    def targets(self, batch: Batch) -> Float[Tensor, "batch *targets"]:
        """Targets over their scale; one number an example if there is one target."""
        targets = batch["labels"]
        if self.scale.numel():
            targets = targets / self.scale.to(targets)
        return targets.squeeze(-1) if targets.dim() == 2 and targets.shape[1] == 1 else targets

    def shaped(self, logits: Tensor) -> Tensor:
        """Predictions in standard deviations."""
        return logits.squeeze(-1) if logits.dim() == 2 and logits.shape[1] == 1 else logits

    def weights(self, batch: Batch) -> Float[Tensor, "batch *targets"]:
        """1 for every target that is there."""
        return _by_example((~self.targets(batch).isnan()).float(), batch)

    def values(self, logits: Tensor, targets: Tensor) -> Float[Tensor, "batch *targets"]:
        """Squared error or Huber loss of each target."""
        predicted = self.shaped(logits)
        # A missing target is replaced by the prediction: no loss, and no NaN in the gradient.
        aims = torch.where(targets.isnan(), predicted.detach(), targets.to(predicted.dtype))
        if self.loss == "huber":
            return F.huber_loss(predicted, aims, reduction="none", delta=self.delta)
        return F.mse_loss(predicted, aims, reduction="none")


class TokenObjective(TaskObjective):
    """Cross entropy of tokens, averaged over tokens or over sequences.

    Args:
        average: "tokens" (every scored token counts the same) or "sequences" (every sequence
            counts the same, a segment of a packed row being one).
        label_smoothing: In [0, 1).
        requests: Outputs that methods ask for.
    """

    def __init__(
        self,
        average: str = "tokens",
        label_smoothing: float = 0.0,
        requests: set[str] | None = None,
    ) -> None:
        super().__init__(requests)
        self.average, self.label_smoothing = average, label_smoothing

    def weights(self, batch: Batch) -> Float[Tensor, "batch seq"]:
        """1 for every scored token, or its share of its sequence."""
        known = self.targets(batch) != IGNORED
        weights = known.float()
        if self.average == "sequences":
            weights = weights / _sequence_counts(known, self._segments(batch)).clamp(min=1)
        extra = batch.get("example_weights")
        if extra is not None and extra.dim() == 2:
            return weights * self.align(extra.to(weights))
        return _by_example(weights, batch)

    def _segments(self, batch: Batch) -> Tensor | None:
        return None

    def values(
        self, logits: Float[Tensor, "batch seq classes"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Cross entropy of each position in nats, 0 where nothing is scored."""
        flat = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return flat.view(targets.shape)


def _sequence_counts(known: Tensor, segments: Tensor | None) -> Float[Tensor, "batch seq"]:
    """Scored tokens of the sequence that each position belongs to."""
    if segments is None:
        return known.float().sum(1, keepdim=True).expand(known.shape)
    slots = segments - segments.amin()
    counts = known.new_zeros(len(known), int(slots.max()) + 1, dtype=torch.float32)
    return counts.scatter_add_(1, slots, known.float()).gather(1, slots)


class CausalObjective(TokenObjective):
    r"""Next-token cross entropy.

    `values[:, t]` is $-\log p(x_{t+1} \mid x_{\le t})$: values stand where the prediction is
    made, so logits are used as they come, without a copy. The last column has no target and
    weight 0. `align` moves what is known per token (token t) to where it is predicted (t - 1).
    """

    def align(self, per_token: Tensor) -> Tensor:
        """Shift left by one; the last column becomes 0."""
        return torch.cat([per_token[:, 1:], torch.zeros_like(per_token[:, :1])], dim=1)

    def targets(self, batch: Batch) -> Int[Tensor, "batch seq"]:
        """The token that follows each position, or -100."""
        labels = batch["labels"]
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)

    def _segments(self, batch: Batch) -> Tensor | None:
        segments = batch.get("segment_ids")
        # The last column scores nothing; any segment will do there.
        return None if segments is None else torch.cat([segments[:, 1:], segments[:, -1:]], dim=1)


class SequenceToSequenceObjective(TokenObjective):
    """Cross entropy of the target tokens of an encoder-decoder; values stand at their tokens.

    The decoder reads the labels moved right by one behind the model's start token, unless the
    batch brings `decoder_input_ids`.
    """

    def inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Model inputs with the decoder's input added."""
        inputs = model_inputs(batch)
        if "decoder_input_ids" not in inputs:
            start, pad = decoder_tokens(model)
            labels = batch["labels"]
            shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
            inputs["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, pad)
        return inputs


class MaskedImageObjective(TaskObjective):
    r"""Squared error of the pixels of patches that were not seen (arXiv:2111.06377, section 3).

    The value of a patch is $\frac{1}{n} \sum_i (\hat x_i - \tilde x_i)^2$ over its $n$ pixels and
    channels; $\tilde x$ is the patch less its mean, over its standard deviation.

    Args:
        labels: Not read: there are none.
        normalize_pixels: False predicts the pixels as they are.
        requests: Outputs that methods ask for.
    """

    term = "squared_error"

    def __init__(
        self,
        labels: Labels | None = None,
        normalize_pixels: bool = True,
        requests: set[str] | None = None,
    ) -> None:
        super().__init__(requests)
        self.normalize_pixels = normalize_pixels

    def targets(self, batch: Batch) -> Float[Tensor, "batch patches pixels"]:
        """Pixels of every patch, rows before columns, channels last; patches are square."""
        pixels = batch["pixel_values"]
        side = math.isqrt(pixels.shape[2] * pixels.shape[3] // batch["masked"].shape[1])
        cut = pixels.unfold(2, side, side).unfold(3, side, side)
        patches = cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        if not self.normalize_pixels:
            return patches
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, correction=0, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def weights(self, batch: Batch) -> Float[Tensor, "batch patches"]:
        """1 for every patch that was not seen."""
        return _by_example(batch["masked"].float(), batch)

    def values(
        self, logits: Float[Tensor, "batch patches pixels"], targets: Tensor
    ) -> Float[Tensor, "batch patches"]:
        """Mean squared error of each patch."""
        return (logits - targets).square().mean(-1)


def decoder_tokens(model: nn.Module) -> tuple[int, int]:
    """(start, pad) token ids of an encoder-decoder's decoder.

    Raises:
        ConfigError: If the model's config names no start token.
    """
    while not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    start = getattr(config, "decoder_start_token_id", None)
    start = pad if start is None else start
    if start is None:
        raise ConfigError(
            f"{type(model).__name__} names no decoder_start_token_id",
            "set it in the model folder's config.json",
        )
    return int(start), int(start if pad is None else pad)


def _vector(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"objective.{name} = {value!r} is not allowed", "give a number in [0, 1)")
    return float(value)


def _open_share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(f"objective.{name} = {value!r} is not allowed", "give a number in (0, 1)")
    return float(value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"objective.{name} = {value!r} is not allowed", "give true or false")
    return value


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise ConfigError(f"objective.{name} = {value!r} is not allowed", "give a number > 0")
    return float(value)


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in allowed:
            raise ConfigError(
                f"objective.{name} = {value!r} is not allowed",
                f"{nearest(str(value), allowed)}use {' or '.join(allowed)}",
            )
        return value

    return check


Checks = Mapping[str, Callable[[str, Any], Any]]
_CLASSES: Checks = {"label_smoothing": _share}
_TOKENS: Checks = {"average": _one_of("tokens", "sequences"), "label_smoothing": _share}
SETTINGS: Mapping[str, tuple[type[TaskObjective], Checks]] = {
    "sequence-classification": (ClassificationObjective, _CLASSES),
    "image-classification": (ClassificationObjective, _CLASSES),
    "multi-label-classification": (MultiLabelObjective, {}),
    "regression": (RegressionObjective, {"loss": _one_of("mse", "huber"), "delta": _positive}),
    "causal-language-modeling": (CausalObjective, _TOKENS),
    "sequence-to-sequence": (SequenceToSequenceObjective, _TOKENS),
    MASKED_TEXT: (TokenObjective, {**_TOKENS, "mask_ratio": _open_share}),
    MASKED_IMAGES: (
        MaskedImageObjective, {"mask_ratio": _open_share, "normalize_pixels": _truth}
    ),
}  # fmt: skip
# Settings that say how examples are corrupted: checked here, used by `data.corruption`.
_OF_CORRUPTION = ("mask_ratio",)


def objective_for(
    task: str,
    settings: Mapping[str, Any] | None = None,
    labels: Labels | None = None,
    requests: set[str] | None = None,
) -> TaskObjective:
    """The task's own objective.

    Args:
        task: One of `recipe.TASKS`.
        settings: `label_smoothing` (classification, language modeling), `average` ("tokens" or
            "sequences"; language modeling), `loss` ("mse" or "huber") and `delta` (regression),
            `mask_ratio` (masked modeling), `normalize_pixels` (of images).
        labels: The label space; class weights and target scales come from it.
        requests: Outputs that methods ask for, shared and read at every call.

    Raises:
        ConfigError: If the task or a setting is unknown, or a value is not allowed.
    """
    if task not in SETTINGS:
        raise ConfigError(
            f"unknown task {task!r}", f"{nearest(task, SETTINGS)}known: {', '.join(SETTINGS)}"
        )
    kind, checks = SETTINGS[task]
    chosen: dict[str, Any] = {}
    for name, value in (settings or {}).items():
        if name not in checks:
            known = ", ".join(checks) or "none"
            raise ConfigError(
                f"unknown key 'objective.{name}' for {task}",
                f"{nearest(name, checks)}known here: {known}",
            )
        chosen[name] = checks[name](name, value)
    for name in _OF_CORRUPTION:
        chosen.pop(name, None)
    if not issubclass(kind, TokenObjective):
        chosen["labels"] = labels
    return kind(requests=requests, **chosen)
