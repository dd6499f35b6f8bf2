"""Kernel regression and classification (Nadaraya-Watson) as estimators of scikit-learn.

    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from fastattn.integrations.sklearn import NadarayaWatsonRegressor

    X, y = load_diabetes(return_X_y=True)
    model = make_pipeline(StandardScaler(), NadarayaWatsonRegressor())
    search = GridSearchCV(model, {"nadarayawatsonregressor__bandwidth": [0.5, 1, 2, 4]}).fit(X, y)

A prediction is the mean of all samples' targets, weighted by a Gaussian of their distances: softmax attention of
queries to samples. It is exact, for any number of samples, and the matrix (queries, samples) is never in memory. `fit`
keeps one copy of X and one of y, `predict` makes one of the queries; both pass through float64.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
except ImportError as error:
    raise ImportError('fastattn.integrations.sklearn needs scikit-learn: pip install "fastattn[sklearn]"') from error
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

import fastattn

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import ArrayLike, NDArray

# Scores are as large as the square of the farthest sample's distance from the centre, in bandwidths, and have its
# rounding errors; beyond this, those of float32 change a weight by more than some 1e-4 of it, and float64 is used.
_LARGEST_SCORE = 1000.0
# The largest norms in bandwidths, so that no score overflows: of samples in float64, and of queries in either dtype.
_FARTHEST = 1e140
_FARTHEST_QUERY = {np.dtype(np.float32): 1e30, np.dtype(np.float64): 1e150}
_LARGEST = 1e290  # of numbers of X, so that a query of any size less the centre is finite


class _NadarayaWatson(BaseEstimator):
    """What both estimators share: samples, distances, weights."""

    def __init__(self, bandwidth: float = 1.0, metric: str = "sqeuclidean", num_threads: int | None = None) -> None:
        self.bandwidth = bandwidth
        self.metric = metric
        self.num_threads = num_threads

    def _checked(self, X: ArrayLike, y: ArrayLike, **how: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """Samples and targets, once parameters are what they should be."""
        bandwidth = self.bandwidth
        if not isinstance(bandwidth, numbers.Real) or isinstance(bandwidth, bool):
            raise TypeError(f"bandwidth must be a positive number, not {bandwidth!r}")
        if not 0 < bandwidth < np.inf:
            raise ValueError(f"bandwidth must be positive and finite, not {bandwidth!r}")
        if self.metric not in ("sqeuclidean", "cosine"):
            raise ValueError(f"metric must be 'sqeuclidean' or 'cosine', not {self.metric!r}")
        samples, targets = validate_data(self, X, y, dtype=[np.float64, np.float32], multi_output=True, **how)
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = column_or_1d(targets, warn=True)
        self.n_samples_fit_ = len(samples)
        return samples, targets

    def _placed(self, X: NDArray[Any]) -> NDArray[np.float64]:
        """The rows as points among which distances are measured."""
        points: NDArray[np.float64] = X.astype(np.float64, order="C")
        if self.metric == "cosine":  # of a row of zeros every cosine is 0, as in sklearn.metrics
            points /= np.abs(points).max(axis=1, keepdims=True, initial=np.finfo(np.float64).tiny)  # squares must fit
            norms = np.linalg.norm(points, axis=1, keepdims=True)
            points /= np.where(norms > 0, norms, 1)
        return points

    def _keep(self, X: NDArray[Any], targets: NDArray[Any]) -> None:
        """Samples, centred: a query's weights do not depend on the origin, but rounding errors do."""
        largest = float(np.abs(X).max(initial=0.0))
        if largest > _LARGEST:
            raise ValueError(f"X has numbers as large as {largest:.3g}; at most {_LARGEST} is allowed")
        points = self._placed(X)
        self._center = points.mean(axis=0)
        points -= self._center
        farthest = np.sqrt(points.shape[1]) * np.abs(points).max(initial=0.0)
        # Far below this only the nearest sample counts, whatever the bandwidth.
        self._unit = max(float(self.bandwidth), float(farthest) / _FARTHEST)
        points /= self._unit
        squares = np.einsum("ij,ij->i", points, points)
        largest = squares.max(initial=0.0)
        if self.metric == "cosine":  # samples may lie together far from the origin, where queries are
            largest = np.sqrt(largest) / self._unit
        single = X.dtype == np.float32 and largest <= _LARGEST_SCORE
        dtype = np.dtype(np.float32 if single else np.float64)
        self._samples = points.astype(dtype, copy=False)
        self._bias = (-0.5 * squares).astype(dtype, copy=False) if self.metric == "sqeuclidean" else None
        targets = targets.astype(np.float64)
        self._offset = targets.mean(axis=0)
        self._targets = (targets - self._offset).astype(dtype, copy=False)

    def _queries(self, X: ArrayLike) -> NDArray[Any]:
        check_is_fitted(self)
        given = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        points = self._placed(given)
        if self.metric == "sqeuclidean":
            points -= self._center
        dtype = self._samples.dtype
        sizes = np.abs(points).max(axis=1, keepdims=True, initial=0.0)
        limit = _FARTHEST_QUERY[dtype] * self._unit
        if sizes.max(initial=0.0) > limit:  # far from all samples only the direction counts
            points *= limit / np.maximum(sizes, limit)
        points /= self._unit
        return points.astype(dtype, copy=False)

    def _attend(self, X: ArrayLike, **options: Any) -> Any:
        return fastattn.dot_product_attention(
            self._queries(X),
            self._samples,
            self._targets,
            scale=1.0,
            bias=self._bias,
            num_threads=self.num_threads,
            **options,
        )

    def _means(self, X: ArrayLike) -> NDArray[np.float64]:
        """(queries, columns of the targets)"""
        return self._attend(X) + self._offset

    def attention_weights(self, X: ArrayLike) -> NDArray[Any]:
        """
        The weight of each sample in each prediction.

        Parameters
        ----------
        X : array_like, shape (n_queries, n_features)

        Returns
        -------
        ndarray, shape (n_queries, n_samples)
            Rows sum to 1. All of it is in memory.
        """
        return self._attend(X, return_weights=True)[1]


