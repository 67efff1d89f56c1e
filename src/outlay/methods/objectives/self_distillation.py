"""Keep a student's representation near that of a further-pre-trained copy of itself.

Self-distillation for further pre-training of Lee et al., arXiv:2210.02871: a model is pre-trained
further on little unlabeled data and becomes the teacher; the student starts again from the
original weights and is trained on the same loss, plus the squared distance between both models'
representations of the input before it was masked.

B examples, S positions, D the width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...core.card import Card
from ...core.errors import ConfigError, Conflict
from ...core.losses import Batch, Losses, Objective, Shaped, Term, model_inputs
from ...core.method import Context, OnObjective, Step

TERM = "feature_distance"
IGNORED = -100


def pooled(
    states: Float[Tensor, "b ..."], pool: str, mask: Tensor | None = None
) -> Float[Tensor, "b p d"]:
    """What is compared: the first position, the mean over positions, or every position.

    Args:
        states: Hidden states. Shape (B, S, D); of a convolutional network (B, D, height, width).
        pool: "cls", "mean" or "tokens".
        mask: 1 for positions that are no padding. Shape (B, S).
    """
    if states.dim() == 4:
        states = states.flatten(2).transpose(1, 2)
    if pool == "cls":
        return states[:, :1]
    if pool == "tokens":
        return states
    kept = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
    total = (states * kept[..., None]).sum(1, keepdim=True)
    return total / kept.sum(1).clamp(min=1)[:, None, None]


def feature_distance(
    student: Float[Tensor, "b p d"],
    teacher: Float[Tensor, "b p d"],
    distance: str = "mse_sum",
    mask: Float[Tensor, "b p"] | None = None,
) -> Float[Tensor, " b"]:
    """Distance of each example, averaged over its positions.

    Args:
        student: Its representation.
        teacher: The teacher's.
        distance: "mse_sum" (squared difference summed over D, the paper's), "mse" (its mean over
            D) or "cosine" (1 less the cosine).
        mask: Positions that count; all by default.
    """
    if distance == "cosine":
        apart = 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    else:
        apart = (student - teacher).square().sum(-1)
        apart = apart / student.shape[-1] if distance == "mse" else apart
    if mask is None:
        return apart.mean(1)
    return (apart * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class FeatureDistillation(OnObjective):
    r"""An additive penalty on the distance to a frozen teacher's representation.

    $\mathcal L = c\,\mathcal L_{\text{task}} + \lambda \frac{1}{B} \sum_b \lVert h_S(x_b) -
    h_T(x_b) \rVert^2$ on the input $x$ before it was corrupted, the teacher in evaluation mode.
    Of an encoder-decoder the encoder's states are compared. Examples whose labels are all -100
    count in no term. A student that freezes or adapts layers needs nothing else; the teacher is
    the plain model.

    The sum over the width grows with it: 1 at width 768 is 12 at width 64 under "mse_sum".

    Attributes:
        teacher: What `context.load` takes: `stage:NAME`, `original`, a model folder or a packaged
            model.
        layer: Hidden state as the model gives them; -1 is the last (in a masked auto-encoder and a
            text encoder the one after the final norm).
        pool: "cls", the first position (the paper's), "mean" over the positions that are no
            padding, or "tokens", every position, averaged an example.
        distance: "mse_sum", "mse" or "cosine"; see `feature_distance`.
        weight: $\lambda$, the paper's 1; 0 measures the distance and trains nothing with it.
        view: "clean" runs student and teacher once more on the input before corruption, as the
            paper does; "corrupted" compares what both make of the input that the task's loss sees,
            with one pass of the student.
        primary_weight: $c$; 0 leaves distillation alone.
    """

    card: ClassVar[Card] = Card(
        name="feature_distillation",
        title="Self-Distillation for Further Pre-training of Transformers",
        paper=36,
        arxiv="2210.02871",
        group="objectives",
        summary="Keep a model's representation near that of a frozen teacher, its further-trained "
        "copy.",
        authors="Seanie Lee, Minki Kang, Juho Lee, Sung Ju Hwang, Kenji Kawaguchi",
        year=2022,
    )
    teacher: str = "stage:teacher"
    layer: int = -1
    pool: Literal["cls", "mean", "tokens"] = "cls"
    distance: Literal["mse_sum", "mse", "cosine"] = "mse_sum"
    weight: Annotated[float, Ge(0)] = 1.0
    view: Literal["clean", "corrupted"] = "clean"
    primary_weight: Annotated[float, Ge(0)] = 1.0

    def validate(self) -> None:
        """Refuse a run without any loss, and a teacher without a name."""
        if not self.teacher.strip():
            raise ConfigError(
                f"feature_distillation.teacher = {self.teacher!r} names no model",
                "give stage:NAME, original, a model folder or a packaged model",
            )
        if self.weight == 0 and self.primary_weight == 0:
            raise ConfigError(
                "feature_distillation.weight and primary_weight are both 0",
                "give one of them a weight",
            )

    def shape(self, objective: Objective, model: nn.Module, context: Context) -> Objective:
        """The objective with the penalty.

        Raises:
            ConfigError: If the model has no class token to compare, or widths differ.
        """
        if self.pool == "cls":
            _require_class_token(model, context)
        teacher = context.load(self.teacher)
        _compare(model, teacher, self)
        if self.view == "clean":
            context.request("clean")
        else:
            context.request(self._state(model))
        return _Distilled(objective, self, teacher, context)

    def _state(self, model: nn.Module) -> str:
        """Name of the requested hidden state."""
        return f"{'encoder_hidden' if _has_decoder(model) else 'hidden'}:{self.layer}"


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _require_class_token(model: nn.Module, context: Context) -> None:
    of_text = context.tokenizer is not None
    if of_text:
        known = getattr(context.tokenizer, "cls_token_id", None) is not None
    else:
        known = any(name.endswith("cls_token") for name, _ in model.named_parameters())
    if not known:
        raise ConfigError(
            "feature_distillation.pool = 'cls', and "
            + ("the tokenizer has" if of_text else f"{type(model).__name__} has")
            + " no class token",
            "set pool to 'mean' or 'tokens'",
        )


def _width(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "hidden_size", None)


def _compare(model: nn.Module, teacher: nn.Module, method: FeatureDistillation) -> None:
    """Refuse a teacher of another width; warn of one that is the start itself."""
    widths = _width(model), _width(teacher)
    if None not in widths and widths[0] != widths[1]:
        raise ConfigError(
            f"feature_distillation.teacher = {method.teacher!r} is {widths[1]} wide, "
            f"the student {widths[0]}",
            "give a teacher of the student's width",
        )
    own = dict(model.named_parameters())
    pairs = [(own[n], p) for n, p in teacher.named_parameters() if n in own]
    hollow = any(p.is_meta or isinstance(p, FakeTensor) for p in own.values())
    if pairs and not hollow and all(torch.equal(a, b) for a, b in pairs):
        warnings.warn(
            f"feature_distillation: the teacher {method.teacher!r} is the model that the student "
            "starts from, so the penalty pulls back to the start",
            stacklevel=2,
        )


class _Distilled(Shaped):
    """The inner losses and the distance to the teacher."""

    def __init__(
        self, inner: Objective, method: FeatureDistillation, teacher: nn.Module, context: Context
    ) -> None:
        super().__init__(inner)
        self.method, self.context = method, context
        # Several teachers are several terms.
        others = sum(isinstance(part, _Distilled) for part in inner.modules())
        self.term = f"{TERM}_{others + 1}" if others else TERM
        # In a tuple it is no submodule: a teacher is in no checkpoint and no count of parameters.
        self._teacher = (teacher,)

    def forward(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        """The inner losses and one more term, one value an example."""
        method = self.method
        if "segment_ids" in batch:
            raise Conflict(
                "'feature_distillation' compares one representation a row, and packed rows hold "
                "several examples",
                "leave packing out",
            )
        losses = self.inner(model, batch, step)
        if method.view == "clean":
            seen: Batch = batch["clean"]
            with torch.set_grad_enabled(torch.is_grad_enabled() and method.weight > 0):
                own = self._states(model, seen)
        else:
            seen, own = batch, losses.outputs[method._state(model)]
        with torch.no_grad(), self.context.meter.under("teacher"):
            aim = self._states(self._teacher[0], seen)
        if own.shape != aim.shape:
            raise ConfigError(
                f"feature_distillation.teacher = {method.teacher!r} gives states of shape "
                f"{tuple(aim.shape)}, the student {tuple(own.shape)}",
                "give a teacher of the student's width that reads the same inputs",
            )
        mask = seen.get("attention_mask")
        own, aim = (pooled(states.float() if states.dtype == torch.bfloat16 else states,
                           method.pool, mask) for states in (own, aim))  # fmt: skip
        positions = mask.to(own.dtype) if mask is not None and method.pool == "tokens" else None
        values = feature_distance(own, aim.to(own.dtype), method.distance, positions)
        if method.primary_weight != 1:
            primary = losses.terms[losses.primary]
            scaled = replace(primary, coefficient=primary.coefficient * method.primary_weight)
            losses = losses.with_term(losses.primary, scaled)
        weights = _counted(batch).to(values)
        return losses.with_term(self.term, Term(values, weights, method.weight))

    def weight_sums(self, batch: Batch) -> Mapping[str, float]:
        """The inner weight sums, and the examples that count."""
        return {**self.inner.weight_sums(batch), self.term: float(_counted(batch).sum())}

    def _states(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs: dict[str, Any] = model_inputs(batch)
        encoder_decoder = _has_decoder(model)
        if encoder_decoder:
            # Its decoder has to read something; one token is the least.
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
            inputs.pop("decoder_attention_mask", None)
        output = model(**inputs, output_hidden_states=True)
        states = output.encoder_hidden_states if encoder_decoder else output.hidden_states
        if not -len(states) <= self.method.layer < len(states):
            raise ConfigError(
                f"feature_distillation.layer = {self.method.layer} does not exist",
                f"the model has hidden states {-len(states)} to {len(states) - 1}",
            )
        return states[self.method.layer]


def _counted(batch: Batch) -> Float[Tensor, " b"]:
    """1 for every example, 0 where there are labels and none is known; times its own weight."""
    labels, extra = batch.get("labels"), batch.get("example_weights")
    counted = torch.ones(len(batch["ids"]))
    if isinstance(labels, Tensor):
        counted = (labels.reshape(len(labels), -1) != IGNORED).any(1).float()
    return counted * extra.to(counted) if extra is not None and extra.dim() == 1 else counted
