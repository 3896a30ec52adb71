from pathlib import Path

from ._digits import load_digits
from ._idx import refuse_idx
from ._images import ImageSet, check
from ._subset import hold_out, limit


def load(
    name: str = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: float = 0.0,
) -> ImageSet:
    """Load an image classification set into memory.

    Args:
        name: `digits`, a local folder, a `.npz` file, or a name on the Hugging Face hub (`owner/set` or
            `owner/set:config`).
        image_column: the column that holds the images; found by its type where left out.
        label_column: the column that holds the labels; found by its type where left out.
        image_size: cut and scale every image to this height and width.
        limit_train: keep at most so many training images, class-balanced, the same ones in every run.
        limit_test: the same for the test images.
        validation: hold out this share of the (limited) training images and give them in place of the test images.

    Returns:
        The set, with images of one size as unsigned bytes.

    Raises:
        UsageError: the data cannot be found, read or trained on.
    """
    if name == "digits":
        data = load_digits()
        data = ImageSet(data.name, limit(data.train, limit_train), limit(data.test, limit_test), data.classes)
    else:
        path = Path(name).expanduser()
        if path.exists():
            refuse_idx(path, name)
        if path.is_file() and path.suffix == ".npz":
            from ._arrays import load_arrays

            data = load_arrays(path, name, image_size, limit_train, limit_test)
        else:
            from ._hub import load_hub

            data = load_hub(name, image_column, label_column, image_size, limit_train, limit_test)
    return check(hold_out(data, validation) if validation else data)
