"""The remedies in NumPy float64, written from the papers, slow on purpose, without jax.

Every function is analytic in its arguments but where it is constant by definition, so that its gradient is exact by
complex steps (Squire and Trapp, 1998): the imaginary part of ``f(x + ih) / h`` has no cancellation.
"""

import numpy as np


def constant(value):
    """What the paper does not differentiate through."""
    return np.real(value)


def maximum(a, b):
    return np.where(np.real(a) >= np.real(b), a, b)


def clip(value, low, high):
    return np.minimum(np.maximum(constant(value), low), high)


def sigmoid(z):
    return (1 + np.tanh(z / 2)) / 2


def measured(x, weights, keys):
    """Mean, biased variance and weight of all elements with the key of an element, in the shape of ``x``."""
    keys = np.broadcast_to(keys, x.shape)
    weights = np.broadcast_to(weights, x.shape).astype(float)
    mean, var, count = np.zeros_like(x), np.zeros_like(x), np.zeros(x.shape)
    for key in np.unique(keys):
        inside = keys == key
        n = weights[inside].sum()
        count[inside] = n
        if n:
            m = (weights[inside] * x[inside]).sum() / n
            mean[inside] = m
            var[inside] = (weights[inside] * (x[inside] - m) ** 2).sum() / n
    return mean, var, count


def standardized(x, mean, var, count, epsilon):
    return np.where(count > 0, (x - mean) / np.sqrt(var + epsilon), 0)


def keys_of(x):
    """Number of the example and of the channel of each element; channels last."""
    example = np.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
    channel = np.arange(x.shape[-1])
    return example, channel, 10_000


