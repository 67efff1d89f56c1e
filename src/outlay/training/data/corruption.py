"""How a self-supervised task corrupts an example: masked tokens, and hidden patches of an image.

The task's own corruption comes after every method has rewritten an example, and only where no
method claims `example.corruption`. It draws from the generator that it is given: in training from
the example's own stream, in evaluation from one that depends on the example alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...core.errors import ConfigError
from ...core.method import Example
from ..objectives import IGNORED
from ..specs import MASKED_IMAGES, MASKED_TEXT

Corruption = Callable[[Example, torch.Generator], Example]


def corruption_for(
    task: str, settings: Mapping[str, Any], tokenizer: Any = None, patches: int = 0
) -> Corruption | None:
    """The task's own corruption; None for a task that has none.

    Args:
        task: One of `recipe.TASKS`.
        settings: The recipe's `objective`: `mask_ratio`, 0.15 of the tokens or 0.75 of the patches
            by default.
        tokenizer: The run's tokenizer, with a mask token.
        patches: Patches of an image.

    Raises:
        ConfigError: If there is no mask token, or nothing would be masked or nothing seen.
    """
    if task == MASKED_TEXT:
        return _tokens(settings.get("mask_ratio", 0.15), tokenizer)
    if task == MASKED_IMAGES:
        return _patches(settings.get("mask_ratio", 0.75), patches)
    return None


def _tokens(ratio: float, tokenizer: Any) -> Corruption:
    """Of every row `max(1, round(ratio * tokens))` tokens are to be predicted, special ones never.

    Eight in ten of them become the mask token, one in ten another token, one in ten stays
    (arXiv:1810.04805, section 3.1).
    """
    if tokenizer is None or tokenizer.mask_token_id is None:
        raise ConfigError(
            f"{MASKED_TEXT} needs a mask token, and the tokenizer has none",
            "give the tokenizer of an encoder, or model.config = 'bert'",
        )
    mask, special = tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])

    def corrupt(example: Example, draw: torch.Generator) -> Example:
        ids = list(example["input_ids"])
        places = [at for at, token in enumerate(ids) if token not in special]
        labels = [IGNORED] * len(ids)
        count = max(1, round(ratio * len(places))) if places else 0
        chosen = torch.randperm(len(places), generator=draw)[:count].tolist()
        fates = torch.rand(count, generator=draw).tolist()
        others = ordinary[torch.randint(len(ordinary), (count,), generator=draw)].tolist()
        for index, fate, other in zip(chosen, fates, others, strict=True):
            at = places[index]
            labels[at] = ids[at]
            ids[at] = mask if fate < 0.8 else other if fate < 0.9 else ids[at]
        return {**example, "input_ids": ids, "labels": labels}

    return corrupt


def _patches(ratio: float, patches: int) -> Corruption:
    """Of every image `int((1 - ratio) * patches)` patches are seen (arXiv:2111.06377)."""
    seen = int((1 - ratio) * patches + 1e-9)
    if not 0 < seen < patches:
        raise ConfigError(
            f"objective.mask_ratio = {ratio} leaves {seen} of {patches} patches to be seen",
            "give a ratio that leaves some and hides some",
        )

    def corrupt(example: Example, draw: torch.Generator) -> Example:
        visible = torch.randperm(patches, generator=draw)[:seen].sort().values
        masked = torch.ones(patches, dtype=torch.bool)
        masked[visible] = False
        return {**example, "visible": visible, "masked": masked}

    return corrupt
