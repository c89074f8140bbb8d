"""Bad input: an error that names the function, the argument, the rule and the value, before anything is computed."""

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # numpy learns of float8 from it
import numpy as np
import pytest
from jax.extend.core import Primitive

import jaxnorm
from jaxnorm import Moments

pytestmark = pytest.mark.any_version

X = np.ones((4, 5, 8), np.float32)
RUNNING = jaxnorm.init_running(8)
BATCH = Moments(*(jnp.ones(8),) * 3)
MAPPED = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")


def call(name, x=X, **kwargs):
    if name == "group_norm":
        kwargs = {"num_groups": 2, **kwargs}
    if name == "normalize":
        mean, var = kwargs.pop("mean", np.zeros(8, np.float32)), kwargs.pop("var", np.ones(8, np.float32))
        kwargs = {"statistics": (mean, var), **kwargs}
    return getattr(jaxnorm, name)(x, **kwargs)


COMMON = [
    (TypeError, {"x": X.astype(np.int32)}, "x", "int32"),
    (TypeError, {"x": X > 0}, "x", "bool"),
    (ValueError, {"axis": 3}, "axis", "3"),
    (ValueError, {"axis": -4}, "axis", "-4"),
    (TypeError, {"axis": 1.5}, "axis", "1.5"),
    (TypeError, {"axis": True}, "axis", "True"),
    (TypeError, {"x": None}, "x", "None"),
    (TypeError, {"x": "abc"}, "x", "abc"),
    (TypeError, {"x": X.astype("float8_e4m3fn")}, "x", "float8"),
    (TypeError, {"axis": "channels"}, "axis", "channels"),
    (ValueError, {"epsilon": -1e-3}, "epsilon", "-0.001"),
    (ValueError, {"epsilon": float("nan")}, "epsilon", "nan"),
    (ValueError, {"epsilon": float("inf")}, "epsilon", "inf"),
    (TypeError, {"epsilon": "small"}, "epsilon", "small"),
    (TypeError, {"epsilon": None}, "epsilon", "None"),
    (ValueError, {"scale": np.ones(7, np.float32)}, "scale", r"\(7,\)"),
    (ValueError, {"scale": np.ones((1, 1, 8), np.float32)}, "scale", r"\(1, 1, 8\)"),
    (TypeError, {"scale": np.ones(8, np.int32)}, "scale", "int32"),
    (TypeError, {"scale": np.ones(8, np.complex64)}, "scale", "complex64"),
    (ValueError, {"scale": np.ones((3, 8), np.float32)}, "scale", r"\(3, 8\)"),
    (TypeError, {"x": np.ma.masked_array(X)}, "x", "MaskedArray"),
    (TypeError, {"x": X.astype(np.longdouble)}, "x", "float128"),
]
BIASED = [(ValueError, {"bias": np.ones((8, 1), np.float32)}, "bias", r"\(8, 1\)")]
MASKED = [
    (ValueError, {"mask": np.ones((4, 5), bool)}, "mask", r"\(4, 5\)"),
    (ValueError, {"mask": np.ones((1, 4, 5, 8), bool)}, "mask", r"\(1, 4, 5, 8\)"),
    (TypeError, {"mask": np.ones(8, np.complex64)}, "mask", "complex64"),
    (ValueError, {"mask": -np.ones(8, np.float32)}, "mask", "-1.0"),
    (ValueError, {"mask": np.full(8, np.nan, np.float32)}, "mask", "nan"),
    (ValueError, {"x": X[:, :4, :4], "mask": np.ones(4, bool)}, "mask", r"\(4,\)"),  # of examples or of channels?
    (ValueError, {"x": X[:, :4, :4], "mask": np.ones((4, 4), bool)}, "mask", r"\(4, 4\)"),
]
SEVERAL = [(ValueError, {"axis": (1, 1)}, "axis", r"\(1, 1\)"), (ValueError, {"axis": (2, -1)}, "axis", r"\(2, -1\)")]
EXAMPLES = [(ValueError, {"axis": 0}, "axis", "0")]
REPLICAS = [
    (ValueError, {"axis_name": "nowhere"}, "axis_name", "nowhere"),
    (ValueError, {"axis_name": ("data", "nowhere")}, "axis_name", "nowhere"),
    (ValueError, {"axis_index_groups": [[0, 1]]}, "axis_index_groups", r"\[\[0, 1\]\]"),
]
CASES = {
    "batch_norm": [
        *COMMON, *BIASED, *MASKED, *SEVERAL, *REPLICAS,
    ],
    "layer_norm": [*COMMON, *BIASED, *MASKED, *SEVERAL],
    "rms_norm": [*COMMON, *MASKED, *SEVERAL],
    "instance_norm": [*COMMON, *BIASED, *MASKED, *SEVERAL, *EXAMPLES],
    "group_norm": [
        *COMMON, *BIASED, *MASKED, *EXAMPLES,
        (ValueError, {"axis": (1, 2)}, "axis", r"\(1, 2\)"),
        (ValueError, {"axis": ()}, "axis", r"\(\)"),
        (ValueError, {"num_groups": 5}, "num_groups", "num_groups=5, channels=8"),
        (ValueError, {"num_groups": 0}, "num_groups", "0"),
        (ValueError, {"num_groups": -2}, "num_groups", "-2"),
        (ValueError, {"num_groups": 16}, "num_groups", "16"),
        (TypeError, {"num_groups": 2.0}, "num_groups", "2.0"),
        (TypeError, {"num_groups": True}, "num_groups", "True"),
    ],
    "normalize": [
        *COMMON, *BIASED, *SEVERAL,
        (ValueError, {"mean": np.zeros(3, np.float32)}, "mean", r"\(3,\)"),
        (ValueError, {"var": np.zeros(3, np.float32)}, "var", r"\(3,\)"),
        (TypeError, {"mean": None}, "mean", "None"),
        (TypeError, {"x": X + 0j, "var": np.full(8, 1j, np.complex64)}, "var", "complex64"),
        (TypeError, {"statistics": np.zeros((2, 8), np.float32)}, "statistics", "ndarray"),
        (TypeError, {"statistics": (np.zeros(8, np.float32),)}, "statistics", "tuple"),
    ],
    "moments": [
        *MASKED, *REPLICAS,
        (TypeError, {"x": X.astype(int)}, "x", "int"),
        (ValueError, {"axes": 3}, "axes", "3"),
        (ValueError, {"axes": (0, 0)}, "axes", r"\(0, 0\)"),
        (TypeError, {"axes": None}, "axes", "None"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases], ids=lambda c: str(c)[:60]
)
def test_message(name, case):
    error, kwargs, argument, value = case
    kwargs = {"axes": 0, **kwargs} if name == "moments" else kwargs
    with pytest.raises(error, match=rf"(?s)^{name}: .*{argument}.*; got .*{value}") as caught:
        call(name, **kwargs)
    assert type(caught.value) is error


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_computed_before_the_check(name, monkeypatch):
    """No operation on the data was even traced when the error came."""
    operations = []

    def bind(primitive, *args, **params):
        operations.extend(primitive.name for a in args if np.shape(a) == x.shape)
        return original(primitive, *args, **params)

    original = Primitive.bind
    monkeypatch.setattr(Primitive, "bind", bind)
    for _, kwargs, *_ in CASES[name]:
        kwargs = {"axes": 0} | kwargs if name == "moments" else dict(kwargs)
        x = kwargs.pop("x", X)
        unseen = np.dtype(np.float32) == getattr(kwargs.get("mask"), "dtype", None)  # values, while tracing
        if unseen or not isinstance(x, np.ndarray):
            continue
        with pytest.raises((TypeError, ValueError)):
            jax.eval_shape(lambda x, kwargs=kwargs: call(name, x, **kwargs), x)
        assert not operations, kwargs
    x = X
    jax.eval_shape(lambda x: call(name, x, **({"axes": 0} if name == "moments" else {})), x)
    assert operations  # which would have been seen


UPDATES = [
    (TypeError, {"alpha": jnp.full(8, 0.1)}, "alpha", r"\(8,\)"),
    (ValueError, {"alpha": -0.1}, "alpha", "-0.1"),
    (ValueError, {"alpha": 1.01}, "alpha", "1.01"),
    (ValueError, {"alpha": float("nan")}, "alpha", "nan"),
    (ValueError, {"alpha": np.float32(2)}, "alpha", "2.0"),
    (TypeError, {"alpha": "0.1"}, "alpha", "0.1"),
    (TypeError, {"alpha": True}, "alpha", "True"),
    (ValueError, {"batch": Moments(*(jnp.ones(7),) * 3)}, "batch", r"\(7,\)"),
    (ValueError, {"batch": Moments(jnp.ones(8), jnp.ones(1), jnp.ones(8))}, "batch", r"\(1,\)"),
    (TypeError, {"batch": Moments(*(jnp.ones(8, int),) * 3)}, "batch.mean", "int32"),
    (TypeError, {"batch": None}, "batch", "None"),
]


@pytest.mark.parametrize("case", UPDATES, ids=lambda c: str(c)[:60])
def test_update_running(case):
    error, kwargs, argument, value = case
    with pytest.raises(error, match=rf"^update_running: .*{argument}.*; got .*{value}"):
        jaxnorm.update_running(RUNNING, kwargs.pop("batch", BATCH), **kwargs)


@pytest.mark.parametrize(
    ("error", "features", "dtype"),
    [(ValueError, -1, "float32"), (TypeError, 2.5, "float32"), (TypeError, "ab", "float32"), (ValueError, 3, "int32")],
)
def test_init_running(error, features, dtype):
    with pytest.raises(error, match=r"^init_running: .*; got "):
        jaxnorm.init_running(features, dtype=dtype)


def test_merge_moments():
    with pytest.raises(ValueError, match=r"^merge_moments: .*; got .*\(7,\)"):
        jaxnorm.merge_moments(BATCH, Moments(*(jnp.ones(7),) * 3))


@pytest.mark.parametrize(
    "groups", [[[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]], [[0, 1], [2, 3], []], [[0, 1, 2, 3, 4]]]
)
def test_groups_that_are_no_partition(groups):
    with pytest.raises(ValueError, match=r"^batch_norm: axis_index_groups .*; got "):
        jax.vmap(lambda x: jaxnorm.batch_norm(x, axis_name="r", axis_index_groups=groups)[0], axis_name="r")(X)


ONE_VALUE = {
    "batch_norm": (X[:1, :1], {}),
    "layer_norm": (X[..., :1], {}),
    "group_norm": (X[:, :1, :2], {"num_groups": 2}),
    "instance_norm": (X[:, :1], {}),
    "standardize": (X[:1], {"axes": 0}),
}


@pytest.mark.parametrize("name", ONE_VALUE)
def test_one_value_a_statistic(name):
    """It is normalized to zero, whatever it is, and a warning says so at the line of the caller: of every norm."""
    x, kwargs = ONE_VALUE[name]
    with pytest.warns(UserWarning, match=rf"^{name}: every statistic is of one value.*\(.*1.*\)") as caught:
        y = call(name, 7 * x, **kwargs)
    np.testing.assert_array_equal(y[0] if isinstance(y, tuple) else y, 0)
    assert [w.filename for w in caught] == [__file__]


def test_one_value_a_replica_is_a_batch(recwarn):
    batch = jax.vmap(lambda x: jaxnorm.batch_norm(x[None], axis_name="r")[1], axis_name="r")(X[:, 0])
    assert batch.count.tolist() == [[4] * 8] * 4
    assert not recwarn
    groups = [[0], [1, 2, 3]]
    with pytest.warns(UserWarning, match="one value"):
        jax.vmap(lambda x: jaxnorm.batch_norm(x[None], axis_name="r", axis_index_groups=groups)[0], axis_name="r")(
            X[:, 0]
        )


def test_either_byte_order():
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_array_equal(jaxnorm.layer_norm(x.astype(">f4")), jaxnorm.layer_norm(x))
