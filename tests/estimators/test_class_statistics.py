"""Nearest class mean and streaming LDA: known answers, invariances, forgetting, bad input."""

from __future__ import annotations

import json
import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.estimator_checks import parametrize_with_checks

from outlay import estimators
from outlay.core.errors import ConfigError, DataError
from outlay.estimators import NearestClassMean, StreamingLDA
from outlay.estimators._features import ZeroRowsWarning

# What check_estimator asks and these estimators decline, with the reason.
DECLINED = {
    "check_estimators_nan_inf": "fits labels of type float, which are refused as measured values; "
    "features with NaN are tested here with whole-number labels",
}
VARIANTS = [
    NearestClassMean(),
    NearestClassMean(normalize=False, priors="empirical"),
    NearestClassMean(normalize_means=True),
    NearestClassMean(metric="cosine"),
    StreamingLDA(),
    StreamingLDA(normalize=True, shrinkage=0.1, target="trace"),
    StreamingLDA(shrinkage=0.0, priors="empirical"),
    StreamingLDA(covariance="diagonal"),
]


@parametrize_with_checks(VARIANTS, expected_failed_checks=lambda _: DECLINED)
def test_scikit_learns_checks(estimator, check):
    # One check sets settings of wrong types on purpose, which this suite's type checks refuse.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        check(estimator)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def rows(count=200, width=6, classes=4, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centers = generator.normal(size=(classes, width))
    return centers[labels] + 0.7 * generator.normal(size=(count, width)) + offset, labels


def same(a, b, tolerance=1e-12):
    """Equal statistics: counts to the row, sums and scatter to rounding."""
    a, b = a.statistics_, b.statistics_
    assert a.labels.tolist() == b.labels.tolist()
    assert a.counts.tolist() == b.counts.tolist()
    assert a.zero_rows.tolist() == b.zero_rows.tolist()
    for name in ("sums", "deviations"):
        mine, theirs = getattr(a, name), getattr(b, name)
        scale = max(1.0, np.abs(theirs).max(initial=0.0))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale)


# Known answers.


def test_the_tiny_example():
    model = NearestClassMean().fit([[1, 0], [0, 1], [-1, 0]], [0, 0, 1])
    np.testing.assert_array_equal(model.means_, [[0.5, 0.5], [-1, 0]])
    distances = -2 * model.logits([[0, 1], [-0.6, -0.8]])
    np.testing.assert_allclose(distances, [[0.5, 2], [2.9, 0.8]], atol=1e-12)
    assert model.predict([[0, 1], [-0.6, -0.8]]).tolist() == [0, 1]


def test_equals_scikit_learns_nearest_centroid():
    features, labels = rows()
    unit = normalize(features)
    model, peer = NearestClassMean().fit(features, labels), NearestCentroid().fit(unit, labels)
    np.testing.assert_allclose(model.means_, peer.centroids_, atol=1e-12)
    new, _ = rows(seed=1)
    assert model.predict(new).tolist() == peer.predict(normalize(new)).tolist()


def test_one_row_a_class_is_one_nearest_neighbour():
    features, _ = rows(12)
    model = NearestClassMean().fit(features, range(12))
    peer = KNeighborsClassifier(1).fit(normalize(features), range(12))
    new, _ = rows(seed=3)
    assert model.predict(new).tolist() == peer.predict(normalize(new)).tolist()


@pytest.mark.parametrize("model", VARIANTS, ids=repr)
def test_linear_layer_differs_by_a_constant_of_each_row(model):
    features, labels = rows()
    model = clone(model).fit(features, labels)
    new, _ = rows(50, seed=2)
    seen = normalize(new) if model._normalizes() else new
    outputs = model.to_linear()(torch.from_numpy(seen)).numpy()
    apart = outputs - model.logits(new)
    np.testing.assert_allclose(apart, np.tile(apart[:, :1], apart.shape[1]), atol=1e-9)
    assert model.classes_[outputs.argmax(1)].tolist() == model.predict(new).tolist()
    if isinstance(model, NearestClassMean) and model.priors == "uniform":
        np.testing.assert_allclose(apart[:, 0], 0.5 * (seen**2).sum(1), atol=1e-9)


