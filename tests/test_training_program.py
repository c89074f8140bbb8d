"""The training program on good days and bad: settings, files, failures, signals, several processes."""

import collections
import dataclasses
import errno
import gzip
import importlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from conftest import FASTER_TO_COMPILE
from jax.sharding import AxisType

from jaxnorm import Moments, training
from jaxnorm.training import _data, _report, _run, _steps
from jaxnorm.training.__main__ import main
from jaxnorm.training._checkpoint import Checkpoints
from jaxnorm.training._interruption import Signals
from jaxnorm.training._settings import Settings, parse

pytestmark = pytest.mark.any_version

# Two epochs of six steps, the last of them on a partial batch.
TINY = ("--model", "mlp", "--epochs", 2, "--devices", 2, "--batch-size", 256, "--save-every", 4)


def run_here(*arguments):
    return main([str(a) for a in arguments])


def failure(*arguments):
    """The one line that ends a run that cannot be."""
    with pytest.raises(SystemExit) as caught:
        run_here(*arguments)
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    return caught.value.code


def records_in(out):
    """The records that count, every line being valid JSON; without what differs from run to run."""
    records: list[dict] = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        record.pop("examples_per_second", None)
        _report._add(records, record)
    return records


def state_in(out):
    """The last state written."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    state = training.init_state(training.MLP(), optimizer(), (8, 8, 1), mesh=mesh)
    with Checkpoints(out / "checkpoints") as checkpoints:
        return jax.device_get(checkpoints.restore(state)[0])


def optimizer():
    return training.make_optimizer("sgd", optax.constant_schedule(0.1))


def copied(run, folder):
    return Path(shutil.copytree(run, folder / "run"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing happened to; tests that change it copy it."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_here(*TINY, "--out", out)
    return out


@pytest.mark.slow  # trains to its end, more than once
def test_command_line_from_end_to_end(tmp_path, capsys):
    result = run_here("--model", "mlp", "--epochs", 8, "--seed", 1, "--out", tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert result["accuracy"] >= 0.96
    assert f"Test accuracy {result['accuracy']:.4f} from the running averages, after 8 epochs on 4 cpu" in printed
    assert "Norm_1/BatchNorm_0 │ BatchNorm │ 256 │ 512 │" in printed
    assert "all │ │ │ 85,514" in printed
    records = records_in(tmp_path / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 97))
    assert records[-1] == {"kind": "result", "step": 96, **result}
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open() if '"epoch"' in line]
    assert all(record["examples_per_second"] > 0 for record in epochs)
    first, last = epochs[0], epochs[-1]
    assert first["test_loss"] > 2 * first["test_loss_by_batch"]  # the averages are still those of initialization
    assert last["test_loss"] == pytest.approx(last["test_loss_by_batch"], rel=0.3)
    assert last["drift"].keys() == {"Norm_0", "Norm_1"}
    assert (tmp_path / "run" / "training.png").read_bytes()[:4] == b"\x89PNG"


# Settings ------------------------------------------------------------------------------------------------------------


TWO = "--num-processes 2 --coordinator"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("--devices 0", "--devices must be positive; got 0"),
        ("--epochs -1", "--epochs must be positive"),
        ("--batch-size 130", "--batch-size must be a multiple of devices times processes times microb"),
        ("--seed x", "argument --seed: invalid int value"),
        ("--seed -1", "--seed must lie in"),
        ("--norm power", "argument --norm: invalid choice"),
        ("--model vgg", "argument --model: invalid choice"),
        ("--momentum 1.5", "--momentum must lie in"),
        ("--learning-rate nan", "--learning-rate must be finite"),
        ("--data mnist", "--data needs --folder"),
        ("--process-id 1", "--process-id must lie in [0, --num-processes)"),
        (f"{TWO} localhost --out x", "--coordinator must be host:port of process 0"),
        (f"{TWO} localhost:port --out x", "--coordinator must be host:port"),
        (f"{TWO} localhost:1234", "--out must be given with several processes: a folder that all of them share"),
        ("--resume", "--resume needs --out"),
        ("--norm instance --model mlp", "--norm needs positions"),
        ("--invertible", "--invertible needs a --norm and --activation leaky_relu"),
    ],
)
def test_settings_that_cannot_be(arguments, option, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(arguments.split())
    assert caught.value.code == 2
    assert f"error: {option}" in capsys.readouterr().err


def test_command_line_is_that_of_the_dataclass():
    assert parse([]) == Settings()
    given = ["--folder", "x", "--learning-rate", "1e-3", "--recalibrate", "--num-processes", "2"]
    where = ["--coordinator", "h:1", "--out", "y"]
    more = {"num_processes": 2, "coordinator": "h:1", "out": Path("y")}
    expected = Settings(folder=Path("x"), learning_rate=1e-3, recalibrate=True, **more)
    assert parse(given + where) == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        expected.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_setting_of_the_network_reaches_it():
    """Also the place, which changes no shape."""
    chosen = {"norm": "group", "place": "after", "momentum": 0.5, "activation": "leaky_relu", "invertible": True}
    run = _run.Run(Settings(model="mlp", devices=1, dtype="bfloat16", **chosen))
    assert run.model == training.MLP(dtype=jnp.dtype("bfloat16"), **chosen)


def test_synthetic_images_are_split():
    train, test = _run.load(Settings(data="synthetic", image_size=3))
    assert (train.images.shape, train.labels.shape) == ((4096, 3, 3, 3), (4096,))
    assert (test.images.shape, test.labels.shape) == ((1024, 3, 3, 3), (1024,))


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # trains to its end, more than once
def test_resumed_only_with_the_settings_that_its_numbers_depend_on(undisturbed):
    free = {
        "folder",
        "devices",
        "parallelism",
        "coordinator",
        "num_processes",
        "process_id",
        "out",
        "resume",
        "save_every",
    }
    assert Settings().identity.keys() == {field.name for field in dataclasses.fields(Settings)} - free
    line = failure(*TINY, "--out", undisturbed)
    assert f"{undisturbed / 'checkpoints'} is there already; give --resume to continue that run" in line
    changes = ("--seed", 5, "--learning-rate", 0.1, "--dtype", "bfloat16")
    line = failure(*TINY, *changes, "--out", undisturbed, "--resume")
    for option in (
        "--seed 0 instead of 5",
        "--learning-rate 0.3 instead of 0.1",
        "--dtype float32 instead of bfloat16",
    ):
        assert option in line


@pytest.mark.slow  # trains to its end, more than once
def test_signals_lose_nothing(undisturbed, tmp_path, monkeypatch, capfd):
    """In the middle of an epoch, after its last step, and in evaluation: saved, resumed, and the same in the end."""
    when = {}
    asked, evaluate = Signals.asked, _steps.evaluate

    def asked_then(self, step):
        if step == when.get("step"):
            signal.raise_signal(when["signal"])
        return asked(self, step)

    def evaluate_then(*arguments):
        if when.get("step") == "evaluation":
            signal.raise_signal(when["signal"])
        return evaluate(*arguments)

    monkeypatch.setattr(Signals, "asked", asked_then)
    monkeypatch.setattr(_steps, "evaluate", evaluate_then)
    handler = signal.getsignal(signal.SIGTERM)
    cases = [(3, signal.SIGTERM, 3), (6, signal.SIGINT, 6), (8, signal.SIGINT, 8), ("evaluation", signal.SIGTERM, 12)]
    for step, number, saved in cases:
        when.update(step=step, signal=number)
        with pytest.raises(SystemExit) as caught:
            run_here(*TINY, "--out", tmp_path, "--resume")
        assert caught.value.code == 128 + number
        message = f"{number.name}: stopped after step {saved}, which is saved; go on with the same settings and"
        assert f"{message} --out {tmp_path} --resume" in capfd.readouterr().err
        assert signal.getsignal(signal.SIGTERM) == handler
        assert (tmp_path / "checkpoints" / str(saved)).is_dir()
    when.clear()
    run_here(*TINY, "--out", tmp_path, "--resume")
    assert records_in(tmp_path) == records_in(undisturbed)
    chex.assert_trees_all_equal(state_in(tmp_path), state_in(undisturbed))


def test_metrics_are_never_erased(undisturbed, tmp_path, caplog):
    """Foreign files, lines that are no records, half a line: renamed, and what counts is kept."""
    foreign = tmp_path / "foreign" / "metrics.jsonl"
    foreign.parent.mkdir()
    foreign.write_text('{"mine": 1}\n')
    assert f"{foreign} is there already" in failure(*TINY, "--out", foreign.parent)
    assert foreign.read_text() == '{"mine": 1}\n'
    _report.MetricsFile(foreign, (0, 0))
    assert (foreign.parent / "metrics.1.jsonl").read_text() == '{"mine": 1}\n'
    assert "renamed metrics.1.jsonl" in caplog.text

    whole = (undisturbed / "metrics.jsonl").read_text()
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"garbage\n{whole}\x00\xff[1]\n" + '{"kind": "train", "step"')
    before = path.read_text()
    file = _report.MetricsFile(path, (6, 1))
    file.write(kind="train", step=7, loss=float("nan"), rates=[float("inf"), 1.0])
    assert (tmp_path / "metrics.1.jsonl").read_text() == before
    kept = [r for r in records_in(undisturbed) if r["step"] <= 6]
    assert records_in(tmp_path) == [*kept, {"kind": "train", "step": 7, "loss": None, "rates": [None, 1.0]}]
    assert len(path.read_text().splitlines()) == len(whole.splitlines()) + 2


# Failures ------------------------------------------------------------------------------------------------------------


def test_divergence_leaves_no_checkpoint_that_cannot_be_resumed(tmp_path):
    """At this rate a loss stays finite while parameters do not."""
    line = failure("--model", "mlp", "--devices", 1, "--learning-rate", 1e30, "--out", tmp_path)
    assert "averages or gradients that are not finite; there is no checkpoint yet. Try a lower --learning-rate" in line
    assert not any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
    records_in(tmp_path)


@pytest.mark.parametrize("part", ["params", "batch_stats", "opt_state"])
def test_no_part_of_the_state_may_be_nan(part, tmp_path, monkeypatch):
    """Of gradients it is the optimizer's momentum that is not finite."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    state = training.init_state(training.MLP(widths=(4,)), optimizer(), (8, 8, 1), mesh=mesh)
    leaves, tree = jax.tree.flatten(getattr(state, part))
    bad = state._replace(**{part: tree.unflatten([leaves[0].at[0].set(jnp.nan), *leaves[1:]])})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(training.Failure, match="0: not written, since not all of the state is finite"):
            checkpoints.save(bad, {})
        assert checkpoints.last_step is None


