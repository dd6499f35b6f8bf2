"""fastattn.integrations.sklearn: scikit-learn's own checks, kernels in float64, and numbers out of the ordinary."""

import doctest
import importlib.util
import pickle
import re
import tracemalloc
from pathlib import Path

import fresh_process
import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn", reason="fastattn.integrations.sklearn needs scikit-learn")
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_diabetes, load_iris  # noqa: E402
from sklearn.metrics.pairwise import cosine_distances, euclidean_distances, rbf_kernel  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.multioutput import MultiOutputClassifier  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

import fastattn.integrations.sklearn as module  # noqa: E402
from fastattn.integrations.sklearn import NadarayaWatsonClassifier, NadarayaWatsonRegressor  # noqa: E402

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "kernel_regression.py"
METRICS = "sqeuclidean", "cosine"
# On a sphere a bandwidth of 1 averages nearly all samples, and a check wants a score.
ESTIMATORS = [
    NadarayaWatsonRegressor(),
    NadarayaWatsonClassifier(),
    NadarayaWatsonRegressor(0.2, metric="cosine", num_threads=1),
    NadarayaWatsonClassifier(0.2, metric="cosine", num_threads=1),
]


@parametrize_with_checks(ESTIMATORS)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def problem(dtype=np.float64, outputs=None, shift=0.0, seed=0):
    """60 samples with targets and 20 queries, three features. Numbers are multiples of 1/64, exact beside a shift."""
    rng = np.random.default_rng(seed)
    X, queries = (np.round(rng.standard_normal((n, 3)) * 64) / 64 + shift for n in (60, 20))
    y = rng.standard_normal(60 if outputs is None else (60, outputs))
    return X.astype(dtype), y, queries.astype(dtype)


def expected_weights(X, queries, bandwidth, metric):
    X, queries = X.astype(np.float64), queries.astype(np.float64)
    X, queries = X - X.mean(axis=0) * (metric != "cosine"), queries - X.mean(axis=0) * (metric != "cosine")
    distances = (
        cosine_distances(queries, X) if metric == "cosine" else euclidean_distances(queries, X, squared=True) / 2
    )
    weights = np.exp(-distances / bandwidth**2)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("metric", METRICS)
def test_weights_and_means(metric, dtype):
    for bandwidth in 0.1, 0.5, 2.0:
        X, y, queries = problem(dtype)
        weights = expected_weights(X, queries, bandwidth, metric)
        model = NadarayaWatsonRegressor(bandwidth, metric).fit(X, y)
        # By scores up to 1000, whose rounding errors are in the weights.
        rtol = 1e-11 if dtype == np.float64 else 2e-4
        np.testing.assert_allclose(
            model.attention_weights(queries), weights, rtol, 1e-15 if dtype == np.float64 else 1e-8
        )
        found = model.predict(queries)
        assert found.dtype == np.float64 and found.shape == (20,)
        np.testing.assert_allclose(found, weights @ y, rtol=0, atol=10 * rtol)


def test_means_are_those_of_rbf_kernel():
    X, y, queries = problem()
    kernel = rbf_kernel(queries, X, gamma=0.5 / 0.7**2)
    ours = NadarayaWatsonRegressor(0.7).fit(X, y).predict(queries)
    np.testing.assert_allclose(ours, kernel @ y / kernel.sum(axis=1), rtol=1e-11)


