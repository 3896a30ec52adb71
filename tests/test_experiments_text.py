"""A GPT on text: what it reads, what it is, what its weights live on, how it is trained and taken up again."""

import dataclasses
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint")
import datasets
import orbax.checkpoint as ocp
from trainings import bits, log_without_times, quiet

import fgsgd_jax as fg
from fgsgd_jax.experiments import MetricsLog, TextConfig, Trainer, UsageError, load_text, run
from fgsgd_jax.experiments._checkpoints import Checkpoints
from fgsgd_jax.experiments._paths import by_path, mapped
from fgsgd_jax.experiments._text import SCHEMES, GPTShape, build_gpt, continued, text_rules
from fgsgd_jax.experiments._text._config import FREE, SCHEME_OF
from fgsgd_jax.experiments._text._gpt import rotated
from fgsgd_jax.experiments._text._optimizers import from_free_weights, make_text_optimizer
from fgsgd_jax.experiments._trainer import WEIGHTS

pytestmark = pytest.mark.usefixtures("users_promotion")

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = GPTShape(vocabulary=256, layers=1, width=16, heads=2)
TINY = TextConfig(
    layers=1, width=16, heads=2, context=16, batch_size=4, steps=10, report_every=4, test_bytes=320, warmup=2
)
TEXT = b"the cat sat on the mat and the dog lay by the door; " * 60


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of three texts."""
    folder = tmp_path_factory.mktemp("shelf") / "books"
    (folder / "more").mkdir(parents=True)
    for name, text in (("one.txt", TEXT), ("two.md", TEXT[7:]), ("more/three.txt", TEXT[::-1])):
        (folder / name).write_bytes(text)
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    return folder


@pytest.fixture(scope="module")
def config(shelf):
    return dataclasses.replace(TINY, data=str(shelf), held_out="two.md")


@pytest.fixture(scope="module")
def trainer(config):
    return Trainer(config.check(), load_text(config.data, held_out=config.held_out))


@pytest.fixture(scope="module")
def undisturbed(config, trainer, tmp_path_factory):
    return run(config, tmp_path_factory.mktemp("runs") / "undisturbed", trainer=trainer, console=quiet())


@pytest.fixture(scope="module")
def weights():
    """The network of SHAPE and weights to begin with."""
    model = build_gpt(SHAPE)
    params, _ = jax.jit(model.init)(jax.random.key(0))
    return model, params


def joined(texts):
    return [bytes(text) for text in texts]


# The texts.


def test_files_are_held_out_whole_by_their_names(shelf):
    data = load_text(str(shelf), held_out="two.md")
    assert joined(data.test) == [TEXT[7:]]
    assert sorted(joined(data.train)) == sorted([TEXT, TEXT[::-1]])
    assert data.summary()[1] == "held out: two.md"
    assert joined(load_text(str(shelf), held_out="*.txt").train) == [TEXT[7:]]
    # By a hash of the names: one at least, and the same in every run.
    chosen = load_text(str(shelf))
    assert len(chosen.test) == 1
    assert chosen.fingerprint() == load_text(str(shelf)).fingerprint()


def test_of_a_single_file_the_last_tenth_is_held_out(shelf):
    data = load_text(str(shelf / "one.txt"))
    (train,), (test,) = joined(data.train), joined(data.test)
    assert train + test == TEXT
    assert len(test) == len(TEXT) // 10


def test_rates_are_compared_on_the_end_of_every_training_file(shelf):
    whole = load_text(str(shelf), held_out="two.md")
    data = load_text(str(shelf), held_out="two.md", validation=0.25)
    assert [a + b for a, b in zip(joined(data.train), joined(data.test), strict=True)] == joined(whole.train)
    assert [len(text) for text in data.test] == [round(0.25 * len(text)) for text in whole.train]
    assert sum(map(len, load_text(str(shelf), held_out="two.md", limit_train=4000).train)) == 4000


def test_pythons_own_library_is_there_without_a_download():
    data = load_text()
    assert sum(map(len, data.train)) > 5 * sum(map(len, data.test)) > 10**5
    assert any(b"def " in text for text in joined(data.test))
    assert data.name == "stdlib"


def test_a_set_of_texts_is_read_by_its_column(tmp_path):
    table = datasets.Dataset.from_dict({"title": ["a", "b"], "text": ["first", "second"]})
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    data = load_text(str(tmp_path / "set"))
    assert b"".join(joined(data.train) + joined(data.test)) == b"first\n\nsecond"
    named = load_text(str(tmp_path / "set"), text_column="title")
    assert b"".join(joined(named.train) + joined(named.test)) == b"a\n\nb"
    with pytest.raises(UsageError, match=r"no column of texts 'titel'; did you mean 'title'\? --text-column: title"):
        load_text(str(tmp_path / "set"), text_column="titel")


def test_texts_that_cannot_be_trained_on_say_why(shelf, tmp_path):
    with pytest.raises(UsageError, match=r"no file of .* is called 'tow.md'; there are more/three.txt, one.txt"):
        load_text(str(shelf), held_out="tow.md")
    with pytest.raises(UsageError, match="that is every file of"):
        load_text(str(shelf), held_out="*")
    with pytest.raises(UsageError, match="holds no text file"):
        load_text(str(tmp_path))
    with pytest.raises(UsageError, match="is no text: it holds zero bytes"):
        load_text(str(shelf / "picture.png"))
    with pytest.raises(UsageError, match=r"'\./nowhere' does not exist.*`stdlib`, a text file"):
        load_text("./nowhere")
    (tmp_path / "short.txt").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"has 5 bytes to train on and 0 to test on, too few .* --context 16"):
        Trainer(TINY.check(), load_text(str(tmp_path / "short.txt")))


# The network.


def test_rotated_products_depend_on_the_distance_alone():
    q, k = (
        jnp.broadcast_to(jax.random.normal(jax.random.key(n), (1, 1, 1, 8), jnp.float32), (1, 12, 1, 8))
        for n in range(2)
    )
    products = np.asarray(jnp.einsum("nqhd,nkhd->qk", rotated(q), rotated(k)))
    for distance in (0, 1, 5):
        np.testing.assert_allclose(np.diag(products, distance), products[0, distance], rtol=1e-4)
    assert np.ptp(products[0]) > 0.1
    np.testing.assert_allclose(jnp.linalg.norm(rotated(q), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-6)


def test_no_byte_is_told_by_what_comes_after_it(weights):
    model, params = weights
    tokens = jax.random.randint(jax.random.key(1), (1, 10), 0, 256, jnp.int32)
    both = jnp.concatenate([tokens, tokens.at[0, 6].set((tokens[0, 6] + 1) % 256)])
    logits, other = jax.jit(model.apply, static_argnums=(3, 4))(params, {}, both, True, False)[0]
    np.testing.assert_allclose(logits[:6], other[:6], atol=1e-6)
    assert np.all(np.abs(logits[6:] - other[6:]).max(-1) > 1e-4)


def test_a_continuation_is_drawn_from_the_models_own_probabilities(weights):
    """At a temperature near zero: the likeliest byte every time, seen through a window of the last bytes."""
    (model, params), context = weights, 4
    apply = jax.jit(model.apply, static_argnums=(3, 4))
    text = list(b"abcd")
    for _ in range(6):
        logits, *_ = apply(params, {}, jnp.asarray([text[-context:]], jnp.int32), False, False)
        text.append(int(logits[0, -1].argmax()))
    written = continued(model, params, np.frombuffer(b"abcd", np.uint8), 6, context, temperature=1e-6)
    shown = bytes(text[4:]).decode(errors="replace")
    assert written == "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in shown)


# What the weights live on, and their optimizers.


@pytest.mark.parametrize(
    ("page", "millions", "size"),
    [("command_line", "0.85", {}), ("findings", "0.18", {"layers": 3, "width": 64, "heads": 2})],
)
def test_the_pages_say_how_large_the_networks_are(page, millions, size):
    config = TextConfig(**size)
    model = build_gpt(GPTShape(256, config.layers, config.width, config.heads))
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6:.2f}" == millions
    assert f"{millions} million parameters" in (ROOT / "docs" / f"{page}.md").read_text()


def squared_norms(collection):
    """Of every matrix on its manifold: γ² for a sphere, for each column, and for each singular value."""
    rows, columns = collection.view.grid[2:]
    units = {fg.Sphere: 1, fg.Oblique: columns, fg.Stiefel: min(rows, columns)}
    counts = np.array([units[type(manifold)] for manifold in collection.manifolds])[collection.member]
    return np.broadcast_to(collection.gamma, counts.shape) ** 2 * counts


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in FREE])
def test_weights_have_the_norm_that_free_ones_begin_with(scheme):
    shape = GPTShape(256, 1, 48, 3)
    shapes, _ = jax.eval_shape(build_gpt(shape).init, jax.random.key(0))
    plan = fg.plan(shapes, text_rules(scheme, shape))
    matrices = {path for path in by_path(shapes) if path.startswith("block_0/") and path.endswith("kernel")}
    assert set(plan.collections) == matrices | ({"embed/embedding"} if scheme not in ("spheres", "stiefel") else set())
    for path in matrices:
        outputs = 192 if "up" in path else 48
        np.testing.assert_allclose(squared_norms(plan[path]).sum(), outputs, rtol=1e-5, err_msg=path)
    if "embed/embedding" in plan.collections:
        np.testing.assert_allclose(squared_norms(plan["embed/embedding"]), 1, rtol=1e-5)
    if scheme in ("heads", "po-heads", "pio-tiles"):
        assert plan["block_0/attention/query/kernel"].view.grid == (1, 3, 48, 16)
        assert plan["block_0/attention/out/kernel"].view.grid == (3, 1, 16, 48)


# Each compiles for ten seconds and more. The fast tests train by one, spel.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [("on-manifolds", {"scheme": "pio-tiles"}), *((name, {}) for name in SCHEME_OF), ("spel", {"tangent": "off"})],
)
def test_every_optimizer_moves_all_weights_and_keeps_its_manifolds(optimizer, changes, weights):
    config = dataclasses.replace(TINY, optimizer=optimizer, **changes).check()
    _, params = weights
    rules = text_rules(config.scheme, SHAPE)
    plan = None if rules is None else fg.plan(params, rules)
    if plan is not None:
        params = fg.initialize(jax.random.key(1), params, plan)
    tx = make_text_optimizer(config, lambda count: 0.02 + 0.0 * count, lambda count: 0.01 + 0.0 * count, plan)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    grads = tree.unflatten(
        [0.1 * jax.random.normal(key, leaf.shape, jnp.float32) for key, leaf in zip(keys, leaves, strict=True)]
    )
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    moved = by_path(optax.apply_updates(params, updates))
    if plan is not None:
        assert max(map(float, fg.violation(optax.apply_updates(params, updates), plan).values())) < 1e-6
    for path, before in by_path(params).items():
        step = np.asarray(moved[path] - before)
        assert 1e-5 < np.abs(step).max() < 0.7, path
        assert np.vdot(np.asarray(by_path(grads)[path]), step) < 0, path


# The training.


def test_a_run_leaves_log_checkpoints_picture_and_a_sample(undisturbed, config):
    header, records = MetricsLog(undisturbed.folder / "metrics.jsonl").read()
    assert TextConfig.from_dict(header["config"]) == config.check()
    # The last stretch is shorter.
    assert [record["step"] for record in records] == [4, 8, 10]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert all(record["violation"] < 1e-6 for record in records)
    assert records[-1]["train"]["loss"] < records[0]["train"]["loss"]
    assert undisturbed.picture.read_bytes().startswith(b"\x89PNG")
    assert (undisturbed.folder / "sample.txt").read_text(encoding="utf-8") == undisturbed.sample
    assert undisturbed.sample.startswith(TEXT[7:71].decode())


@pytest.mark.parametrize(("checkpoint_every", "stop"), [(None, 4), (3, 9)])
def test_an_interrupted_run_resumes_bit_for_bit(
    config, trainer, undisturbed, tmp_path, monkeypatch, checkpoint_every, stop
):
    save, folder = Checkpoints.save, tmp_path / "run"

    def save_and_die(self, step, state, about):
        save(self, step, state, about)
        if step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(config, folder, trainer=trainer, checkpoint_every=checkpoint_every, console=quiet())
    resumed = run(config, folder, trainer=trainer, resume=True, checkpoint_every=checkpoint_every, console=quiet())
    assert bits(resumed.state) == bits(undisturbed.state)
    assert log_without_times(folder) == log_without_times(undisturbed.folder)
    assert resumed.sample == undisturbed.sample


def test_losses_are_those_of_every_byte_of_every_passage(trainer, undisturbed):
    state, text = undisturbed.state, np.frombuffer(TEXT[7:], np.uint8).astype(np.int32)
    passages = np.stack([text[start : start + 17] for start in np.asarray(trainer.test_data.starts)])
    assert len(passages) == trainer.task.tests == 20
    logits, *_ = trainer._model.apply(state.params, {}, jnp.asarray(passages[:, :-1]), False, False)
    likelihood = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), passages[:, 1:, None], 2)
    loss, error = trainer.evaluate(state)
    np.testing.assert_allclose(loss, -likelihood.mean(), rtol=1e-5)
    np.testing.assert_allclose(error, 100 * np.mean(np.asarray(logits).argmax(2) != passages[:, 1:]))
    assert undisturbed.records[-1]["test"] == {"loss": loss, "error": error}


def test_passages_are_drawn_anew_in_every_stretch(trainer):
    state = trainer.start(0)
    first, same = trainer.order(state), trainer.order(trainer.start(0))
    later, other = trainer.order(state._replace(step=jnp.int32(4))), trainer.order(trainer.start(1))
    np.testing.assert_array_equal(first, same)
    assert first.shape == (16,)
    assert not np.array_equal(first, later)
    assert not np.array_equal(first, other)
    inputs, labels = trainer.task.train_batch(trainer.train_data, first[:4], jax.random.key(0))
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    text = np.concatenate(trainer.data.train)
    np.testing.assert_array_equal(labels[2], text[int(first[2]) + 1 : int(first[2]) + 17])


def test_a_training_moves_every_weight(trainer, undisturbed):
    moved = by_path(undisturbed.state.params)
    for path, before in by_path(trainer.start(0).params).items():
        assert 1e-3 < np.abs(moved[path] - before).max() < 1, path


def test_free_weights_may_be_brought_to_the_nearest_point(config, trainer):
    near = Trainer(dataclasses.replace(config, start="nearest").check(), trainer.data)
    params, _ = trainer._init(jax.random.fold_in(jax.random.key(3), WEIGHTS))
    free = np.asarray(params["block_0"]["mlp"]["up"]["kernel"])
    u, _, vt = np.linalg.svd(free, full_matrices=False)
    np.testing.assert_allclose(near.start(3).params["block_0"]["mlp"]["up"]["kernel"], 2 * u @ vt, atol=1e-5)
    off = Trainer(dataclasses.replace(config, start="free").check(), trainer.data)
    np.testing.assert_array_equal(off.start(3).params["block_0"]["mlp"]["up"]["kernel"], free)


@pytest.mark.parametrize("scheme", FREE)
def test_muon_may_take_each_head_by_itself(scheme, weights):
    """What moves one head then does not depend on the others."""
    attention = weights[1]["block_0"]["attention"]
    params = {"block_0": {"attention": {name: attention[name] for name in ("query", "out")}}}
    config = dataclasses.replace(TINY, optimizer="muon", scheme=scheme, weight_decay=0.0).check()
    rate = optax.constant_schedule(1.0)
    tx = make_text_optimizer(config, rate, rate, None)

    def first_heads(grads):
        moved = by_path(jax.jit(tx.update)(grads, tx.init(params), params)[0])
        return [moved["block_0/attention/query/kernel"][:, 0], moved["block_0/attention/out/kernel"][0]]

    def others(path, leaf):
        place = (slice(None), 1) if "query" in path else 1
        return leaf.at[place].set(jnp.cos(9 * leaf[place]))

    for one, other in zip(first_heads(params), first_heads(mapped(others, params)), strict=True):
        assert np.allclose(one, other, rtol=0, atol=1e-5) == (scheme == "euc-heads")


def test_the_first_step_may_lead_from_free_weights():
    """By the gradient there, to where it leads from the nearest points; from then on as from any point."""
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4), jnp.float32)}
    plan = fg.plan(params, [("w", fg.Whole(fg.Stiefel()))])
    grads, tx = jax.tree.map(jnp.cos, params), fg.spel(0.1, plan)

    def two_steps(tx, params):
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    found = two_steps(from_free_weights(tx, plan), params)
    assert fg.violation(found, plan)["w"] < 1e-6
    np.testing.assert_allclose(found["w"], two_steps(tx, fg.nearest(params, plan))["w"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 30}, "--width 30 cannot be shared out over 2 heads"),
        ({"optimizer": "adamw", "scheme": "heads"}, r"--optimizer adamw --scheme heads: .*free weights.*on-manifolds"),
        ({"optimizer": "spel", "scheme": "euc"}, "--optimizer spel --scheme euc"),
        ({"optimizer": "adamw", "scheme": "euc-heads"}, "--scheme euc-heads: only muon takes heads by themselves"),
        ({"optimizer": "muon", "tangent": "off"}, "only spel goes without the projection"),
        ({"optimizer": "muon", "start": "nearest"}, "no weight is constrained"),
        ({"steps": 0}, "--steps 0: give a whole number"),
        ({"lr": -1.0}, r"--lr -1.0: give a number above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(TINY, **changes).check()


@pytest.mark.slow
def test_the_default_training_resumes_bit_for_bit_in_another_process_and_learns(tmp_path, monkeypatch):
    """`kill -9` after a checkpoint: the same state, log and sample as an undisturbed run."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "fgsgd_jax.experiments", "train", "--task", "text", "--steps", "300"]
    command += ["--checkpoint-every", "20", "--run-dir"]
    began = time.monotonic()
    subprocess.run([*command, "straight"], check=True, capture_output=True)
    assert time.monotonic() - began < 300
    killed = subprocess.Popen([*command, "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed/checkpoints/[0-9]*")) and killed.poll() is None:
        time.sleep(0.1)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    # A run knows its task.
    resume = [sys.executable, "-m", "fgsgd_jax.experiments", "train", "--run-dir", "killed", "--resume"]
    subprocess.run([*resume, "--checkpoint-every", "20"], check=True, capture_output=True)
    logs, states, samples = [], [], []
    for name in ("straight", "killed"):
        folder = pathlib.Path(name)
        logs.append(log_without_times(folder))
        saved = ocp.StandardCheckpointer().restore(folder.absolute() / "checkpoints" / "300" / "state")
        states.append({path: np.asarray(leaf).tobytes() for path, leaf in saved.items()})
        samples.append((folder / "sample.txt").read_bytes())
    assert logs[0] == logs[1]
    assert states[0] == states[1]
    assert samples[0] == samples[1]
    assert logs[0][-1]["test"]["loss"] < 2.2
