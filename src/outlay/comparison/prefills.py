"""What packing gives on given prompts: time, computed tokens, memory and the gap of the outputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..inference.isolation import check_isolation
from ..inference.packing import Sequences, as_lists, prepack
from ..inference.prefill import Prefilled, prefill_packed
from ..training.backend import OneDevice
from ..training.planning.memory import measured_peak

WAYS = ("padded", "sorted", "packed", "packed list", "one by one")
# Times and logits of a pass; what it returned stays alive until its bytes are read.
Pass = Callable[[list[list[int]]], tuple[Any, Tensor | None]]


@dataclass(frozen=True)
class Arm:
    """One way of filling the cache of all prompts.

    Attributes:
        name: "padded" (batches in the given order), "sorted" (batches of similar length),
            "packed" (one cache filled up on the left), "packed list" (one cache a prompt) or
            "one by one".
        seconds: Of each repeat, for all prompts.
        computed_tokens: Positions that pass through the model, padding included.
        peak_bytes: Largest memory of any batch, weights and returned cache left out.
        cache_bytes: Largest returned cache.
        logits_gap: Largest difference of any next-token logit from that of the prompt alone.
    """

    name: str
    seconds: tuple[float, ...]
    computed_tokens: int
    peak_bytes: int
    cache_bytes: int
    logits_gap: float

    @property
    def median(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Prefills:
    """All arms on the same prompts.

    Attributes:
        arms: By name.
        prompts: How many.
        tokens: Of all prompts.
        longest: Tokens of the longest prompt.
        batch_size: Prompts of one batch.
    """

    arms: dict[str, Arm]
    prompts: int
    tokens: int
    longest: int
    batch_size: int

    def speedup(self, name: str = "packed", over: str = "padded") -> list[float]:
        """Time of one arm over that of another, repeat by repeat."""
        return [a / b for a, b in zip(self.arms[over].seconds, self.arms[name].seconds)]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with seconds a prompt and the token ratio of every arm beside."""
        padded = self.arms["padded"]
        arms = {
            name: asdict(arm)
            | {
                "seconds_per_prompt": arm.median / self.prompts,
                "speedup": statistics.median(self.speedup(name)),
                "token_ratio": padded.computed_tokens / arm.computed_tokens,
            }
            for name, arm in self.arms.items()
        }
        return {**asdict(self), "arms": arms}


@torch.no_grad()
def measure_prefill(
    model: nn.Module,
    prompts: Sequences,
    batch_size: int = 64,
    repeats: int = 5,
    method: str = "bfd",
    attention: str = "auto",
) -> Prefills:
    """Fill the caches of some prompts in five ways, alternately, and compare.

    Every repeat runs all ways, each time starting with another one; a first round is thrown
    away. The clock runs until the caches are ready; on CUDA the device is waited for.

    Args:
        model: A causal transformers language model in evaluation mode, on its device.
        prompts: Tokens of each prompt, at least two tokens each.
        batch_size: Prompts of one batch.
        repeats: Rounds that are kept.
        method: How prompts are packed: see `pack`.
        attention: How packed prompts are kept apart: see `isolated`.

    Raises:
        ConfigError: An empty prompt, one of a single token, or a number below 1.
        Conflict: The model's attention does not keep prompts apart.
    """
    if min(batch_size, repeats) < 1:
        raise ConfigError("batch_size or repeats is below 1", "give at least 1 of each")
    lists = as_lists(prompts)
    short = next((n for n, prompt in enumerate(lists) if len(prompt) < 2), None)
    if short is not None:
        raise ConfigError(f"prompt {short} has one token", "leave it out: it needs no prefill")
    check_isolation(model, attention)
    ways = _ways(model, method, attention)
    batches = {name: _batches(lists, 1 if name == "one by one" else batch_size,
                              name == "sorted") for name in WAYS}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(repeats + 1):
        for name in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            took = sum(_timed(model, ways[name], some) for some in batches[name])
            if turn:
                seconds[name].append(took)
    expected = _logits(model, ways["one by one"], batches["one by one"], lists)
    arms = {}
    for name in WAYS:
        peaks = [_peak(model, ways[name], some) for some in _widest(batches[name])]
        gap = (_logits(model, ways[name], batches[name], lists) - expected).abs().max()
        arms[name] = Arm(
            name, tuple(seconds[name]), sum(_computed(name, b, method) for b in batches[name]),
            max(peak for peak, _ in peaks), max(cache for _, cache in peaks), float(gap),
        )  # fmt: skip
    tokens = [len(prompt) for prompt in lists]
    return Prefills(arms, len(lists), sum(tokens), max(tokens), batch_size)


