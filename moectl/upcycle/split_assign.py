"""Neurons into clusters of equal size: at random, or by a balanced k-means whose assignment is a provable optimum.

Legend: N neurons, D features of each, C clusters, so each gets N / C neurons.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np

from moectl.checkpoint.randomness import permutation

METHODS = ("kmeans-gate", "kmeans", "active", "random")
"""Balanced k-means on gate rows, on gate and up rows, on when neurons are active; or neurons at random."""

_RESOLUTION = float(1 << 40)
"""Costs are rounded to integers up to this: sums along a path are then exact, and no cycle is negative by rounding."""


def clusters(
    method: str, features_ND: np.ndarray | None, neurons: np.ndarray, parts: int, seed: int, key: str
) -> np.ndarray:
    """The cluster, 0 to parts - 1, of each of `neurons`; all clusters have the same size.

    Args:
        features_ND: what k-means measures distances between, float32, a row for each neuron; None for random.
        seed, key: fix everything random.
    """
    if method == "random":
        labels = np.empty(len(neurons), np.int64)
        labels[permutation(seed, key, len(neurons))] = np.arange(len(neurons)) // (len(neurons) // parts)
        return labels
    assert features_ND is not None
    return balanced_assignment(_distances(features_ND, _centroids(features_ND, parts, seed)))


def balanced_assignment(cost_NC: np.ndarray) -> np.ndarray:
    """The cluster of each row that minimises the sum of chosen costs over all assignments with N / C rows per cluster.

    This is min-cost flow by successive shortest paths (Ahuja, Magnanti & Orlin, Network Flows, 1993, chapter 9), on the
    graph of the C clusters rather than of the N rows: an edge from a to b costs what the cheapest row of a would lose
    by moving to b. It starts from every row's nearest cluster, which is optimal without capacities, and each
    augmentation along a shortest path keeps it optimal for the sizes reached, so the end is the optimum of the balanced
    problem for costs rounded to 40 bits. There are at most N (1 - 1/C) augmentations of O(N + C^3) work;
    `scipy.optimize.linear_sum_assignment` would need a matrix of N x N.
    """
    number, parts = cost_NC.shape
    capacity = number // parts
    assert capacity * parts == number
    costs = cost_NC - cost_NC.min()
    cost_NC = np.rint(costs / (costs.max() or 1.0) * _RESOLUTION).astype(np.int64)
    label_N = cost_NC.argmin(axis=1)
    size_C = np.bincount(label_N, minlength=parts)
    far = np.iinfo(np.int64).max // 4
    edge_CC = np.full((parts, parts), far)
    mover_CC = np.zeros((parts, parts), np.int64)

    def refresh(cluster: int) -> None:
        members = np.flatnonzero(label_N == cluster)
        if not len(members):
            edge_CC[cluster] = far
            return
        loss = cost_NC[members] - cost_NC[members, cluster][:, None]
        first = loss.argmin(axis=0)
        edge_CC[cluster] = loss[first, np.arange(parts)]
        edge_CC[cluster, cluster] = far
        mover_CC[cluster] = members[first]

    for cluster in range(parts):
        refresh(cluster)
    while size_C.max() > capacity:
        path = _shortest_path(edge_CC, size_C, capacity, far)
        for start, end in pairwise(path):
            label_N[mover_CC[start, end]] = end
        size_C[path[0]] -= 1
        size_C[path[-1]] += 1
        for cluster in path:
            refresh(cluster)
    return label_N


def _shortest_path(edge_CC: np.ndarray, size_C: np.ndarray, capacity: int, far: int) -> list[int]:
    """The cheapest way from a cluster that is too large to one that is too small (Bellman-Ford)."""
    distance_C = np.where(size_C > capacity, 0, far)
    before_C = np.full(len(size_C), -1)
    while True:
        through_CC = distance_C[:, None] + edge_CC
        nearest_C = through_CC.argmin(axis=0)
        shorter_C = through_CC.min(axis=0)
        better = shorter_C < distance_C
        if not better.any():
            break
        distance_C = np.where(better, shorter_C, distance_C)
        before_C = np.where(better, nearest_C, before_C)
    path = [int(np.where(size_C < capacity, distance_C, far).argmin())]
    while before_C[path[0]] >= 0:
        path.insert(0, int(before_C[path[0]]))
    return path


def _centroids(features_ND: np.ndarray, parts: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():  # the plan must not depend on the order of sums of many cores
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct neurons than clusters: any split will do
        return np.asarray(KMeans(parts, n_init=1, random_state=seed % 2**32).fit(features_ND).cluster_centers_)


def _distances(features_ND: np.ndarray, centroid_CD: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, float64 [N, C], less |x|^2, which is the same for all clusters."""
    product_NC = (features_ND @ centroid_CD.T).astype(np.float64)
    return (centroid_CD.astype(np.float64) ** 2).sum(axis=1) - 2 * product_NC