def ghost(x, scale, bias, weights, size, epsilon):
    """Hoffer et al. 2017: each virtual batch by itself."""
    example, channel, many = keys_of(x)
    return standardized(x, *measured(x, weights, example // size * many + channel), epsilon) * scale + bias


def ghost_moments(x, weights, size):
    """The plain averages of what the virtual batches measured, of those that hold anything; and the number of all."""
    example, channel, many = keys_of(x)
    mean, var, count = measured(x, weights, example // size * many + channel)
    flat = [
        v.reshape(-1, size, *x.shape[1:])[:, 0].reshape(x.shape[0] // size, -1, x.shape[-1])[:, 0]
        for v in (mean, var, count)
    ]
    there = flat[2] > 0
    return *((v * there).sum(0) / np.maximum(there.sum(0), 1) for v in flat[:2]), flat[2].sum(0)


def renorm(x, running_mean, running_var, scale, bias, weights, r_max, d_max, epsilon):
    """Ioffe 2017, algorithm 1, with epsilon as the contract of the package has it."""
    _, channel, _ = keys_of(x)
    mean, var, count = measured(x, weights, channel)
    s, s_b = np.sqrt(running_var + epsilon), np.sqrt(var + epsilon)
    r, d = clip(s_b / s, 1 / r_max, r_max), clip((mean - running_mean) / s, -d_max, d_max)
    return np.where(count > 0, (x - mean) / s_b * r + d, 0) * scale + bias


def split(x, domain, scale, bias, weights, epsilon):
    """Xie et al. 2020; scale and bias of each domain."""
    _, channel, many = keys_of(x)
    of_example = np.asarray(domain).reshape(-1, *(1,) * (x.ndim - 1))
    z = standardized(x, *measured(x, weights, of_example * many + channel), epsilon)
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return z * scale[domain].reshape(shape) + bias[domain].reshape(shape)


def softmax(logits):
    e = np.exp(logits - constant(logits).max())
    return e / e.sum()


def switchable(x, mean_logits, var_logits, scale, bias, weights, epsilon, running=None):
    """Luo et al. 2019, equation 3."""
    example, channel, many = keys_of(x)
    parts = [measured(x, weights, k) for k in (example * many + channel, example * many, channel)]
    if running is not None:
        parts[2] = running
    w, v = softmax(mean_logits), softmax(var_logits)
    mean = sum(a * p[0] for a, p in zip(w, parts, strict=True))
    var = sum(a * p[1] for a, p in zip(v, parts, strict=True))
    return standardized(x, mean, var, parts[0][2], epsilon) * scale + bias


def evonorm_b0(x, scale, bias, v, weights, epsilon, running_var=None):
    """Liu et al. 2020, table 1."""
    example, channel, many = keys_of(x)
    _, own, count = measured(x, weights, example * many + channel)
    var = measured(x, weights, channel)[1] if running_var is None else running_var
    z = x / maximum(np.sqrt(var + epsilon), v * x + np.sqrt(own + epsilon))
    return np.where(count > 0, z, 0) * scale + bias


def evonorm_s0(x, scale, bias, v, weights, num_groups, epsilon):
    """Liu et al. 2020, table 1."""
    example, channel, many = keys_of(x)
    _, var, count = measured(x, weights, example * many + channel // (x.shape[-1] // num_groups))
    return np.where(count > 0, x * sigmoid(v * x) / np.sqrt(var + epsilon), 0) * scale + bias


def filter_response(x, scale, bias, threshold, weights, epsilon):
    """Singh and Krishnan 2020, equations 1 to 3."""
    example, channel, many = keys_of(x)
    mean, var, count = measured(x, weights, example * many + channel)
    z = np.where(count > 0, x / np.sqrt(mean**2 + var + epsilon), 0) * scale + bias
    return maximum(z, threshold)


def dynamic_tanh(x, alpha, scale, bias):
    """Zhu et al. 2025, section 4."""
    return np.tanh(alpha * x) * scale + bias


def weights(w, gain, epsilon):
    """Qiao et al. 2019, equation 7; Brock et al. 2021, equation 1."""
    _, channel, _ = keys_of(w)
    return standardized(w, *measured(w, np.ones(w.shape), channel), epsilon) * gain


def layer(x, scale, bias, weights, epsilon):
    example, _, _ = keys_of(x)
    position = np.arange(x[..., 0].size).reshape(*x.shape[:-1], 1) + 0 * example
    return standardized(x, *measured(x, weights, position), epsilon) * scale + bias


def root_mean_square(x, scale, weights, epsilon):
    position = np.arange(x[..., 0].size).reshape(*x.shape[:-1], 1)
    mean, var, count = measured(x, weights, position)
    return np.where(count > 0, x / np.sqrt(mean**2 + var + epsilon), 0) * scale


def gradients(function, arguments, cotangent):
    """The gradient of ``sum(function(*arguments) * cotangent)`` for each of ``arguments``, one value at a time.

    With each comes the largest term of the sums that it consists of.
    """
    arguments, step = [np.asarray(a, complex) for a in arguments], 1e-30
    found = []
    for n, value in enumerate(arguments):
        gradient, largest = np.empty(value.shape), 0.0
        for index in np.ndindex(value.shape):
            moved = value.copy()
            moved[index] += 1j * step
            y = function(*arguments[:n], moved, *arguments[n + 1 :])
            terms = (y * cotangent).imag / step
            gradient[index], largest = terms.sum(), max(largest, np.abs(terms).max())
        found.append((gradient, largest))
    return found


def graph(x, of_node, scale, bias, mean_scale, weights, epsilon):
    """Cai et al. 2021, equation 8: the nodes of each graph, less part of their mean."""
    _, channel, many = keys_of(x)
    keys = np.asarray(of_node).reshape(-1, *(1,) * (x.ndim - 1)) * many + channel
    mean, _, count = measured(x, weights, keys)
    c = x - mean_scale * mean
    second, var, _ = measured(c, weights, keys)
    return np.where(count > 0, c / np.sqrt(var + second**2 + epsilon), 0) * scale + bias


def weight_norm(w, gain, epsilon):
    """Salimans and Kingma 2016; outputs last."""
    return gain * w / np.sqrt((w**2).sum(tuple(range(w.ndim - 1))) + epsilon)
