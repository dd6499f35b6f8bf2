"""Kernel regression beside scikit-learn's own estimators, on data that scikit-learn carries.

    python examples/kernel_regression.py

Three jobs: the progress of diabetes from ten numbers of each patient (442), the lower half of a handwritten digit from
its upper half (1797, 32 pixels from 32), and which digit it is. Each estimator gets a small grid for its parameters,
chosen inside each of five folds; what is printed are scores on the fold that it never saw, and seconds for search and
answers together, on one thread. Needs scikit-learn (`pip install ".[sklearn]"`); takes half a minute.
"""

import argparse
import time
import warnings

import numpy as np
from sklearn.datasets import load_diabetes, load_digits
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_validate
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from threadpoolctl import threadpool_limits

from fastattn.integrations.sklearn import NadarayaWatsonClassifier, NadarayaWatsonRegressor

WIDTHS = {"bandwidth": [0.5, 0.7, 1.0, 1.4, 2.0, 2.8], "metric": ["sqeuclidean"]}
ANGLES = {"bandwidth": [0.1, 0.14, 0.2, 0.28, 0.4], "metric": ["cosine"]}
NEIGHBORS = {"n_neighbors": [1, 3, 5, 10, 20], "weights": ["uniform", "distance"]}
GAMMAS = [0.003, 0.01, 0.03]


def jobs():
    """For each job its title, X, y, whether columns are scaled, and estimators with their grids."""
    X, y = load_diabetes(return_X_y=True)
    yield "Diabetes: R2 of the progress after a year", X, y, True, {
        "NadarayaWatson, sqeuclidean": (NadarayaWatsonRegressor(), WIDTHS),
        "NadarayaWatson, cosine": (NadarayaWatsonRegressor(), ANGLES),
        "KNeighbors": (KNeighborsRegressor(), NEIGHBORS),
        "KernelRidge, rbf": (KernelRidge(kernel="rbf"), {"alpha": [0.1, 1.0], "gamma": GAMMAS}),
        "SVR, rbf": (SVR(), {"C": [10.0, 100.0], "gamma": GAMMAS}),
        "Ridge": (Ridge(), {"alpha": [1.0, 10.0, 100.0]}),
        "RandomForest": (RandomForestRegressor(random_state=0), {"min_samples_leaf": [2, 10]}),
    }  # fmt: skip
    X, labels = load_digits(return_X_y=True)
    X = X / 16
    upper, lower = X[:, :32], X[:, 32:]
    yield "Digits: R2 of the lower half from the upper", upper, lower, False, {
        "NadarayaWatson, sqeuclidean": (NadarayaWatsonRegressor(), {"bandwidth": [0.15, 0.2, 0.28, 0.4]}),
        "NadarayaWatson, cosine": (NadarayaWatsonRegressor(), {**ANGLES, "bandwidth": [0.05, 0.07, 0.1, 0.14]}),
        "KNeighbors": (KNeighborsRegressor(), NEIGHBORS),
        "KernelRidge, rbf": (KernelRidge(kernel="rbf"), {"alpha": [0.1, 0.01], "gamma": [0.1, 0.3, 1.0]}),
        "Ridge": (Ridge(), {"alpha": [0.1, 1.0, 10.0]}),
    }  # fmt: skip
    yield "Digits: share that is named rightly", X, labels, False, {
        "NadarayaWatson, sqeuclidean": (NadarayaWatsonClassifier(), {"bandwidth": [0.1, 0.2, 0.28, 0.4]}),
        "NadarayaWatson, cosine": (NadarayaWatsonClassifier(), {**ANGLES, "bandwidth": [0.05, 0.07, 0.1, 0.14]}),
        "KNeighbors": (KNeighborsClassifier(), NEIGHBORS),
        "SVC, rbf": (SVC(), {"C": [1.0, 10.0], "gamma": [0.1, 0.3]}),
        "LogisticRegression": (LogisticRegression(max_iter=300), {"C": [0.3, 1.0]}),
        "RandomForest": (RandomForestClassifier(random_state=0), {"min_samples_leaf": [1, 3]}),
    }  # fmt: skip


def measured(estimator, grid, X, y, scaled, folds):
    """Mean and standard error of the scores on held-out folds, and seconds."""
    steps = [StandardScaler()] if scaled else []
    name = type(estimator).__name__.lower()
    grid = {f"{name}__{parameter}": values for parameter, values in grid.items()}
    inner, outer = KFold(3, shuffle=True, random_state=1), KFold(folds, shuffle=True, random_state=0)
    begin = time.perf_counter()
    # Threads of two libraries of matrix products would wait for each other; fastattn keeps to the limit, too.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logistic regression that has not converged
        search = GridSearchCV(make_pipeline(*steps, estimator), grid, cv=inner)
        scores = cross_validate(search, X, y, cv=outer)["test_score"]
    return scores.mean(), scores.std(ddof=1) / np.sqrt(folds), time.perf_counter() - begin


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Kernel regression beside scikit-learn's own estimators.")
    parser.add_argument("--folds", type=int, default=5, help="folds of cross-validation, at least 2 (default 5)")
    parser.add_argument("--only", default="", help="only estimators with this in their names")
    options = parser.parse_args(arguments)
    for title, X, y, scaled, estimators in jobs():
        print(f"\n{title}; {len(X)} samples, {X.shape[1]} features")
        for name, (estimator, grid) in estimators.items():
            if options.only.lower() in name.lower():
                mean, error, seconds = measured(estimator, grid, X, y, scaled, options.folds)
                print(f"  {name:<28} {mean:6.3f} +- {error:.3f} {seconds:7.2f} s", flush=True)


if __name__ == "__main__":
    main()
