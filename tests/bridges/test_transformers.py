"""outlay's methods inside transformers' Trainer: same loss, same resume, refusals by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from outlay import Card, OnData
from outlay.bridges.transformers import OutlayCallback, OutlayTrainer, task_of
from outlay.core.errors import Conflict
from outlay.core.registry import entries
from outlay.nn.adapter import adapted_layers


@dataclass(frozen=True, kw_only=True)
class Chooses(OnData):
    card: ClassVar[Card] = Card(name="chooses", title="a selector")

    def select(self, pool: Any, context: Any = None) -> Any:
        return pool


METHODS = {
    "bone": "bone(r=4)",
    "svfit": "svfit(rank=4)",
    "lamda": "lamda(r=4, init='svd_zero', freeze_fraction=0.5)",
    "adalora": "adalora(init_r=4, target_r=2)",
}


def bert() -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=100,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertForSequenceClassification(config)


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(0, 100, (8,), generator=generator),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": torch.tensor(index % 3),
        }
        for index in range(count)
    ]


def trained(folder, method: str, micro: int = 8, resume: str | None = None) -> OutlayTrainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=10,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        report_to=[],
        save_steps=5,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
    )
    trainer = OutlayTrainer(bert(), arguments, train_dataset=rows(), methods=[method])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def gap(first: OutlayTrainer, second: OutlayTrainer) -> float:
    ours, theirs = dict(first.model.named_parameters()), dict(second.model.named_parameters())
    assert set(ours) == set(theirs)
    return max(float((ours[n] - theirs[n]).detach().abs().max()) for n in ours)


@pytest.mark.parametrize("name", [n for n in METHODS if n in entries()])
def test_trains_and_resumes_to_the_same_bits(tmp_path, name: str) -> None:
    whole = trained(tmp_path / "a", METHODS[name])
    resumed = trained(tmp_path / "b", METHODS[name], resume=str(tmp_path / "a" / "checkpoint-5"))
    assert gap(whole, resumed) == 0.0
    moved = [p for n, p in whole.model.named_parameters() if ".deltas." in n and p.requires_grad]
    assert name == "lamda" or any(float(p.detach().abs().max()) > 0 for p in moved)


def test_accumulation_changes_nothing_but_rounding(tmp_path) -> None:
    assert gap(trained(tmp_path / "a", "bone(r=4)"), trained(tmp_path / "b", "bone(r=4)", 2)) < 1e-5


def test_export_is_plain_and_answers_as_trained(tmp_path) -> None:
    trainer = trained(tmp_path, "bone(r=4)")
    batch = {key: value[None] for key, value in rows(1)[0].items()}
    trainer.model.eval()
    with torch.no_grad():
        before = trainer.model(**batch).logits
        plain = trainer.export_model()
        after = plain(**batch).logits
    assert not adapted_layers(plain)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_a_method_that_chooses_data_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(Conflict, match="chooses"):
        OutlayTrainer(bert(), TrainingArguments(str(tmp_path), use_cpu=True), methods=[Chooses()])
    with pytest.raises(Conflict, match="chooses"):
        OutlayCallback([Chooses()])


def test_task_follows_the_head() -> None:
    assert task_of(bert()) == "sequence-classification"
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        intermediate_size=16,
    )  # fmt: skip
    assert task_of(LlamaForCausalLM(config)) == "causal-language-modeling"
    with pytest.raises(Conflict, match="Linear"):
        task_of(torch.nn.Linear(2, 2))
