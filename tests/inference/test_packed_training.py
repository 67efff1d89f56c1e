"""Packed losses are those of the documents one by one, and so are their gradients."""

from __future__ import annotations

import packing_kit as kit
import pytest
import torch
import torch.nn.functional as F

from outlay.core.errors import ConfigError
from outlay.inference import PackedCollator, packed_nll

every = pytest.mark.parametrize("family", kit.FAMILIES)


def separate(model, documents):
    """Sum of nats and number of predicted tokens of each document."""
    nats = []
    for document in documents:
        tokens = torch.tensor([document])
        logits = model(tokens).logits[0, :-1]
        nats.append(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
    return torch.stack(nats), torch.tensor([len(d) - 1 for d in documents])


@every
@pytest.mark.parametrize("way", ["segments", "mask"])
def test_packed_nll_is_that_of_each_document_alone(family, way):
    model, documents = kit.tiny(family), kit.ragged()
    found = packed_nll(model, documents, rows=2, attention=way)
    with torch.no_grad():
        nats, tokens = separate(model, documents)
    torch.testing.assert_close(found.nats, nats.double(), atol=1e-4, rtol=1e-5)
    assert found.tokens.tolist() == tokens.tolist()
    assert found.mean.isnan().tolist() == [len(d) == 1 for d in documents]


def test_documents_that_cannot_be_read_are_refused():
    with pytest.raises(ConfigError, match="sequence 0 is empty"):
        packed_nll(kit.tiny(), [[]])
    with pytest.raises(ConfigError, match="a row holds 3"):
        packed_nll(kit.tiny(), [[1] * 5], capacity=3)


@every
@pytest.mark.parametrize("tell", ["mask", "additive", "bounds"])
@pytest.mark.parametrize("shifted", [False, True])
def test_loss_and_gradients_are_the_token_weighted_mean(family, tell, shifted):
    implementation = {"mask": "sdpa", "additive": "eager", "bounds": "sdpa"}[tell]
    model, documents = kit.tiny(family, implementation).double(), kit.ragged()
    nats, tokens = separate(model, documents)
    expected = nats.sum() / tokens.sum()
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    if tell == "bounds":
        model.set_attn_implementation("outlay_segments")
    batch = PackedCollator(capacity=16, tell=tell, shifted=shifted, pad_to=4)(
        [{"input_ids": document} for document in documents]
    )
    if tell == "additive":
        batch["attention_mask"] = batch["attention_mask"].double()
    if shifted:
        labels = batch.pop("labels")
        loss = F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())
    else:
        loss = model(**batch).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    # The model's own loss is computed in float32.
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_labels_of_ones_own_are_kept_and_never_cross_a_border():
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, -100]},
    ]
    batch = PackedCollator(segment_ids=True, capacity=6, pad_to=6)(examples)
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, -100]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, -1]]
    shifted = PackedCollator(shifted=True, capacity=6, pad_to=6)(examples)
    assert shifted["labels"].tolist() == [[6, 7, -100, -100, -100, -100]]
    with pytest.raises(ConfigError, match="3 tokens and 1 labels"):
        PackedCollator()([{"input_ids": [1, 2, 3], "labels": [1]}])
    with pytest.raises(ConfigError, match="tell"):
        PackedCollator(tell="nothing")


def test_transformers_trainer_takes_the_collator(tmp_path):
    from transformers import Trainer, TrainingArguments

    documents = kit.ragged((7, 4, 12, 3, 2, 9, 6, 5))
    ends = []
    for collator in (PackedCollator(capacity=16), PackedCollator(capacity=1000)):
        model = kit.tiny()
        settings = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, max_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        rows = [{"input_ids": document} for document in documents]
        Trainer(model, settings, data_collator=collator, train_dataset=rows).train()  # pyright: ignore
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
