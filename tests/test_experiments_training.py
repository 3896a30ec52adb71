"""A training is a function of its options; what interrupts it leaves no trace in what comes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
from trainings import bits, log_without_times, quiet, small, tiny

import fgsgd_jax as fg
from fgsgd_jax.experiments import (
    MetricsLog,
    TrainConfig,
    Trainer,
    UsageError,
    _schemes,
    fit,
    load,
    rules,
    run,
)
from fgsgd_jax.experiments._augment import augment
from fgsgd_jax.experiments._checkpoints import Checkpoints
from fgsgd_jax.experiments._models import REGISTRY
from fgsgd_jax.experiments._trainer import AUGMENTATION

CONFIG = TrainConfig(model="small", epochs=2, batch_size=32, limit_train=150, limit_test=70, lr=0.03)
STEPS = 4  # an epoch: 150 images have four whole batches


@pytest.fixture(scope="module", autouse=True)
def networks():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(REGISTRY, "small", small)
        patched.setitem(REGISTRY, "tiny", tiny)
        yield


@pytest.fixture(scope="module")
def data():
    return load("digits", limit_train=CONFIG.limit_train, limit_test=CONFIG.limit_test)


@pytest.fixture(scope="module")
def trainer(data):
    return Trainer(CONFIG, data)


@pytest.fixture(scope="module")
def baseline(data):
    return Trainer(dataclasses.replace(CONFIG, scheme="euc"), data)


@pytest.fixture(scope="module")
def undisturbed(trainer, tmp_path_factory):
    return run(CONFIG, tmp_path_factory.mktemp("runs") / "undisturbed", trainer=trainer, console=quiet())


class Silent:
    def __init__(self):
        self.records = []

    def progress(self, glance):
        del glance

    def epoch(self, record):
        self.records.append(record)

    def checkpoint(self, step, state):
        del step, state


# The run and its folder.


def test_a_run_leaves_log_checkpoints_and_picture(undisturbed):
    header, records = MetricsLog(undisturbed.folder / "metrics.jsonl").read()
    assert TrainConfig.from_dict(header["config"]) == CONFIG
    assert [record["epoch"] for record in records] == [1, 2]
    assert records == undisturbed.records
    assert sorted(entry.name for entry in (undisturbed.folder / "checkpoints").iterdir()) == ["4", "8"]
    assert undisturbed.picture.read_bytes().startswith(b"\x89PNG")


def test_weights_end_on_their_manifolds(undisturbed, trainer):
    last = undisturbed.records[-1]
    assert last["violation"] < 1e-6
    assert set(last["by_parameter"]) == set(trainer.plan_of(0).collections)
    radii = fg.radii(undisturbed.state.opt_state)
    violation = fg.violation(undisturbed.state.params, trainer.plan_of(0), radii)
    assert max(map(float, violation.values())) == last["violation"]
    # Frobenius norms follow from the members: s²·(1 for a sphere, 3 for the others).
    plan = trainer.plan_of(0)["stage_0/block_0/conv_0/kernel"]
    squared = np.where(np.asarray(plan.member) == 0, 1, 3) * np.asarray(plan.gamma) ** 2
    np.testing.assert_allclose(last["norms"]["stage_0/block_0/conv_0/kernel"], np.sqrt(squared.sum()), rtol=1e-5)


def interrupted(config, trainer, folder, monkeypatch, checkpoint_every, stop):
    """A run that is stopped just after the checkpoint of step `stop`, and then resumed."""
    save = Checkpoints.save

    def save_and_die(self, step, state, about):
        save(self, step, state, about)
        if step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(config, folder, trainer=trainer, checkpoint_every=checkpoint_every, console=quiet())
    # As if it had been killed a little later, in the middle of a line.
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 2, "ste')
    return run(config, folder, trainer=trainer, resume=True, checkpoint_every=checkpoint_every, console=quiet())


@pytest.mark.parametrize(("checkpoint_every", "stop"), [(None, 4), (3, 3), (3, 6)])
def test_an_interrupted_run_resumes_bit_for_bit(trainer, undisturbed, tmp_path, monkeypatch, checkpoint_every, stop):
    resumed = interrupted(CONFIG, trainer, tmp_path / "run", monkeypatch, checkpoint_every, stop)
    assert bits(resumed.state) == bits(undisturbed.state)
    assert log_without_times(tmp_path / "run") == log_without_times(undisturbed.folder)


@pytest.mark.slow
def test_a_run_with_lambda_resumes_bit_for_bit_from_inside_an_epoch(data, tmp_path, monkeypatch):
    """The moments of the first steps of the epoch are in the checkpoint: λ at its end depends on all of them."""
    config = dataclasses.replace(CONFIG, lambda_="epoch", model="plain8")
    monkeypatch.setattr(_schemes, "is_spatial_kernel", lambda path, leaf: "conv_0" in path and leaf.ndim == 4)
    trainer = Trainer(config, data)
    whole = run(config, tmp_path / "whole", trainer=trainer, console=quiet())
    resumed = interrupted(config, trainer, tmp_path / "stopped", monkeypatch, 3, 3)
    assert bits(resumed.state) == bits(whole.state)
    assert log_without_times(tmp_path / "stopped") == log_without_times(tmp_path / "whole")
    scales = [figures["lambda"] for figures in whole.records[-1]["by_parameter"].values()]
    assert scales
    assert not np.allclose(scales, 1)


def test_what_was_logged_after_the_checkpoint_is_logged_again(trainer, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, folder, trainer=trainer, console=quiet())
    assert len(log_without_times(folder)) == 2
    resumed = run(CONFIG, folder, trainer=trainer, resume=True, console=quiet())
    assert bits(resumed.state) == bits(undisturbed.state)
    assert log_without_times(folder) == log_without_times(undisturbed.folder)


def test_a_run_of_a_constant_rate_can_be_made_longer(data, tmp_path):
    """To the weights, the log and the options of a run that was as long from the beginning."""
    config = dataclasses.replace(CONFIG, model="tiny", scheme="euc", schedule="constant")
    longer = dataclasses.replace(config, epochs=3)
    whole = run(longer, tmp_path / "whole", trainer=(three := Trainer(longer, data)), console=quiet())
    run(config, tmp_path / "run", trainer=Trainer(config, data), console=quiet())
    grown = run(longer, tmp_path / "run", trainer=three, resume=True, console=quiet())
    assert bits(grown.state) == bits(whole.state)
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"--epochs 2: the run in .* is one of 3 epochs; .* not shortened"):
        run(config, tmp_path / "run", resume=True, console=quiet())


def test_another_run_is_never_overwritten(undisturbed, trainer, tmp_path):
    before = {path: path.read_bytes() for path in undisturbed.folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"already holds something.*--resume.*--run-dir"):
        run(CONFIG, undisturbed.folder, trainer=trainer, console=quiet())
    with pytest.raises(UsageError, match=r"had other options: --lr is 0\.1, was 0\.03"):
        run(dataclasses.replace(CONFIG, lr=0.1), undisturbed.folder, resume=True, console=quiet())
    assert before == {path: path.read_bytes() for path in undisturbed.folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="holds no run to resume"):
        run(CONFIG, tmp_path / "none", trainer=trainer, resume=True, console=quiet())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(CONFIG, tmp_path / "file", trainer=trainer, console=quiet())


@pytest.fixture
def half(trainer, undisturbed, tmp_path):
    """A folder with the undisturbed run's log and a checkpoint to plant things in."""
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes((undisturbed.folder / "metrics.jsonl").read_bytes())

    def plant(about):
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
        checkpoints.save(2 * STEPS, undisturbed.state, about)
        checkpoints.close()
        return tmp_path / "run"

    return plant