def test_a_step_that_ends_with_a_nan_ends_the_run(tmp_path, monkeypatch):
    make = _steps.make_train_step

    def poisoned(*arguments, **settings):
        step = make(*arguments, **settings)

        def poison(state, batch):
            state, metrics = step(state, batch)
            if state.step == 6:
                state = state._replace(opt_state=jax.tree.map(lambda a: a * jnp.nan, state.opt_state))
            return state, metrics

        return poison

    monkeypatch.setattr(_steps, "make_train_step", poisoned)
    line = failure(*TINY, "--out", tmp_path)
    assert "step 6, with" in line
    assert "the checkpoint of step 4 is whole" in line


def test_classes_of_test_images_that_training_lacks(tmp_path):
    for part, labels in (("train", [0, 4, 2, 3]), ("t10k", [1, 9])):
        images = struct.pack(">4B3I", 0, 0, 8, 3, len(labels), 4, 4) + bytes(16 * len(labels))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + bytes(labels)
        )
    line = failure("--data", "mnist", "--folder", tmp_path, "--devices", 1, "--out", tmp_path / "run")
    assert line == "test labels: expected 0 to 4, as in training; found 9."
    assert "no such folder" in failure("--data", "mnist", "--folder", tmp_path / "nowhere", "--devices", 1)


