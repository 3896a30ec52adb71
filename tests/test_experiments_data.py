"""Images come in from many places; what cannot be trained on is refused in words."""

import gzip
import os
import shutil
import struct
import typing

import numpy as np
import pytest

pytest.importorskip("datasets")
import datasets
import PIL.Image
from huggingface_hub.errors import RepositoryNotFoundError

from fgsgd_jax.experiments import UsageError, hold_out, limit, load


@pytest.fixture(autouse=True)
def no_cache_at_home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(shape, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def folder_of_classes(root, shapes, classes=("cat", "dog"), each=5):
    """One folder of images per class, as cameras and downloads leave them."""
    count = 0
    for name in classes:
        (root / name).mkdir(parents=True)
        for _ in range(each):
            picture(shapes[count % len(shapes)], count).save(root / name / f"{count}.png")
            count += 1
    return root


def parquet(path, columns, features):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))


def two_splits(root, label=None, labels=None, image="img", shape=(6, 6, 3)):
    """Parquet files as the hub has them."""
    label = label or datasets.ClassLabel(names=["a", "b"])
    for split, count in (("train", 8), ("test", 4)):
        values = (labels or (lambda n: [i % 2 for i in range(n)]))(count)
        images = [picture(shape, i) for i in range(count)]
        parquet(
            root / f"{split}-00000-of-00001.parquet",
            {image: images, "label": values},
            {image: datasets.Image(), "label": label},
        )
    return root


def test_digits_are_split_the_same_way_every_time():
    once, again = load("digits"), load("digits")
    assert once.train.images.shape == (1000, 8, 8, 1)
    assert once.test.images.shape == (797, 8, 8, 1)
    assert once.fingerprint() == again.fingerprint()
    assert once.train.images.dtype == np.uint8
    assert once.train.images.max() == 255
    both = np.concatenate([once.train.images, once.test.images]).reshape(1797, 64)
    # Two of the 1,797 are the same picture; a split that overlapped would have hundreds.
    assert len(np.unique(both, axis=0)) >= 1790


def test_parquet_keeps_pixels_labels_and_splits(tmp_path):
    data = load(str(two_splits(tmp_path / "set")))
    assert data.name == "set"
    assert data.classes == ("a", "b")
    assert data.train.images.shape == (8, 6, 6, 3)
    assert data.test.images.shape == (4, 6, 6, 3)
    np.testing.assert_array_equal(data.train.labels, [0, 1] * 4)
    np.testing.assert_array_equal(data.train.images[3], np.asarray(picture((6, 6, 3), 3)))


def test_folders_of_images_are_split_by_seed_and_class(tmp_path):
    data = load(str(folder_of_classes(tmp_path / "set", [(6, 6)])))
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (8, 6, 6, 1)
    assert sorted(data.test.labels) == [0, 1]
    again = load(str(tmp_path / "set"))
    np.testing.assert_array_equal(data.test.images, again.test.images)


