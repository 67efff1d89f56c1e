"""The linear baselines: known classes found, the strength chosen on validation, arms of a run."""

from __future__ import annotations

import numpy as np
import pytest

from outlay import FeatureProbe, TfidfLogisticRegression
from outlay.core import registry
from outlay.core.errors import ConfigError

TEXTS = ["red apple pie", "green apple tart", "fast red car", "slow green truck"] * 8
KINDS = [0, 0, 1, 1] * 8


def test_tfidf_finds_what_words_tell():
    model = TfidfLogisticRegression().fit(TEXTS, KINDS, (TEXTS[:4], KINDS[:4]))
    assert list(model.predict(["apple", "truck"])) == [0, 1]
    assert model.predict_proba(["apple"]).sum() == pytest.approx(1.0)
    assert model.num_parameters == model.model_.coef_.size + model.model_.intercept_.size


def test_probe_finds_a_linear_boundary_whatever_the_scale():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 3)) * [1.0, 1e3, 1e-3] + [0.0, 5e3, 2.0]
    kinds = (features[:, 2] > 2.0).astype(int)
    model = FeatureProbe().fit(features[:100], kinds[:100], (features[100:], kinds[100:]))
    assert model.model_.score(model.matrix(features[100:]), kinds[100:]) > 0.9


def test_the_strength_comes_from_validation_alone():
    generator = np.random.default_rng(1)
    features = generator.normal(size=(60, 20))
    kinds = (features[:, 0] > 0).astype(int)
    noisy = kinds.copy()
    noisy[:20] = 1 - noisy[:20]
    model = FeatureProbe(strengths=(1e-4, 10.0))
    scores = {}
    for strength in model.strengths:
        one = FeatureProbe(strengths=(strength,)).fit(features, noisy, (features, kinds))
        scores[strength] = one.model_.score(one.matrix(features), kinds)
    model.fit(features, noisy, (features, kinds))
    assert model.chosen_ == max(scores, key=lambda s: scores[s])


def test_the_registry_builds_them_and_refuses_unknown_settings():
    assert registry.find("feature-probe").kind == "estimator"
    model = registry.construct(TfidfLogisticRegression, {"ngrams": 1})
    assert model.ngrams == 1
    with pytest.raises(ConfigError, match="ngram"):
        registry.construct(TfidfLogisticRegression, {"ngram": 1})