def resume(folder, trainer):
    return run(CONFIG, folder, trainer=trainer, resume=True, console=quiet())


def test_another_plan_is_refused(half, trainer):
    other = fg.plan(trainer.start(0).params, rules("pio:sp+ob"), degenerate="euclidean")
    folder = half({"config": CONFIG.to_dict(), "plan": other.to_json()})
    with pytest.raises(UsageError, match=r"belongs to another plan: .*kernel"):
        resume(folder, trainer)


def test_a_plan_is_refused_where_there_was_none(half, trainer):
    with pytest.raises(UsageError, match="belongs to another plan: one of them constrains nothing"):
        resume(half({"config": CONFIG.to_dict(), "plan": None}), trainer)


def test_other_data_and_damaged_files_are_refused(half, trainer, data):
    folder = half({"config": CONFIG.to_dict(), "plan": trainer.plan_of(0).to_json()})
    log = folder / "metrics.jsonl"
    whole = log.read_text()

    other = dataclasses.replace(data, train=data.train.take(np.arange(150)[::-1]))
    with pytest.raises(UsageError, match="is not what it was"):
        resume(folder, Trainer(CONFIG, other))

    log.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(UsageError, match="has 1 epochs and the checkpoint 2"):
        resume(folder, trainer)
    lines = whole.splitlines(keepends=True)
    log.write_text(lines[0] + "{broken\n" + lines[2])
    with pytest.raises(UsageError, match="line 2 is damaged"):
        resume(folder, trainer)
    log.write_text("")
    with pytest.raises(UsageError, match="no first line"):
        resume(folder, trainer)

    log.write_text(whole)
    for file in (folder / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")
    with pytest.raises(UsageError, match=r"checkpoint .*8 cannot be read .*remove that folder"):
        resume(folder, trainer)


def test_a_training_that_diverges_says_so(data, trainer, tmp_path, monkeypatch):
    def broken(state, plan):
        return record(state, plan) | {"train": {"loss": float("nan"), "error": 90.0}}

    record = trainer.report
    monkeypatch.setattr(trainer, "report", broken)
    with pytest.raises(UsageError, match=r"epoch 1: the training diverged; use a smaller --lr"):
        run(CONFIG, tmp_path / "run", trainer=trainer, console=quiet())
    assert log_without_times(tmp_path / "run")[1]["train"]["loss"] is None


# The training itself.


def test_the_baseline_is_momentum_sgd_with_l2_as_in_torch(baseline):
    """Against the formula of torch.optim.SGD in NumPy, from the same gradients."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(2, 3)).astype(np.float32)}
    optimizer = baseline._optimizer(jnp.float32(baseline.config.lr), None)
    buffer, state = np.zeros((2, 3), np.float32), optimizer.init(params)
    expected = params["kernel"].copy()
    for step in range(3):
        grads = {"kernel": rng.normal(size=(2, 3)).astype(np.float32)}
        buffer = 0.9 * buffer + grads["kernel"] + 5e-4 * expected
        expected = expected - baseline.config.lr * float(baseline._unit_rate(step)) * buffer
        updates, state = optimizer.update(grads, state, params)
        params = {"kernel": params["kernel"] + np.asarray(updates["kernel"])}
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


def test_the_baseline_learns_and_constrains_nothing(baseline):
    observer = Silent()
    fit(baseline, baseline.start(0), observer)
    first, last = observer.records
    assert last["train"]["loss"] < first["train"]["loss"]
    assert "violation" not in last


def test_seeds_share_one_compiled_program(trainer):
    order = trainer.order(trainer.start(0))
    compiled = trainer._step._cache_size()
    states = [trainer.advance(trainer.start(seed), order, 1) for seed in (1, 2)]
    assert trainer._step._cache_size() == max(compiled, 1)
    for seed, state in zip((1, 2), states, strict=True):
        assert trainer.figures(trainer.glance(state, trainer.plan_of(seed))).violation < 1e-6


def test_several_steps_to_a_call_are_the_steps_one_by_one(baseline, trainer):
    """What an accelerator runs, on the CPU: the loop's body is the step, and its count is no constant."""
    order = baseline.order(baseline.start(0))
    single = baseline.advance(baseline.start(0), order, 3)
    looped = baseline._steps(baseline.start(0), order, baseline.train_data, 3)
    assert int(looped.step) == 3
    # And a loop's state keeps its types, that of FG-SGD too.
    state = trainer.start(0)
    after = jax.eval_shape(trainer._many_steps, state, order, trainer.train_data, 3)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    for one, other in zip(jax.tree.leaves(single.params), jax.tree.leaves(looped.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_every_test_image_counts_exactly_once(trainer, data):
    """70 images in batches of 32: the last one is padded."""
    state = trainer.start(0)
    loss, error = trainer.evaluate(state)
    train, test = data.train.images / 1.0, data.test.images / 1.0
    images = jnp.asarray((test - train.mean()) / train.std(), jnp.float32)
    logits, *_ = trainer._model.apply(state.params, trainer.averages(state), images, False, False)
    log_likelihood = jax.nn.log_softmax(logits)[jnp.arange(70), data.test.labels]
    np.testing.assert_allclose(loss, -log_likelihood.mean(), rtol=1e-5)
    assert error == 100 * np.mean(np.asarray(logits).argmax(1) != data.test.labels)


def test_an_epoch_sees_different_images_in_an_order_of_its_own(trainer):
    state = trainer.start(0)
    orders = [np.asarray(trainer.order(state._replace(step=jnp.int32(step)))) for step in (0, STEPS - 1, STEPS)]
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(150))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_a_batch_larger_than_the_data_is_refused(data):
    with pytest.raises(UsageError, match="--batch-size 151 is more than the 150 training images"):
        Trainer(dataclasses.replace(CONFIG, batch_size=151), data)


def test_evaluation_is_of_the_weights_as_they_are(trainer, data):
    """And not of the averages of the training, which are of weights of many steps past."""
    state = trainer.advance(trainer.start(0), trainer.order(trainer.start(0)), 1)
    other = state._replace(stats=jax.tree.map(lambda leaf: leaf + 7, state.stats))
    assert trainer.evaluate(state) == trainer.evaluate(other)
    # The stem's features, of the batches by hand.
    rows = [np.asarray(batch) for _, batch in trainer._measured_on]
    counts = np.bincount(np.concatenate(rows), minlength=150)
    assert [len(batch) for batch in rows] == [CONFIG.batch_size] * 5
    assert set(counts) == {1, 2}
    assert counts.sum() == 160
    images, variances, means = data.train.images / 1.0, [], []
    for number, batch in enumerate(rows):
        key = jax.random.fold_in(jax.random.key(AUGMENTATION), number)
        augmented = np.asarray(augment(key, jnp.asarray(data.train.images[batch]), "crop"))
        features = jax.lax.conv_general_dilated(
            jnp.asarray((augmented - images.mean()) / images.std(), jnp.float32),
            state.params["stem"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        means.append(features.mean((0, 1, 2)))
        variances.append(features.var((0, 1, 2)))
    found = trainer.averages(state)["stem_norm"]
    np.testing.assert_allclose(found["mean"], np.mean(means, axis=0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["var"], np.mean(variances, axis=0), rtol=1e-3)


@pytest.mark.slow
def test_short_runs_are_tested_as_well_as_they_are_trained(tmp_path):
    """Fourteen steps at a large rate: averages of the training are still far from the weights here."""
    config = TrainConfig(epochs=2, lr=0.1)
    trainer = Trainer(config, load("digits"))
    last = run(config, tmp_path / "run", trainer=trainer, console=quiet()).records[-1]
    assert last["test"]["error"] < last["train"]["error"] + 5