def test_is_a_gaussian_of_unit_covariance_and_equal_priors():
    features, labels = rows()
    model = NearestClassMean(normalize=False).fit(features, labels)
    new, _ = rows(50, seed=2)
    density = -0.5 * ((new[:, None] - model.means_[None]) ** 2).sum(2)
    np.testing.assert_allclose(model.logits(new), density, atol=1e-10)
    chance = np.exp(density) / np.exp(density).sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(new), chance, atol=1e-12)
    unit = StreamingLDA(shrinkage=1.0).fit(features, labels)
    np.testing.assert_allclose(unit.logits(new), density, atol=1e-10)


def test_streaming_lda_is_linear_discriminant_analysis():
    features, labels = rows(400)
    new, _ = rows(60, seed=2)
    for shrinkage in (0.2, 0.0):
        model = StreamingLDA(shrinkage=shrinkage, target="trace", priors="empirical")
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None)
        model.fit(features, labels)
        within = sum(
            (features[labels == k] - model.means_[k]).T @ (features[labels == k] - model.means_[k])
            for k in range(4)
        )
        np.testing.assert_allclose(model.covariance_, within / 400, atol=1e-12)
        peer.fit(features, labels)
        if not shrinkage:
            np.testing.assert_allclose(model.predict_proba(new), peer.predict_proba(new), atol=1e-9)
        assert model.predict(new).tolist() == peer.predict(new).tolist()


def test_renormalized_means_are_the_cosine_and_another_rule():
    # Class 0 is tight around 45 degrees off; class 1 is wide, its mean short.
    angles = np.deg2rad([50, 50, 50, -80, 80])
    features = np.c_[np.cos(angles), np.sin(angles)]
    labels = [0, 0, 0, 1, 1]
    plain = NearestClassMean().fit(features, labels)
    assert np.linalg.norm(plain.means_, axis=1).max() <= 1 + 1e-12
    renormalized = NearestClassMean(normalize_means=True).fit(features, labels)
    cosine = NearestClassMean(normalize=False, metric="cosine").fit(features, labels)
    point = np.deg2rad(20)
    new = 3 * np.array([[np.cos(point), np.sin(point)]])
    assert plain.predict(new) == [0]
    assert renormalized.predict(new) == cosine.predict(new) == [1]


def test_far_from_zero_no_digits_are_lost():
    features, labels = rows(offset=1e7)
    near = features - 1e7
    for model in (NearestClassMean(normalize=False), StreamingLDA(), StreamingLDA(shrinkage=0.0)):
        far = clone(model).fit(features, labels).predict(features)
        assert far.tolist() == clone(model).fit(near, labels).predict(near).tolist()


# Order, batches, merging, forgetting.


@st.composite
def parted_rows(draw):
    """Rows, an order of them, and where that order is cut into batches."""
    count = draw(st.integers(2, 40))
    width = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**31))
    features, labels = rows(count, width, draw(st.integers(1, 5)), seed)
    if draw(st.booleans()):
        features[draw(st.integers(0, count - 1))] = 0.0
    order = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.lists(st.integers(1, count - 1), max_size=5, unique=True)))
    return features, labels, np.split(np.array(order), cuts)


@settings(max_examples=60, deadline=None)
@given(parted_rows(), st.sampled_from(VARIANTS), st.randoms())
@pytest.mark.filterwarnings("ignore::outlay.estimators._features.ZeroRowsWarning")
def test_order_batches_and_merging_change_nothing(parts, model, random):
    features, labels, batches = parts
    whole = clone(model).fit(features, labels)
    streamed, pieces = clone(model), []
    for batch in batches:
        streamed.partial_fit(features[batch], labels[batch])
        pieces.append(clone(model).fit(features[batch], labels[batch]))
    same(streamed, whole)
    random.shuffle(pieces)
    merged = clone(model)
    for piece in pieces:
        merged.merge(piece)
    same(merged, whole)
    scores = whole.logits(features)
    ordered = np.sort(scores, axis=1)
    clear = np.ones(len(scores), bool) if scores.shape[1] == 1 else (
        ordered[:, -1] - ordered[:, -2] > 1e-6 * (1 + np.abs(scores).max())
    )  # fmt: skip
    for other in (streamed, merged):
        assert (other.predict(features) == whole.predict(features))[clear].all()