def test_a_small_gzip_file_does_not_fill_the_memory(tmp_path):
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 7) + bytes(7))
        bomb = struct.pack(">4B3I", 0, 0, 8, 3, 7, 5, 6) + bytes(100_000_000)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bomb, 1))
    del bomb
    tracemalloc.start()
    with pytest.raises(_data.DataError, match=r"expected 226 bytes, .*; found more"):
        _data.load_mnist(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def damage(run, step):
    for path in (run / "checkpoints" / str(step) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow  # trains to its end, more than once
def test_where_the_last_checkpoint_is_damaged_the_one_before_is_used(undisturbed, tmp_path, caplog):
    run = copied(undisturbed, tmp_path)
    damage(run, 12)
    run_here(*TINY, "--out", run, "--resume")
    assert f"{run / 'checkpoints' / '12'} is damaged" in caplog.text
    assert f"going on from {run / 'checkpoints' / '10'}" in caplog.text or "going on from" in caplog.text
    assert (run / "checkpoints" / "12.damaged").is_dir()
    assert records_in(run) == records_in(undisturbed)
    chex.assert_trees_all_equal(state_in(run), state_in(undisturbed))


def test_a_flipped_bit_is_noticed(tmp_path):
    """What is stored has a checksum of our own: tensorstore reads it back without a word."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    state = training.init_state(training.MLP(), optimizer(), (8, 8, 1), mesh=mesh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        large = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(large.read_bytes())
        content[len(content) // 2] ^= 1
        large.write_bytes(content)
        with pytest.raises(training.Failure, match=r"none of the checkpoints there \(0\) is a whole one"):
            checkpoints.restore(state)
        assert (tmp_path / "0").is_dir()


def test_folders_that_cannot_be_used(undisturbed, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert f"{file / 'checkpoints'}: Not a directory; give a folder" in failure(*TINY, "--out", file)
    foreign = tmp_path / "foreign" / "checkpoints" / "7"
    foreign.mkdir(parents=True)
    for content in ("nothing", "something"):
        line = failure(*TINY, "--out", tmp_path / "foreign", "--resume")
        assert "none of the checkpoints there (7) is a whole one" in line
        assert "give another folder, or move them away" in line
        (foreign / content).touch()
    assert sorted(path.name for path in foreign.iterdir()) == ["nothing", "something"]
    run = copied(undisturbed, tmp_path)
    for path in (run / "checkpoints").iterdir():
        damage(run, path.name)
    assert "is a whole one of this network" in failure(*TINY, "--out", run, "--resume")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1000))
        line = failure(*TINY, "--out", tmp_path / "a")
    assert f"{tmp_path / 'a' / 'checkpoints' / '4'}: not written, " in line
    assert "bytes are needed and 1,000 free; there is no checkpoint yet. Make room" in line

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        line = failure(*TINY, "--out", tmp_path / "b")
    assert "4: could not be written (OSError: [Errno 28] No space left on device); there is no checkpoint yet" in line
    with monkeypatch.context() as patch:
        opened = Path.open
        patch.setattr(Path, "open", lambda self, *a, **k: (full if self.suffix == ".jsonl" else opened)(self, *a, **k))
        line = failure(*TINY, "--out", tmp_path / "c")
    assert f"{tmp_path / 'c' / 'metrics.jsonl'}: No space left on device; make room" in line


def test_bugs_are_not_hidden(monkeypatch):
    """Only what is expected becomes a line."""

    def broken(*arguments, **settings):
        raise ValueError("a bug")

    monkeypatch.setattr(_run._models, "make_model", broken)
    with pytest.raises(ValueError, match="a bug"):
        run_here(*TINY)


def test_without_the_extra_the_line_that_installs_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxnorm.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs rich.table, .*: pip install "jaxnorm\[training\]"'):
        importlib.import_module("jaxnorm.training")


# Checkpoints and reports ---------------------------------------------------------------------------------------------


def test_checkpoints_keep_the_best_and_the_last_two(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    state = training.init_state(training.MLP(widths=(4,)), optimizer(), (8, 8, 1), mesh=mesh)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step is None
        assert checkpoints.record() is None
        for step, accuracy in enumerate((0.5, 0.9, 0.7, 0.6), 1):
            checkpoints.save(state._replace(step=np.int32(step)), {"epochs": step}, accuracy)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step == 4
        assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 3, 4]
        restored, record = checkpoints.restore(state)
    assert record == {"epochs": 4}
    assert restored.step == 4
    chex.assert_trees_all_equal(restored[1:], state[1:])


def test_drift_is_the_distance_in_deviations():
    moments = {"Norm_0": {"BatchNorm_0": Moments(np.array([3.0, 1.0]), np.ones(2), np.ones(2))}}
    averages = {"Norm_0": {"BatchNorm_0": {"mean": np.array([1.0, 0.0]), "var": np.array([4.0, 1.0])}}}
    assert _report.drift(averages, moments) == {"Norm_0": pytest.approx(1.0, rel=1e-4)}


# Several processes ---------------------------------------------------------------------------------------------------


def test_processes_with_other_settings_refuse_to_start(monkeypatch):
    """All of them see what all were started with."""
    first, second = Settings(), Settings(seed=3, parallelism="shard_map")
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: [type("device", (), {"process_index": i}) for i in (0, 1)])
    monkeypatch.setattr(_run.multihost_utils, "process_allgather", lambda row: sent.append(row) or [row, row])
    _run.check_same(first)
    _run.check_same(second)
    monkeypatch.setattr(_run.multihost_utils, "process_allgather", lambda row: sent)
    with pytest.raises(
        training.Failure, match=r"process 1 was .*: --seed 3 instead of 0, --parallelism shard_map instead of"
    ):
        _run.check_same(first)
    monkeypatch.setattr(jax, "devices", lambda: [type("device", (), {"process_index": i}) for i in (0, 1, 1)])
    with pytest.raises(training.Failure, match="--devices must be the same on all hosts; got 1, 2"):
        _run.check_same(first)


def command(*arguments):
    environment = {**os.environ, "XLA_FLAGS": FASTER_TO_COMPILE, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {"args": [sys.executable, "-m", "jaxnorm.training", *map(str, arguments)], "env": environment}


def processes(out, *arguments, count=2):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    hosts = ("--coordinator", address, "--num-processes", count, "--devices", 2, "--out", out)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(**command(*arguments, *hosts, "--process-id", i), **pipes) for i in range(count)]


def ended(running):
    printed = [process.communicate(timeout=600)[0] for process in running]
    return [process.returncode for process in running], "\n".join(printed)


def wait_for_metrics(out, process):
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["jit", "shard_map"])
def test_two_processes_of_two_devices(tmp_path, parallelism):
    """Losses and averages of one process with one device, over 12 steps, two of them on partial batches."""
    arguments = (*TINY, "--learning-rate", 0.02, "--parallelism", parallelism)
    codes, printed = ended(processes(tmp_path / "two", *arguments))
    assert codes == [0, 0], printed
    run_here(*arguments, "--devices", 1, "--out", tmp_path / "one")
    two, one = ([r["loss"] for r in records_in(tmp_path / n) if r["kind"] == "train"] for n in ("two", "one"))
    assert_close(np.float32(two), np.float32(one), 12**2 * 256 * 64)
    two, one = (state_in(tmp_path / name).batch_stats for name in ("two", "one"))
    jax.tree.map(lambda a, b: assert_close(a, b, 12**2 * 256 * 64), two, one)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    running = processes(tmp_path / "two", "--model", "mlp", "--epochs", 100000, "--save-every", 1000000)
    wait_for_metrics(tmp_path / "two", running[0])
    running[1].send_signal(signal.SIGTERM)
    codes, printed = ended(running)
    assert codes == [128 + signal.SIGTERM] * 2, printed
    assert printed.count("SIGTERM: stopped after step") == 2
    with Checkpoints(tmp_path / "two" / "checkpoints") as checkpoints:
        assert printed.count(f"stopped after step {checkpoints.last_step}, which is saved") == 2


@pytest.mark.slow
def test_a_peer_that_dies_is_an_error_not_a_hang(tmp_path):
    survivor, victim = processes(tmp_path / "two", "--model", "mlp", "--epochs", 100000)
    wait_for_metrics(tmp_path / "two", survivor)
    victim.kill()
    victim.communicate()
    (code,), printed = ended([survivor])
    assert code != 0
    assert printed