@pytest.mark.parametrize("outputs", [1, 4])
def test_several_outputs(outputs):
    X, y, queries = problem(outputs=outputs)
    together = NadarayaWatsonRegressor(0.5).fit(X, y.squeeze()).predict(queries).reshape(20, outputs)
    for i in range(outputs):
        np.testing.assert_allclose(together[:, i], NadarayaWatsonRegressor(0.5).fit(X, y[:, i]).predict(queries), 1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_classes(metric):
    X, y, queries = problem()
    names = np.array(["high", "low", "middle"])[np.digitize(y, [-0.5, 0.5])]
    model = NadarayaWatsonClassifier(0.4, metric).fit(X, names)
    votes = expected_weights(X, queries, 0.4, metric) @ (names[:, None] == model.classes_)
    proba = model.predict_proba(queries)
    np.testing.assert_allclose(proba, votes, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-13)
    np.testing.assert_array_equal(model.predict(queries), model.classes_[votes.argmax(axis=1)])


def test_probabilities_are_none_below_0_or_above_1():
    """Rounding errors of what is centred included."""
    X, _, queries = problem(np.float32)
    proba = NadarayaWatsonClassifier(0.2).fit(X, np.arange(60) % 7).predict_proba(queries)
    assert (proba >= 0).all() and (proba <= 1).all()


def test_several_outputs_of_classes():
    X, y, queries = problem(outputs=2)
    labels = np.digitize(y, [-0.5, 0.5]) * [1, 10]
    model = NadarayaWatsonClassifier(0.4).fit(X, labels)
    each = MultiOutputClassifier(NadarayaWatsonClassifier(0.4)).fit(X, labels)
    np.testing.assert_array_equal(model.predict(queries), each.predict(queries))
    assert [list(classes) for classes in model.classes_] == [[0, 1, 2], [0, 10, 20]]
    for ours, expected in zip(model.predict_proba(queries), each.predict_proba(queries), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("dtype", "shift"), [(np.float64, 1e9), (np.float32, 1e4)])
def test_a_large_mean_costs_nothing(dtype, shift):
    """Of samples and of targets; without centring, scores would be 1e18 and 1e8 here."""
    X, y, queries = problem(dtype)
    far, _, far_queries = problem(dtype, shift=shift)
    np.testing.assert_array_equal(far - dtype(shift), X)
    expected = expected_weights(X, queries, 0.3, "sqeuclidean") @ y
    tolerance = 1e-9 if dtype == np.float64 else 1e-4
    plain = NadarayaWatsonRegressor(0.3).fit(X, y).predict(queries)
    np.testing.assert_allclose(plain, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(NadarayaWatsonRegressor(0.3).fit(far, y).predict(far_queries), expected, 0, tolerance)
    shifted = NadarayaWatsonRegressor(0.3).fit(X, y + 1e7).predict(queries)
    np.testing.assert_allclose(shifted - 1e7, expected, rtol=0, atol=tolerance + 4e-9)


def test_float32_where_its_scores_would_not_do():
    """Samples 10,000 bandwidths from the centre: rounding errors of float32 would be scores of 10."""
    X, y, queries = problem(np.float32)
    queries = (X[:20] + 1e-5).astype(np.float32)
    model = NadarayaWatsonRegressor(3e-4).fit(X, y)
    expected = expected_weights(X, queries, 3e-4, "sqeuclidean")
    np.testing.assert_allclose(model.predict(queries), expected @ y, rtol=0, atol=1e-6)
    assert model.attention_weights(queries).dtype == np.float64
    assert NadarayaWatsonRegressor(1.0).fit(X, y).attention_weights(queries).dtype == np.float32


def test_float32_of_directions_that_are_alike():
    X, y, queries = problem(np.float32)
    X, queries = X + 100, queries + 100
    for bandwidth, kind in (2e-3, np.float64), (0.1, np.float32):
        model = NadarayaWatsonRegressor(bandwidth, "cosine").fit(X, y)
        weights = model.attention_weights(queries)
        assert weights.dtype == kind
        expected = expected_weights(X, queries, bandwidth, "cosine")
        np.testing.assert_allclose(weights, expected, rtol=1e-5 if kind == np.float32 else 1e-8)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [1e3, 1e10, 1e38, 1e308])
@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")  # scikit-learn adds up to see what is finite
def test_a_query_far_from_all_samples(dtype, metric, size):
    """Its mean is the target of the sample that is farthest in its direction."""
    if size > float(np.finfo(dtype).max):
        pytest.skip("not a number of float32")
    X, y, queries = problem(dtype)
    queries = queries / np.abs(queries).max(axis=1, keepdims=True) * dtype(size)
    for bandwidth in 1e-3, 1.0:
        model = NadarayaWatsonRegressor(bandwidth, metric).fit(X, y)
        found, weights = model.predict(queries), model.attention_weights(queries)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        if metric == "sqeuclidean" and size > 1e3:
            nearest = ((queries / dtype(size)).astype(np.float64) @ X.T.astype(np.float64)).argmax(axis=1)
            np.testing.assert_allclose(found, y[nearest], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bandwidth", [1e-300, 1e-20, 1e-5])
def test_a_tiny_bandwidth_is_the_nearest_sample(bandwidth):
    X, y, _ = problem()
    X = X[:30] * 7
    found = NadarayaWatsonRegressor(bandwidth).fit(X, y[:30]).predict(X + 1e-3)
    np.testing.assert_allclose(found, y[:30], rtol=1e-12)


def test_a_huge_bandwidth_is_the_mean():
    X, y, queries = problem()
    for bandwidth in 1e10, 1e300:
        np.testing.assert_allclose(NadarayaWatsonRegressor(bandwidth).fit(X, y).predict(queries), y.mean(), rtol=1e-12)


def test_rows_of_zeros_have_no_direction():
    X, y, queries = problem()
    X[:5] = queries[0] = 0
    model = NadarayaWatsonRegressor(0.5, "cosine").fit(X, y)
    np.testing.assert_allclose(model.attention_weights(queries), expected_weights(X, queries, 0.5, "cosine"), 1e-11)
    np.testing.assert_allclose(model.predict(queries[:1]), y.mean(), rtol=1e-12)


def test_the_matrix_of_weights_is_not_in_memory():
    rng = np.random.default_rng(0)
    X, queries = rng.standard_normal((20000, 4)), rng.standard_normal((500, 4))
    model = NadarayaWatsonRegressor(0.5).fit(X, X[:, 0])
    tracemalloc.start()
    model.predict(queries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500 * 20000 * 8 / 100


def test_bits_do_not_depend_on_threads_or_layout():
    X, y, queries = problem()
    one = NadarayaWatsonRegressor(0.5, num_threads=1).fit(X, y).predict(queries)
    columns = (
        NadarayaWatsonRegressor(0.5, num_threads=4).fit(np.asfortranarray(X), y).predict(np.asfortranarray(queries))
    )
    np.testing.assert_array_equal(columns, one)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_pickle_and_clone(estimator):
    X, y = load_iris(return_X_y=True)
    fitted = clone(estimator).fit(X, y)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    assert clone(fitted).get_params() == estimator.get_params()
    assert len(pickle.dumps(fitted)) < 2 * (X.nbytes + 4 * y.nbytes) + 4096


def test_in_a_pipeline_and_a_grid():
    X, y = load_diabetes(return_X_y=True)
    model = make_pipeline(StandardScaler(), NadarayaWatsonRegressor())
    name = "nadarayawatsonregressor"
    grid = {f"{name}__bandwidth": [0.3, 1.0, 1.5, 30.0], f"{name}__metric": METRICS}
    search = GridSearchCV(model, grid, cv=3).fit(X, y)
    assert search.best_params_[f"{name}__bandwidth"] < 30 and search.best_score_ > 0.35
    X, y = load_iris(return_X_y=True)
    assert cross_val_score(make_pipeline(StandardScaler(), NadarayaWatsonClassifier(0.3)), X, y).mean() > 0.9


def test_a_data_frame():
    pandas = pytest.importorskip("pandas", reason="the test needs pandas")
    X, y, queries = problem()
    frame, other = (pandas.DataFrame(x, columns=["a", "b", "c"]) for x in (X, queries))
    model = NadarayaWatsonRegressor(0.5).fit(frame, pandas.Series(y))
    np.testing.assert_array_equal(model.predict(other), NadarayaWatsonRegressor(0.5).fit(X, y).predict(queries))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(other[["b", "a", "c"]])


@pytest.mark.parametrize(
    ("parameters", "kind", "message"),
    [
        ({"bandwidth": 0}, ValueError, "bandwidth must be positive and finite, not 0"),
        ({"bandwidth": np.inf}, ValueError, "bandwidth must be positive and finite, not inf"),
        ({"bandwidth": "scott"}, TypeError, "bandwidth must be a positive number, not 'scott'"),
        ({"bandwidth": None}, TypeError, "bandwidth must be a positive number, not None"),
        ({"metric": "manhattan"}, ValueError, "metric must be 'sqeuclidean' or 'cosine', not 'manhattan'"),
    ],
)
def test_parameters_that_are_refused(parameters, kind, message):
    X, y, _ = problem()
    for estimator in NadarayaWatsonRegressor, NadarayaWatsonClassifier:
        with pytest.raises(kind, match=f"^{message}$"):
            estimator(**parameters).fit(X, y > 0)


def test_samples_that_are_too_large():
    X, y, _ = problem()
    X[3, 1] = -2e300
    with pytest.raises(ValueError, match=r"^X has numbers as large as 2e\+300; at most 1e\+290 is allowed$"):
        NadarayaWatsonRegressor().fit(X, y)
    X[3, 1] = -1e289
    assert np.isfinite(NadarayaWatsonRegressor().fit(X, y).predict(X)).all()


def test_threads_that_are_refused():
    X, y, queries = problem()
    with pytest.raises(ValueError, match="num_threads"):
        NadarayaWatsonRegressor(num_threads=0).fit(X, y).predict(queries)


def test_the_examples_run():
    assert doctest.testmod(module).failed == 0
    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    exec("\n".join(lines), {})


def test_the_script_runs(capsys):
    spec = importlib.util.spec_from_file_location("kernel_regression", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--folds", "2", "--only", "watson"])
    found = re.findall(r"^  NadarayaWatson, (\w+) +(0\.\d+) \+- ", capsys.readouterr().out, re.MULTILINE)
    assert [metric for metric, _ in found] == list(METRICS) * 3
    diabetes, lower, names = (float(found[i][1]) for i in (0, 2, 4))
    assert diabetes > 0.35 and lower > 0.4 and names > 0.95


def test_a_missing_scikit_learn_is_named():
    fresh_process.run("""
        import sys
        sys.modules["sklearn"] = None
        try:
            import fastattn.integrations.sklearn
        except ImportError as error:
            assert "needs scikit-learn: pip install" in str(error) and "fastattn[sklearn]" in str(error), error
        else:
            raise AssertionError
    """)