@settings(max_examples=40, deadline=None)
@given(parted_rows(), st.sampled_from(VARIANTS))
@pytest.mark.filterwarnings("ignore::outlay.estimators._features.ZeroRowsWarning")
def test_rows_taken_away_were_never_there(parts, model):
    features, labels, batches = parts
    kept = np.concatenate(batches[:1])
    expected = clone(model).fit(features[kept], labels[kept])
    found = clone(model).fit(features, labels)
    for batch in batches[1:]:
        found.subtract(features[batch], labels[batch])
    same(found, expected, 1e-11)


def test_a_removed_class_is_gone_and_the_others_stay_to_the_bit():
    features, labels = rows()
    for model in (NearestClassMean(), StreamingLDA(covariance="diagonal")):
        model.fit(features, labels)
        without = clone(model).fit(features[labels != 2], labels[labels != 2])
        model.remove_class(2)
        assert model.classes_.tolist() == [0, 1, 3]
        np.testing.assert_array_equal(model.statistics_.sums, without.statistics_.sums)
        same(model, without)
        assert 2 not in model.predict(features)
    shared = StreamingLDA().fit(features, labels)
    with pytest.raises(DataError, match="cannot tell what class 2"):
        shared.remove_class(2)
    shared.subtract(features[labels == 2], labels[labels == 2])
    same(shared, StreamingLDA().fit(features[labels != 2], labels[labels != 2]))


def test_new_classes_leave_old_means_as_they_are_and_may_still_cost_recall():
    features, labels = rows(classes=5, width=3)
    model = NearestClassMean()
    old = labels < 2
    model.partial_fit(features[old], labels[old])
    means = model.means_.copy()
    before = model.score(features[old], labels[old])
    model.partial_fit(features[~old], labels[~old])
    np.testing.assert_array_equal(model.means_[:2], means)
    assert model.score(features[old], labels[old]) < before


def test_unseen_classes_are_never_predicted():
    features, labels = rows()
    model = NearestClassMean(normalize=False)
    model.partial_fit(features[labels < 2] + 100, labels[labels < 2], classes=range(9))
    assert set(model.predict(np.zeros((5, 6)))) <= {0, 1}
    with pytest.raises(DataError, match="label 3 is none"):
        model.partial_fit(features[labels == 3], labels[labels == 3], classes=[0, 1])


# What goes in.


def test_numpy_pandas_and_torch_give_one_result():
    features, labels = rows()
    features = features.astype(np.float32)
    expected = NearestClassMean().fit(features, labels)
    tensor = torch.from_numpy(features)
    same(NearestClassMean().fit(tensor, torch.from_numpy(labels)), expected)
    assert NearestClassMean().fit(tensor.bfloat16(), labels).score(features, labels) > 0.5
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(features, columns=list("abcdef"))
    model = NearestClassMean().fit(frame, pandas.Series(labels))
    same(model, expected)
    assert model.feature_names_in_.tolist() == list("abcdef")


def test_pipelines_and_grid_search():
    features, labels = rows()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), StreamingLDA()),
        {"streaminglda__shrinkage": [0.01, 0.5], "streaminglda__covariance": ["full", "diagonal"]},
        cv=3,
    )
    assert search.fit(features, labels).best_score_ > 0.6


def test_nan_features_name_the_rows_and_change_nothing():
    features, labels = rows()
    model = NearestClassMean().fit(features, labels)
    state = model.statistics_.sums.copy()
    bad = features.copy()
    bad[[3, 17], 2] = np.nan, np.inf
    for call in (lambda: model.partial_fit(bad, labels), lambda: model.predict(bad)):
        with pytest.raises(DataError, match=r"2 of 200 rows: 3, 17"):
            call()
    np.testing.assert_array_equal(model.statistics_.sums, state)