_PARAMETERS = """
    Parameters
    ----------
    bandwidth : float, default 1.0
        Standard deviation h of the Gaussian, positive. A sample at the distance d has the weight
        ``exp(-d**2 / (2 * h**2))``, divided by the sum over all samples.
    metric : {'sqeuclidean', 'cosine'}, default 'sqeuclidean'
        'sqeuclidean': d is the Euclidean distance. 'cosine': ``d**2 / 2`` is 1 - the cosine, so that d is the Euclidean
        distance of the rows divided by their norms.
    num_threads : int, optional
        Upper limit on threads. Default `fastattn.get_num_threads`.
"""

_NOTES = """
    Notes
    -----
    With samples x and a query q the weights are those of `fastattn.dot_product_attention` with the scores
    ``q @ x / h**2 - x @ x / (2 * h**2)``: the query's own square cancels. Samples are centred first, so that a large
    mean costs no accuracy. Arithmetic is in float32 if X is float32 and no sample is farther than some 30 bandwidths
    from the centre, otherwise in float64. A query that is far from all samples gets the target of the nearest one.

    Time is that of two products of (queries, samples, features) numbers; trees, as in `KNeighborsRegressor`, are faster
    where there are few features.
"""

_REFERENCES = """
    References
    ----------
    .. [1] E. A. Nadaraya, "On estimating regression", 1964; G. S. Watson, "Smooth regression analysis", 1964.
"""


