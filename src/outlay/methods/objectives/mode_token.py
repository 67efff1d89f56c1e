"""Ask a model that was pre-trained in several modes for one of them.

Mode switching of Tay et al., arXiv:2205.05131: the token of the mode that fits a task stands in
front of every input when a model is fine-tuned on it, measured and used.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...core.card import Card
from ...core.method import Context, Example, OnBatch


@dataclass(frozen=True, kw_only=True)
class ModeToken(OnBatch):
    """One mode token in front of every input, in training, evaluation and prediction.

    It stands before the beginning-of-text token, where pre-training with `ul2` puts it, and behind
    a classification token that has to stay first. Rows are encoded one token shorter, so that they
    fit `batch.length` and lose what any row that is too long loses.

    Attributes:
        mode: "[NLU]" (regular denoising: classification), "[S2S]" (sequential: generation and
            in-context learning) or "[NLG]" (extreme: in between).
    """

    card: ClassVar[Card] = Card(
        name="mode_token",
        title="UL2: Unifying Language Learning Paradigms",
        paper=27,
        arxiv="2205.05131",
        group="objectives",
        summary="Put a mode token in front of every input, to ask for one way of pre-training.",
        authors="Yi Tay, Mostafa Dehghani, Vinh Q. Tran, Xavier Garcia, Jason Wei, Xuezhi Wang, "
        "Hyung Won Chung, Siamak Shakeri, Dara Bahri, Tal Schuster, Huaixiu Steven Zheng, "
        "Denny Zhou, Neil Houlsby, Donald Metzler",
        year=2022,
    )
    mode: Literal["[NLU]", "[S2S]", "[NLG]"] = "[NLU]"

    def tokens(self, tokenizer: Any) -> tuple[str, ...]:
        """The mode's token; warns if no model has been trained with it."""
        if tokenizer is not None and self.mode not in tokenizer.get_vocab():
            warnings.warn(
                f"mode_token: the tokenizer has no {self.mode}; it is added with a random row, "
                "which says nothing of any mode",
                stacklevel=2,
            )
        return (self.mode,)

    def shown_length(self, length: int) -> int:
        """One token less."""
        return length - 1

    def present(self, example: Example, context: Context) -> Example:
        """The example with the token in front; what has one entry a token grows with it."""
        tokenizer = context.tokenizer
        token = tokenizer.convert_tokens_to_ids(self.mode)
        ids = example["input_ids"]
        place = int(tokenizer.cls_token_id is not None and ids[:1] == [tokenizer.cls_token_id])
        shown = {**example, "input_ids": [*ids[:place], token, *ids[place:]]}
        if "token_type_ids" in example:
            shown["token_type_ids"] = [0, *example["token_type_ids"]]
        if context.task == "causal-language-modeling":
            # What is scored stays the same: not the token, and not what stood first before it.
            shown["labels"] = [-100, -100, *example["labels"][1:]]
        return shown
