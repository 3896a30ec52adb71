"""Images come in from many places; what cannot be trained on is refused in words."""

import numpy as np
import pytest

pytest.importorskip("datasets")
import datasets
import PIL.Image

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


def test_grey_beside_colour_becomes_colour(tmp_path):
    data = load(str(folder_of_classes(tmp_path / "set", [(6, 6), (6, 6, 3)])))
    assert data.channels == 3


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
        (empty, "cannot be read as a set of images"),
        (a_file, "give the folder"),
        (damaged_table, "cannot be read as a set of images"),
        (no_images, "no column of images; its columns are text, label"),
        (unlabelled, "no label column"),
        (mixed_sizes, "mixed sizes .* 6×6, .* 6×7.*--image-size 6"),
        (unreadable, r"0\.png\) cannot be read"),
        (sixteen_bits, "mode I;16; convert"),
        (one_class, "one class only"),
        (too_few, "no test images; give more images"),
        (unknown_class, "'maybe', which is none of the 2 classes"),
        (numbers_for_labels, "such things as 0.5; name another by --label-column"),
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
    with pytest.raises(UsageError, match="no column 'colour'; --label-column: img, fine, coarse"):
        load(str(tmp_path), label_column="colour")
    with pytest.raises(UsageError, match="no image column 'fine'; --image-column: img"):
        load(str(tmp_path), image_column="fine")