def _batches(lists: list[list[int]], size: int, by_length: bool) -> list[list[list[int]]]:
    ordered = sorted(lists, key=len) if by_length else lists
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _ways(model: nn.Module, method: str, attention: str) -> dict[str, Pass]:
    device = next(model.parameters()).device

    def padded(prompts: list[list[int]]) -> tuple[Any, Tensor]:
        longest = max(map(len, prompts))
        empty = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * n + p for n, p in zip(empty, prompts)], device=device)
        mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(empty, prompts)], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.past_key_values, out.logits[:, -1]

    def single(prompts: list[list[int]]) -> tuple[Any, Tensor]:
        ids = torch.tensor(prompts, device=device)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1]

    def packed(layout: str) -> Pass:
        return lambda prompts: (
            prefill_packed(model, prompts, method=method, attention=attention, layout=layout),
            None,
        )

    return {
        "padded": padded, "sorted": padded, "packed": packed("left"),
        "packed list": packed("list"), "one by one": single,
    }  # fmt: skip


def _timed(model: nn.Module, way: Pass, prompts: list[list[int]]) -> float:
    cuda = next(model.parameters()).is_cuda
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    way(prompts)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _widest(batches: list[list[list[int]]]) -> list[list[list[int]]]:
    """The batch that holds most when padded and the one with most tokens: memory peaks there."""
    padded = max(batches, key=lambda some: len(some) * max(map(len, some)))
    full = max(batches, key=lambda some: sum(map(len, some)))
    return [padded] if padded is full else [padded, full]


def _peak(model: nn.Module, way: Pass, prompts: list[list[int]]) -> tuple[int, int]:
    """Peak beside weights and returned cache, and the bytes of that cache."""
    device = next(model.parameters()).device
    backend = OneDevice(str(device))
    cache_bytes = 0

    def work() -> None:
        nonlocal cache_bytes
        cache_bytes = _bytes_of(way(prompts)[0])

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        return measured_peak(work, backend, ()) - before - cache_bytes, cache_bytes
    return measured_peak(work, backend, ()) - cache_bytes, cache_bytes


def _bytes_of(made: Any) -> int:
    caches = made.cache if isinstance(made, Prefilled) else made
    each = caches if isinstance(caches, list) else [caches]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for cache in each
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    }
    return sum(storages.values())


def _computed(name: str, prompts: list[list[int]], method: str) -> int:
    if name.startswith("packed"):
        return prepack(prompts, method=method, drop_last=True).input_ids.numel()
    return len(prompts) * max(map(len, prompts))


def _logits(
    model: nn.Module, way: Pass, batches: list[list[list[int]]], lists: list[list[int]]
) -> Tensor:
    """Next-token logits in the order of `lists`; a packed cache is read once more for them."""
    at = {id(prompt): number for number, prompt in enumerate(lists)}
    found: list[Tensor | None] = [None] * len(lists)
    for prompts in batches:
        made, logits = way(prompts)
        if logits is None:
            logits = _next(model, made)
        for prompt, row in zip(prompts, logits):
            found[at[id(prompt)]] = row.float().cpu()
    return torch.stack([row for row in found if row is not None])


def _next(model: nn.Module, made: Prefilled) -> Tensor:
    if not isinstance(made.cache, list):
        return model(
            made.last_tokens, past_key_values=made.cache, attention_mask=made.attention_mask,
            position_ids=made.position_ids, use_cache=True,
        ).logits[:, -1]  # fmt: skip
    rows: Sequence[Tensor] = [
        model(token[None], past_key_values=cache, position_ids=place[None], use_cache=True).logits
        for token, cache, place in zip(made.last_tokens, made.cache, made.position_ids)
    ]
    return torch.cat(rows)[:, -1]
