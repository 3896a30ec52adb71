"""Whatever a file or a pattern holds: what was meant, or an error in the library's own words. Never another thing."""

import collections
import copy
import json
import random
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg
from fgsgd_jax.groups._views import View


def damaged(draw, whole):
    """Bytes with something wrong with them: cut short, flipped, lost, doubled or written over at a random place."""
    place, length = draw.randrange(len(whole)), draw.choice([1, 1, 2, 5, 40])
    middle = {
        "cut": lambda: b"",
        "flip": lambda: bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :],
        "lose": lambda: whole[place + length :],
        "double": lambda: whole[place : place + length] * 2 + whole[place + length :],
        "overwrite": lambda: draw.randbytes(length) + whole[place + length :],
        "exchange": lambda: whole[place : place + length][::-1] + whole[place + length :],
    }
    how = draw.choice(sorted(middle))
    return how, whole[:place] + middle[how]()


def refusal(error, function, *arguments, **options):
    """What `function` gives, and what it says if it refuses with an error of this class."""
    try:
        return function(*arguments, **options), None
    except error as found:
        return None, str(found)


# --- plans


@pytest.fixture(scope="module")
def plan():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 4, 6)), "bias": jnp.zeros(6)},
        "tiles": jnp.zeros((8, 12)),
        "stem": jnp.zeros((3, 3, 1, 4)),
    }
    rules = [
        ("kernel", fg.PIO([fg.Sphere(radius=0.3), fg.Stiefel(retraction="qr"), fg.Euclidean()])),
        ("tiles", fg.Each(fg.Oblique(), view="(i a) (o b) -> i o a b", a=4, b=4)),
        ("stem", fg.Whole(fg.Sphere(radius=jnp.linspace(0.1, 1, 4).reshape(1, 4)))),
        ("*", None),
    ]
    return fg.plan(params, rules, seed=3)


def test_a_damaged_plan_is_refused(plan, record_property):
    draw, whole, refused = random.Random(0), plan.to_json().encode(), 0
    tried = [damaged(draw, whole) for _ in range(3000)]
    tried = [(how, bad) for how, bad in tried if bad != whole]
    for how, bad in tried:
        read, said = refusal(ValueError, fg.Plan.from_json, bad.decode(errors="surrogateescape"))
        # Blanks between JSON's tokens carry nothing.
        assert said or read == plan, how
        refused += said is not None
    assert refused > 0.95 * len(tried) > 2000
    record_property("inputs tried", len(tried))


ODD = [None, -1, 0, 1, 2**70, 1e308, "", "Sphere", "AAAA", [], [[1]], {"a": 1}]