class NadarayaWatsonRegressor(MultiOutputMixin, RegressorMixin, _NadarayaWatson):
    __doc__ = f"""
    Kernel regression: the mean of all samples' targets, weighted by a Gaussian of their distances [1]_.
    {_PARAMETERS}
    Attributes
    ----------
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only if X has names of columns, all of them strings.
    n_samples_fit_ : int
    {_NOTES}{_REFERENCES}
    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.integrations.sklearn import NadarayaWatsonRegressor
    >>> X = np.linspace(0, 6, 100)[:, None]
    >>> model = NadarayaWatsonRegressor(bandwidth=0.1).fit(X, np.sin(X[:, 0]))
    >>> model.predict([[1.5], [1000.0]]).round(2)
    array([ 0.99, -0.28])
    >>> model.attention_weights([[1.5]]).shape
    (1, 100)
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """
        Keep samples and targets.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
            float32 or float64; others become float64.
        y : array_like, shape (n_samples,) or (n_samples, n_outputs)

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            If a parameter or an array is not as above; the message names it.
        """
        samples, targets = self._checked(X, y, y_numeric=True)
        self._one_output = targets.ndim == 1
        self._dtype = targets.dtype if targets.dtype == np.float32 else np.dtype(np.float64)
        self._keep(samples, targets.reshape(len(targets), -1))
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """
        The weighted means.

        Parameters
        ----------
        X : array_like, shape (n_queries, n_features)

        Returns
        -------
        ndarray, shape (n_queries,) or (n_queries, n_outputs)
            As y: float32 if y was float32, else float64.
        """
        means = self._means(X).astype(self._dtype)
        return means[:, 0] if self._one_output else means


class NadarayaWatsonClassifier(MultiOutputMixin, ClassifierMixin, _NadarayaWatson):
    __doc__ = f"""
    Kernel classification: each sample votes for its class, weighted by a Gaussian of its distance [1]_.
    {_PARAMETERS}
    Attributes
    ----------
    classes_ : ndarray, shape (n_classes,), or a list of these for several outputs
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only if X has names of columns, all of them strings.
    n_samples_fit_ : int
    {_NOTES}{_REFERENCES}
    Examples
    --------
    >>> from fastattn.integrations.sklearn import NadarayaWatsonClassifier
    >>> model = NadarayaWatsonClassifier().fit([[0.0], [1.0], [3.0]], ["low", "low", "high"])
    >>> model.predict([[2.5]])
    array(['high'], dtype='<U4')
    >>> model.predict_proba([[2.5]]).round(3)
    array([[0.705, 0.295]])
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """
        Keep samples and classes.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
            float32 or float64; others become float64.
        y : array_like, shape (n_samples,) or (n_samples, n_outputs)

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            If a parameter or an array is not as above; the message names it.
        """
        samples, targets = self._checked(X, y)
        check_classification_targets(targets)
        self._one_output = targets.ndim == 1
        found = [np.unique(column, return_inverse=True) for column in targets.reshape(len(targets), -1).T]
        classes = [names for names, _ in found]
        self.classes_ = classes[0] if self._one_output else classes
        self._ends = np.cumsum([len(names) for names in classes])[:-1]
        self._keep(samples, np.concatenate([np.eye(len(names))[number] for names, number in found], axis=1))
        return self

    def _probabilities(self, X: ArrayLike) -> list[NDArray[np.float64]]:
        return np.split(self._means(X).clip(0, 1), self._ends, axis=1)

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """
        The weights of each class.

        Parameters
        ----------
        X : array_like, shape (n_queries, n_features)

        Returns
        -------
        ndarray, shape (n_queries, n_classes), or a list of these for several outputs
            Columns in the order of `classes_`; rows sum to 1.
        """
        found = self._probabilities(X)
        return found[0] if self._one_output else found

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """
        The class with the largest weight.

        Parameters
        ----------
        X : array_like, shape (n_queries, n_features)

        Returns
        -------
        ndarray, shape (n_queries,) or (n_queries, n_outputs)
        """
        found = self._probabilities(X)
        every = [self.classes_] if self._one_output else self.classes_
        names = [c[p.argmax(axis=1)] for c, p in zip(every, found, strict=True)]
        return names[0] if self._one_output else np.stack(names, axis=1)


__all__ = ["NadarayaWatsonClassifier", "NadarayaWatsonRegressor"]
