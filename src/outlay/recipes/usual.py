"""The recipes that come with outlay: small, on data and models that install with pip."""

from __future__ import annotations

from ..core.budget import Budget
from ..training.recipe import Recipe
from ..training.specs import (
    BatchSpec,
    DataSpec,
    EvaluateSpec,
    EverySpec,
    ModelSpec,
    OptimizerSpec,
    ScheduleSpec,
    TaskSpec,
)


def digits_vit() -> Recipe:
    """A small vision transformer from scratch on 8x8 handwritten digits; seconds."""
    return Recipe(
        name="digits-vit",
        model=ModelSpec(config="vit", layers=3, width=64, heads=4),
        task="image-classification",
        data=DataSpec(asset="digits", validation_share=300, test_share=300),
        optimizer=OptimizerSpec(lr=2e-3, weight_decay=0.01),
        schedule=ScheduleSpec(name="cosine"),
        batch=BatchSpec(size=32),
        budget=Budget(300, "steps"),
        every=EverySpec(evaluate=100),
    )


def digits_cnn() -> Recipe:
    """A small convolutional network from scratch on 8x8 handwritten digits; seconds."""
    return digits_vit().changed(
        {
            "name": "digits-cnn",
            "model": ModelSpec(config="cnn", layers=3, width=64),
            "budget": Budget(200, "steps"),
        }
    )


def digits_then_fashion() -> Recipe:
    """Handwritten digits, then garments, in one small convolutional network with ten outputs.

    Two epochs of 7,500 digits and one of 10,000 garments under one optimizer, at a constant rate;
    500 and 1,000 rows are kept for validation, 2,000 each for the test. Every task is measured
    after each of them.
    """
    garments = TaskSpec(asset="fashion-mnist", limit=10_000, validation_share=1000, weight=2)
    return Recipe(
        name="digits-then-fashion",
        model=ModelSpec(config="cnn", layers=2, width=32),
        task="image-classification",
        data=DataSpec(
            test_share=2000,
            tasks=(TaskSpec(asset="mnist", validation_share=500, weight=3), garments),
        ),
        optimizer=OptimizerSpec(name="adagrad", lr=0.03, eps=1e-10, clip=None),
        schedule=ScheduleSpec(name="constant", warmup=0.0),
        batch=BatchSpec(size=32),
        budget=Budget(780, "steps"),
        evaluate=EvaluateSpec(batch=250),
    )


def glass_lm() -> Recipe:
    """A language model of Lewis Carroll, 0.85 M parameters, moved to product reviews.

    300 whole reviews, of which 30 are kept for validation and 30 for the test; rows are windows
    of 128 tokens, the longest that the model was trained on.
    """
    return Recipe(
        name="glass-lm",
        model=ModelSpec(asset="glass-en"),
        task="causal-language-modeling",
        data=DataSpec(asset="review-texts", validation_share=30, test_share=30),
        optimizer=OptimizerSpec(lr=1e-3, weight_decay=0.01),
        batch=BatchSpec(size=16, length=128),
        budget=Budget(150, "steps"),
        every=EverySpec(evaluate=50),
    )


def pretrain_lm() -> Recipe:
    """A LLaMA-shaped language model from scratch on 53 MB of real text in five domains.

    3.2 M parameters outside the embedding, 4,096 tokens of byte-level byte-pair encoding trained on
    the training documents; rows are blocks of 256 tokens. One document in a hundred of every domain
    is kept for validation, and another for the test.
    """
    return Recipe(
        name="pretrain-lm",
        model=ModelSpec(
            config="llama", layers=4, width=256, heads=8, vocabulary=4096, tokenizer="bpe"
        ),
        task="causal-language-modeling",
        data=DataSpec(asset="library", blocks=True, validation_share=0.01, test_share=0.01),
        optimizer=OptimizerSpec(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        schedule=ScheduleSpec(name="cosine", floor=0.1),
        batch=BatchSpec(size=32, micro=8, length=256),
        budget=Budget(2e6, "tokens"),
        every=EverySpec(evaluate=100),
        evaluate=EvaluateSpec(references=("ngram(order=5)", "xz")),
    )


def minilm_questions() -> Recipe:
    """A pre-trained sentence encoder (22.7 M parameters) on 5,381 questions in 6 classes.

    Rows are cut at 24 tokens. Dropout is 0 and what frozen lower layers give is computed once,
    so an adapter in the top two layers (`layers_to_transform=(-2, -1)`) takes a third of the
    time. Without a method the whole model trains.
    """
    return Recipe(
        name="minilm-questions",
        model=ModelSpec(asset="minilm", dropout=0.0, cache_frozen=True),
        task="sequence-classification",
        data=DataSpec(asset="questions", deduplicate=True, validation_share=1000, test_share=1000),
        optimizer=OptimizerSpec(lr=1e-3),
        batch=BatchSpec(size=16, length=24),
        budget=Budget(150, "steps"),
        every=EverySpec(evaluate=50),
    )


def minilm_questions_full() -> Recipe:
    """The same questions with every layer open to the methods; for comparisons done properly."""
    return minilm_questions().changed(
        {"name": "minilm-questions-full", "model.cache_frozen": False}
    )


def minilm_reviews() -> Recipe:
    """The same encoder on real-valued ratings of 3,708 sentences of product reviews."""
    return minilm_questions().changed(
        {
            "name": "minilm-reviews",
            "task": "regression",
            "data": DataSpec(asset="reviews", validation_share=600, test_share=600),
            "batch.length": 48,
        }
    )