def places(node, path=()):
    """Every place in a JSON document."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def test_a_plan_of_another_making_is_refused_or_whole(plan, record_property):
    """Also where the checksum is right: a document that anybody may have written."""
    from fgsgd_jax.groups._json import digest

    document, read, tried = json.loads(plan.to_json()), 0, 0
    for path in places(document):
        for odd in ODD if len(path) > 1 else ():
            changed = copy.deepcopy(document)
            *above, last = path
            node = changed
            for key in above:
                node = node[key]
            node[last] = odd
            changed["sha256"] = digest({key: changed[key] for key in ("seed", "order", "parameters")})
            tried += 1
            try:
                found = fg.Plan.from_json(json.dumps(changed))
            except ValueError:
                continue
            # What was read says what was written.
            read += 1
            again = json.loads(found.to_json())
            assert again["parameters"].keys() == changed["parameters"].keys()
            str(found)
            assert found.difference(found) is None
    assert tried > 500
    assert read < tried / 4
    record_property("inputs tried", tried)


def test_a_plan_that_would_inflate_is_refused(plan):
    import base64
    import zlib

    from fgsgd_jax.groups._json import digest

    document = json.loads(plan.to_json())
    bomb = base64.b64encode(zlib.compress(bytes(2**26), 1)).decode()
    document["parameters"]["conv/kernel"]["collection"]["member"] = bomb
    document["sha256"] = digest({key: document[key] for key in ("seed", "order", "parameters")})
    text = json.dumps(document)
    tracemalloc.start()
    with pytest.raises(ValueError):
        fg.Plan.from_json(text)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


# --- patterns


def test_any_view_is_a_bijection_or_an_error_in_words(record_property):
    draw, kinds = random.Random(1), collections.Counter()
    tokens = ["i", "o", "h", "w", "a", "b", "1", "2", "(", ")", "->", " ", "...", "é", "_", "h w", "i o", "(i a)", ">"]
    usual = ["h w i o -> i o h w", "h w i o -> 1 o (h w i) 1", "i o -> 1 1 i o", "(i a) (o b) -> i o a b"]
    for number in range(4000):
        shape = tuple(draw.choice([1, 2, 4, 6]) for _ in range(draw.randrange(6)))
        sizes = {name: draw.choice([-2, 0, 1, 2, 3]) for name in "abio" if draw.random() < 0.2}
        if number % 2:
            pattern = " ".join(draw.choice(tokens) for _ in range(draw.randrange(12)))
        else:
            # A good pattern with one token or two changed, or none: what a slip of the hand leaves.
            pattern = draw.choice(usual)
            words = re.findall(r"->|\w+|[()]", pattern)
            shape = (draw.choice([2, 4, 6]),) * (4 if "h" in words else 2)
            sizes |= {"a": draw.choice([0, 1, 2, 4]), "b": 2} if "a" in words else {}
            for _ in range(draw.randrange(3)):
                words[draw.randrange(len(words))] = draw.choice(tokens)
            pattern = " ".join(words)
        view, said = refusal(ValueError, View.of, pattern, shape, **sizes)
        kinds["taken" if said is None else "refused"] += 1
        if view is None:
            assert said.startswith("view "), pattern
            continue
        if kinds["taken"] > 150:
            continue  # each shape is compiled
        tensor = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
        grid = view.split(tensor)
        assert grid.shape == view.grid, pattern
        np.testing.assert_array_equal(view.merge(grid), tensor)
    assert min(kinds["refused"], kinds["taken"]) > 100, kinds
    record_property("inputs tried", 4000)


def test_any_glob_finds_suffixes_of_whole_components_or_nothing(record_property):
    draw, found = random.Random(2), 0
    names = ["conv", "conv_1", "Block_0", "kernel", "bias", "[x]", "a*b"]
    tokens = [*names, "*", "?", "[", "]", "[!", "[c-a]", "[a-z]", "/", "//", "\\", "_", ".", "^", "$", "("]
    leaves = {name: {"kernel": jnp.zeros((2, 2)), name: jnp.zeros(2)} for name in names}
    tree = {"Block_0": leaves, "top": jnp.zeros(1)}
    paths = list(fg.plan(tree, [("*", None)]))
    for number in range(1500):
        if number % 3:
            pattern = "".join(draw.choice(tokens) for _ in range(draw.randrange(7)))
        else:
            # A path with some of its characters made wild.
            pattern = "".join("?" if draw.random() < 0.2 else c for c in draw.choice(paths) if draw.random() < 0.95)
        # A leaf that it finds does not take that view, whatever it is.
        rules = [(pattern, fg.Whole(fg.Euclidean(), view="... -> 1")), ("*", None)]
        plan, said = refusal(ValueError, fg.plan, tree, rules)
        assert plan is None, pattern
        nothing = f"the pattern {pattern!r} matches no parameter" in said
        assert nothing or said.startswith(tuple(f"{path} (shape" for path in paths)), pattern
        found += not nothing
    assert 100 < found < 1400
    record_property("inputs tried", 1500)


def test_a_glob_of_many_stars_comes_to_an_end():
    tree = {"a" * 200: jnp.zeros(1)}
    with pytest.raises(ValueError, match="matches no parameter"):
        fg.plan(tree, [("*a" * 40 + "b", None), ("*", None)])


# --- logs, checkpoints, images


@pytest.fixture(scope="module")
def experiments():
    for package in ("tyro", "orbax.checkpoint", "datasets", "PIL.Image"):
        pytest.importorskip(package)
    import fgsgd_jax.experiments

    return fgsgd_jax.experiments


def test_a_damaged_log_is_read_or_refused_in_words(experiments, tmp_path, record_property):
    from fgsgd_jax.experiments._picture import draw as draw_picture
    from fgsgd_jax.experiments._run import refuse_other_options

    config = experiments.TrainConfig(epochs=3)
    log = experiments.MetricsLog(tmp_path / "metrics.jsonl")
    figures = {"loss": 1.5, "error": 20.0}
    log.create({"config": config.to_dict(), "data": {"train": {"crc32": 1}}, "versions": {}})
    for epoch in (1, 2, 3):
        norms = {"conv_0/kernel": 1.0, "head/kernel": 2.0}
        log.append({"epoch": epoch, "step": 4 * epoch, "lr": 0.1, "train": figures, "test": figures, "norms": norms})
    whole, draw, refused, drawn = log.path.read_bytes(), random.Random(3), 0, 0
    for _ in range(600):
        _, bad = damaged(draw, whole)
        log.path.write_bytes(bad)
        _, said = refusal(experiments.UsageError, refuse_other_options, tmp_path, config)
        found, said_too = refusal(experiments.UsageError, log.read)
        if said or said_too:
            refused += 1
            continue
        # Taken as this run's: its options are.
        header, records = found
        assert experiments.TrainConfig.from_dict(header["config"]) == config
        assert all(isinstance(record["step"], int) for record in records)
        if drawn < 3 and records:
            drawn += 1
            draw_picture({"run": records}, tmp_path / "picture.png")
    assert refused > 200
    record_property("inputs tried", 600)


@pytest.mark.slow
# Of what orbax had begun to read when it met the damage.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_whole_or_refused_in_words(experiments, tmp_path, capfd, record_property):
    from trainings import bits

    from fgsgd_jax.experiments._checkpoints import Checkpoints
    from fgsgd_jax.experiments._state import Totals, TrainState

    rng = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(rng.standard_normal((3, 3, 4, 6)), jnp.float32),
        "half": jnp.asarray(rng.standard_normal(50), jnp.bfloat16),
    }
    plan = fg.plan(params, [("kernel", fg.PO([fg.Sphere(), fg.Stiefel()])), ("*", None)])
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    totals = Totals(jnp.int32(1), jnp.int32(2), jnp.float32(3), {})
    known = {"step": jnp.int32(3), "seed": jnp.uint32(0), "params": params, "stats": {}, "totals": totals}
    known["opt_state"] = tx.init(params)
    state = TrainState(**dict.fromkeys(TrainState._fields, jnp.float32(0)) | known)
    about = {"config": experiments.TrainConfig().to_dict(), "plan": plan.to_json()}
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, about)
    checkpoints.close()
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    draw, kinds = random.Random(4), collections.Counter()
    # As often as its share of the files and of the bytes, half and half.
    places = [file for file in files for _ in range(3)] + [max(files, key=lambda file: len(files[file]))] * len(files)
    for _ in range(150):
        file = draw.choice(places)
        if not files[file]:
            continue
        how, bad = damaged(draw, files[file])
        if draw.random() < 0.1:
            file.unlink()
            how = "removed"
        else:
            file.write_bytes(bad)

        def read():
            checkpoints = Checkpoints(folder)
            try:
                step = checkpoints.latest()
                return step and (checkpoints.about(step), bits(checkpoints.restore(step, state)))
            finally:
                checkpoints.close()

        found, said = refusal(experiments.UsageError, read)
        assert said is None or re.search(r"checkpoint.* cannot be read .*remove", said)
        assert found is None or found == (about, bits(state)), f"{how} of {file}"
        # Without a metadata file a step may be no checkpoint, as far as anybody can tell.
        kinds["refused" if said else "not there" if found is None else "whole"] += 1
        for other, content in files.items():
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(content)
    assert "Traceback" not in capfd.readouterr().err
    assert kinds["refused"] > 30, kinds
    record_property("inputs tried", sum(kinds.values()))


@pytest.mark.slow
# The library that reads the folder leaves damaged files of its own open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_folder_of_images_is_read_or_refused_in_words(experiments, tmp_path, monkeypatch, record_property):
    import datasets
    import PIL.Image

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw, kinds, rng = random.Random(5), collections.Counter(), np.random.default_rng(0)
    for number in range(40):
        root = tmp_path / f"set {number}"
        for label in ("cat", "dog"):
            (root / label).mkdir(parents=True)
            for count in range(4):
                image = PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
                image.save(root / label / f"{count}.{draw.choice(['png', 'jpg', 'bmp'])}")
        file = draw.choice(sorted((root / "cat").iterdir()))
        match number % 4:
            case 0 | 1:
                file.write_bytes(damaged(draw, file.read_bytes())[1])
            case 2:
                file.write_bytes(draw.choice([b"", b"\0", b"<html>", draw.randbytes(60), b"GIF89a\xff\xff\xff\xff"]))
            case 3:
                (root / draw.choice(["notes.txt", "metadata.csv", "metadata.jsonl", "cat/x.json"])).write_bytes(
                    draw.choice([b"", b"{", b"file_name,label\nnone.png,1\n", draw.randbytes(30)])
                )
        try:
            data = experiments.load(str(root))
        except experiments.UsageError:
            kinds["refused"] += 1
        else:
            kinds["read"] += 1
            assert data.train.images.dtype == np.uint8
            assert len(data.train) + len(data.test) in (7, 8)
            assert data.classes == ("cat", "dog")
    assert min(kinds["refused"], kinds["read"]) >= 3, kinds
    record_property("inputs tried", 40)
