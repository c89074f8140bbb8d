"""The five normalizations in NumPy float64, written from the papers, slow on purpose, without jax.

Every element of ``x`` gets a label; elements with the same label share their statistics. That is all in which the
normalizations differ; it is spelled out here with labels instead of axes, so that nothing is shared with the package.
"""

import numpy as np


def _number(keys):
    """Integer labels from one key an element."""
    _, labels = np.unique(keys, return_inverse=True)
    return labels.reshape(-1)


def labels_of(norm, shape, axis=(-1,), num_groups=None):
    """The labels of the elements of an array of ``shape``, flattened."""
    index = np.indices(shape)
    axis = [a % len(shape) for a in axis]
    if norm == "batch":
        kept = [index[a] for a in axis]
    elif norm in ("layer", "rms"):
        kept = [index[a] for a in range(len(shape)) if a not in axis]
    elif norm == "instance":
        kept = [index[0]] + [index[a] for a in axis]
    elif norm == "group":
        (channel,) = axis
        kept = [index[0], index[channel] // (shape[channel] // num_groups)]
    else:
        raise ValueError(norm)
    key = np.zeros(shape, np.int64)
    for k in kept:
        key = key * (max(shape) + 1) + k
    return _number(key.reshape(-1))


def features_of(shape, axis=(-1,)):
    """The flat index into scale and bias of every element of an array of ``shape``, flattened."""
    index = np.indices(shape)
    key = np.zeros(shape, np.int64)
    for a in axis:  # in the order given, as the shape of the parameters
        key = key * shape[a] + index[a]
    return key.reshape(-1)


def statistics(x, labels, weights=None, centered=True):
    """Mean, biased variance and count of each label; zero where the count is."""
    x = np.asarray(x, np.result_type(x, np.float64)).reshape(-1)
    w = np.ones(x.shape) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    means, variances, counts = [], [], []
    for label in range(labels.max() + 1):
        inside = labels == label
        values, share = x[inside], w[inside]
        values = np.where(share > 0, values, 0)
        n = share.sum()
        mean = (share * values).sum() / n if n and centered else 0.0
        means.append(mean)
        variances.append((share * np.abs(values - mean) ** 2).sum() / n if n else 0.0)
        counts.append(n)
    return np.array(means), np.array(variances), np.array(counts)


def normalize(x, labels, features, scale=None, bias=None, epsilon=0.0, weights=None, centered=True):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, where there is anything to measure; bias elsewhere."""
    shape = np.shape(x)
    x = np.asarray(x, np.result_type(x, np.float64)).reshape(-1)
    mean, var, count = statistics(x, labels, weights, centered)
    y = np.where(count[labels] > 0, (x - mean[labels]) / np.sqrt(var[labels] + epsilon), 0)
    if scale is not None:
        y = y * np.asarray(scale, np.float64).reshape(-1)[features]
    if bias is not None:
        y = y + np.asarray(bias, np.float64).reshape(-1)[features]
    return y.reshape(shape)


def gradients(x, cotangent, labels, features, scale, epsilon=0.0, weights=None, centered=True):
    """Gradients of ``sum(y * cotangent)`` for x, scale and bias (Ioffe and Szegedy 2015, section 3), real x."""
    shape = np.shape(x)
    x = np.asarray(x, np.float64).reshape(-1)
    cotangent = np.asarray(cotangent, np.float64).reshape(-1)
    scale = np.asarray(scale, np.float64)
    w = np.ones(x.shape) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    mean, var, count = statistics(x, labels, weights, centered)
    rstd = np.where(count[labels] > 0, 1 / np.sqrt(var[labels] + epsilon), 0)
    normalized = (x - mean[labels]) * rstd
    inner = cotangent * scale.reshape(-1)[features]
    d_x = inner * rstd
    for label in range(labels.max() + 1):
        inside = labels == label
        if count[label] == 0:
            continue
        share = w[inside] / count[label]
        if centered:
            d_x[inside] -= share * (inner * rstd)[inside].sum()
        d_x[inside] -= share * normalized[inside] * rstd[inside] * (inner * normalized)[inside].sum()
    d_scale = np.bincount(features, cotangent * normalized, scale.size).reshape(scale.shape)
    d_bias = np.bincount(features, cotangent, scale.size).reshape(scale.shape)
    return d_x.reshape(shape), d_scale, d_bias