def test_words_and_numbers_are_labels_too(tmp_path):
    words = two_splits(tmp_path / "words", datasets.Value("string"), lambda n: ["yes", "no"] * (n // 2))
    assert load(str(words)).classes == ("no", "yes")
    numbers = two_splits(tmp_path / "numbers", datasets.Value("int64"), lambda n: [9, 10] * (n // 2))
    data = load(str(numbers))
    assert data.classes == ("9", "10")
    np.testing.assert_array_equal(data.train.labels[:2], [0, 1])


def test_grey_beside_colour_becomes_colour_and_is_said(tmp_path):
    data = load(str(folder_of_classes(tmp_path / "set", [(6, 6), (6, 6, 3)])))
    assert data.channels == 3
    assert any("training images are grey among colour: all are taken as colour" in line for line in data.summary())
    # All grey in one split, and none in the other.
    split = tmp_path / "split"
    folder_of_classes(split / "train", [(6, 6, 3)])
    folder_of_classes(split / "test", [(6, 6)])
    data = load(str(split))
    assert data.summary() == [
        "split: 10 training and 10 test images, 6×6 colour, 2 classes",
        "the test images are grey, the others colour: all are taken as colour",
    ]


def test_what_is_held_out_is_said(tmp_path):
    data = load(str(folder_of_classes(tmp_path / "set", [(6, 6)])))
    assert data.summary() == [
        "set: 8 training and 2 test images, 6×6 grey, 2 classes",
        "no split to test on: 2 of the images, 20% of each class, are held out for it, the same in every run",
    ]
    assert load("digits").notes == ()
    assert "200 of the training images, held out" in load("digits", validation=0.2).summary()[1]


@pytest.mark.parametrize("names", [("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"), ("images", "labels")])  # fmt: skip
def test_arrays_of_numpy_are_images_too(names, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, 6, 6, 3), np.uint8), np.array([4, 7] * 5)
    values = (images, labels[:, None], images[:4], labels[:4])
    np.savez(tmp_path / "set.npz", **dict(zip(names, values, strict=False)))
    data = load(str(tmp_path / "set.npz"))
    assert data.classes == ("4", "7")
    if len(names) == 4:
        np.testing.assert_array_equal(data.train.images, images)
        np.testing.assert_array_equal(data.test.labels, [0, 1, 0, 1])
        assert not data.notes
    else:
        assert (len(data.train), len(data.test)) == (8, 2)
        assert "held out" in data.notes[0]
    assert load(str(tmp_path / "set.npz"), image_size=4, limit_train=2).train.images.shape == (2, 4, 4, 3)
    assert load(str(arrays(tmp_path, x_train=images[..., 0], y_train=labels)), image_size=4).channels == 1


@pytest.mark.parametrize("packed", [True, False])
def test_the_format_of_mnist_is_refused_with_the_lines_that_convert_it(packed, tmp_path, monkeypatch, refused):
    rng = np.random.default_rng(0)
    named = {"train": (rng.integers(0, 256, (8, 6, 5), np.uint8), rng.permutation(8) % 3)}
    named["t10k"] = (rng.integers(0, 256, (4, 6, 5), np.uint8), rng.permutation(4) % 3)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split, (images, labels) in named.items():
        for what, array in (("images", images), ("labels", labels.astype(np.uint8))):
            content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            name = f"{split}-{what}-idx{array.ndim}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    for given in (folder, next(folder.iterdir())):
        with pytest.raises(UsageError, match=r"IDX, the format of MNIST; .* --data .*images\.npz") as error:
            load(str(given))
    exec(error.value.program, {})
    data = load(str(folder / "images.npz"))
    for split, (images, labels) in zip((data.train, data.test), named.values(), strict=True):
        np.testing.assert_array_equal(split.images[..., 0], images)
        np.testing.assert_array_equal(split.labels, labels)


def test_what_became_of_a_file_of_the_same_name_and_time_is_noticed(tmp_path):
    root = two_splits(tmp_path / "set")
    before = load(str(root))
    times = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    shutil.rmtree(root)
    two_splits(root, labels=lambda n: [(i + 1) % 2 for i in range(n)])
    for path, time in times.items():
        os.utime(path, ns=(time, time))
    after = load(str(root))
    np.testing.assert_array_equal(after.train.labels, 1 - before.train.labels)
    # And nothing is left behind.
    assert not list((tmp_path / "cache").glob("fgsgd-*"))


def test_the_hub_is_asked_once_and_not_for_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    asked = []

    def ask(error):
        def dataset_info(self, name, timeout):
            asked.append((name, timeout))
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)

    def unreachable(*_, **__):
        pytest.fail("goes to the network")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    ask(RepositoryNotFoundError("404", response=Response()))
    with pytest.raises(UsageError, match=r"no such folder or file here \(did you mean 'photos'\?\), nor such a set"):
        load("photo")
    ask(ConnectionError("no network\nat all"))
    with pytest.raises(UsageError, match=r"cannot be asked for a set of that name \(no network\)$"):
        load("owner/photo")
    with pytest.raises(UsageError, match=r"no such folder or file here \(did you mean 'digits'\?\), and"):
        load("digit")
    assert asked == [("photo", 5), ("owner/photo", 5), ("digit", 5)]
    assert not datasets.config.HF_HUB_OFFLINE


class Response:
    """What the network client has of an answer."""

    headers: typing.ClassVar[dict[str, str]] = {}
    request = None


def test_image_size_cuts_and_scales(tmp_path):
    data = load(str(folder_of_classes(tmp_path / "set", [(6, 9), (12, 8)])), image_size=6)
    assert data.train.images.shape[1:] == (6, 6, 1)


def test_limits_are_balanced_and_the_same_for_everybody():
    data = load("digits", limit_train=200, limit_test=50)
    np.testing.assert_array_equal(np.bincount(data.train.labels), [20] * 10)
    np.testing.assert_array_equal(np.bincount(data.test.labels), [5] * 10)
    assert data.fingerprint() == load("digits", limit_train=200, limit_test=50).fingerprint()
    whole = load("digits").train
    assert len(limit(whole, 10**6)) == len(limit(whole, None)) == 1000


def test_held_out_images_are_training_images_and_no_longer_trained_on():
    data = load("digits")
    held = hold_out(data, 0.1, seed=3)
    assert (len(held.train), len(held.test)) == (900, 100)
    rows = lambda split: {image.tobytes() for image in split.images}  # noqa: E731
    assert rows(held.test) <= rows(data.train)
    assert not rows(held.test) & rows(held.train)
    other = hold_out(data, 0.1, seed=4)
    assert rows(other.test) != rows(held.test)
    assert len(load("digits", validation=0.2).test) == 200


def missing(root):
    return root / "nowhere"


def misspelled(root):
    (root / "photos").mkdir()
    return root / "photo"


def arrays(root, **named):
    np.savez(root / "set.npz", **named)
    return root / "set.npz"


def no_arrays(root):
    return arrays(root, pixels=np.zeros(3))


def fractions(root):
    return arrays(root, x_train=np.zeros((4, 6, 6)), y_train=np.arange(4) % 2)


def flat_arrays(root):
    return arrays(root, x_train=np.zeros((4, 36), np.uint8), y_train=np.arange(4) % 2)


def few_labels(root):
    return arrays(root, x_train=np.zeros((4, 6, 6), np.uint8), y_train=np.arange(3) % 2)


def damaged_arrays(root):
    (root / "set.npz").write_bytes(b"PK\3\4 no more")
    return root / "set.npz"


def arrays_of_objects(root):
    return arrays(root, x_train=np.array([{}, {}], object), y_train=np.arange(2))


def unnamed_labels(root):
    """Words that are labels, and words that are one of each image."""
    parquet(root / "train.parquet", {"img": [picture((6, 6), i) for i in range(6)], "kind": ["a", "b"] * 3,
        "file": [f"{i}.png" for i in range(6)], "weight": [0.5] * 6}, {"img": datasets.Image(),
        "kind": datasets.Value("string"), "file": datasets.Value("string"), "weight": datasets.Value("float32")
    })  # fmt: skip
    return root


def empty(root):
    return root


def a_file(root):
    (root / "file").write_text("no images")
    return root / "file"


def damaged_table(root):
    (root / "train.parquet").write_bytes(b"garbage")
    return root


def no_images(root):
    parquet(root / "train.parquet", {"text": ["a", "b"], "label": [0, 1]}, {
        "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])
    })  # fmt: skip
    return root


def unlabelled(root):
    for number in range(3):
        picture((6, 6), number).save(root / f"{number}.png")
    return root


def mixed_sizes(root):
    return folder_of_classes(root / "set", [(6, 6), (6, 7)])


def unreadable(root):
    folder_of_classes(root / "set", [(6, 6)])
    (root / "set" / "cat" / "0.png").write_bytes(b"\x89PNG no more")
    return root / "set"


def sixteen_bits(root):
    folder_of_classes(root / "set", [(6, 6)])
    PIL.Image.fromarray(np.zeros((6, 6), np.uint16)).save(root / "set" / "cat" / "0.png")
    return root / "set"


def one_class(root):
    return two_splits(root, labels=lambda n: [0] * n)


def too_few(root):
    return folder_of_classes(root / "set", [(6, 6)], each=1)


def unknown_class(root):
    return two_splits(root, datasets.Value("string"), lambda n: ["yes", "no"] * 4 if n == 8 else ["maybe"] * 4)


def numbers_for_labels(root):
    return two_splits(root, datasets.Value("float32"), lambda n: [0.5] * n)


def several_labels(root):
    classes = datasets.ClassLabel(names=["a", "b"])
    parquet(root / "train.parquet", {"img": [picture((6, 6))] * 10, "fine": [0, 1] * 5, "coarse": [1, 0] * 5}, {
        "img": datasets.Image(), "fine": classes, "coarse": classes
    })  # fmt: skip
    return root


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (missing, "does not exist"),
        (misspelled, r"does not exist \(did you mean 'photos'\?\)"),
        (empty, "cannot be read as a set of images"),
        (a_file, "give the folder"),
        (no_arrays, "holds pixels; its arrays should be called x_train and y_train"),
        (fractions, r"x_train holds float64; images are bytes .* \(255 \* x\)"),
        (flat_arrays, "x_train is 4×36; images are n × height × width"),
        (few_labels, "y_train has 3 labels for 4 images"),
        (damaged_arrays, "cannot be read"),
        (arrays_of_objects, "cannot be read: Object arrays cannot be loaded"),
        (damaged_table, "cannot be read as a set of images"),
        (no_images, "no column of images; its columns are text, label"),
        (unlabelled, "no label column: no other column has a class an image; .* or sort the images"),
        (unnamed_labels, r"no label column: name one by --label-column \(kind\), or sort"),
        (mixed_sizes, "mixed sizes .* 6×6, .* 6×7.*--image-size 6"),
        (unreadable, r"0\.png\) cannot be read"),
        (sixteen_bits, "mode I;16; convert"),
        (one_class, "one class only"),
        (too_few, "no test images; give more images"),
        (unknown_class, "'maybe', which is none of the 2 classes"),
        (numbers_for_labels, "such things as 0.5; no other column has a class an image"),
        (several_labels, "several label columns; choose by --label-column: fine, coarse"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_words(make, said, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UsageError, match=said) as refused:
        load(str(make(root)))
    assert "\n" not in str(refused.value)


def test_columns_can_be_named(tmp_path):
    several_labels(tmp_path)
    data = load(str(tmp_path), label_column="coarse", image_column="img", limit_train=4)
    assert data.classes == ("a", "b")
    with pytest.raises(UsageError, match=r"no column 'course'; did you mean 'coarse'\? --label-column: fine, coarse$"):
        load(str(tmp_path), label_column="course")
    with pytest.raises(UsageError, match="no image column 'fine'; --image-column: img"):
        load(str(tmp_path), image_column="fine")