def test_rows_of_norm_zero_are_kept_counted_and_said():
    features, labels = rows()
    features[:3] = 0.0
    model = NearestClassMean()
    with pytest.warns(ZeroRowsWarning, match="3 of 200"):
        model.fit(features, labels)
    assert model.zero_rows_ == 3 and model.class_counts_.sum() == 200
    model.subtract(features[:2], labels[:2])
    assert model.zero_rows_ == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NearestClassMean(normalize=False).fit(features, labels)
        tiny = NearestClassMean().fit(features[3:] * 1e-200, labels[3:])
    same(tiny, NearestClassMean().fit(features[3:], labels[3:]))


def test_what_is_refused():
    features, labels = rows()
    fitted = NearestClassMean().fit(features, labels)
    with pytest.raises(NotFittedError, match="no class"):
        NearestClassMean().predict(features)
    with pytest.raises(DataError, match="3 features"):
        fitted.partial_fit(features[:, :3], labels)
    with pytest.raises(DataError, match="classes are whole numbers or text"):
        NearestClassMean().fit(features, labels.astype(float))
    with pytest.raises(DataError, match="do not go with"):
        fitted.partial_fit(features, labels.astype(str))
    with pytest.raises(DataError, match="never seen"):
        fitted.subtract(features, labels + 50)
    with pytest.raises(DataError, match="2 rows of class"):
        NearestClassMean().fit(features[:1], labels[:1]).subtract(features[[0, 0]], labels[[0, 0]])
    with pytest.raises(ConfigError, match="same settings"):
        fitted.merge(NearestClassMean(normalize=False).fit(features, labels))
    with pytest.raises(DataError, match="width"):
        fitted.merge(NearestClassMean().fit(features[:, :3], labels))
    for model, name, value in (
        (NearestClassMean(), "metric", "l1"), (NearestClassMean(), "priors", "flat"),
        (StreamingLDA(), "shrinkage", 2), (StreamingLDA(), "target", "x"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="is not allowed"):
            model.set_params(**{name: value}).fit(features, labels)
    emptied = NearestClassMean().fit(features, labels).subtract(features, labels)
    with pytest.raises(NotFittedError):
        emptied.predict(features)


# Files.


@pytest.mark.parametrize("model", [*VARIANTS[:1], *VARIANTS[4:]], ids=repr)
@pytest.mark.parametrize("kind", [int, str])
def test_saved_and_loaded(model, kind, tmp_path):
    features, labels = rows()
    model = clone(model).fit(features, labels.astype(kind))
    model.save(tmp_path / "head")
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == [
        "estimator.json", "statistics.safetensors",
    ]  # fmt: skip
    found = estimators.load(tmp_path / "head")
    same(found, model, 0)
    assert found.get_params() == model.get_params()
    np.testing.assert_array_equal(found.logits(features), model.logits(features))
    np.testing.assert_array_equal(found.classes_, model.classes_)
    with pytest.raises(ConfigError, match="there already"):
        model.save(tmp_path / "head")


def test_an_empty_estimator_is_saved_and_bad_folders_are_refused(tmp_path):
    NearestClassMean(priors="empirical").save(tmp_path / "empty")
    found = NearestClassMean.load(tmp_path / "empty")
    assert found.priors == "empirical" and not hasattr(found, "classes_")
    with pytest.raises(DataError, match="holds 'nearest_class_mean'"):
        StreamingLDA.load(tmp_path / "empty")
    with pytest.raises(DataError, match="no saved estimator"):
        estimators.load(tmp_path)
    features, labels = rows()
    NearestClassMean().fit(features, labels).save(tmp_path / "head")
    facts = json.loads((tmp_path / "head" / "estimator.json").read_text())
    facts["labels"].append(9)
    (tmp_path / "head" / "estimator.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="cannot be read"):
        estimators.load(tmp_path / "head")
    (tmp_path / "head" / "statistics.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(DataError, match="cannot be read"):
        estimators.load(tmp_path / "head")
