"""Any tree, any tool: docs/trees.md says what is found here. See tools/trees.py."""

import pytest
import trees

pytestmark = [pytest.mark.usefixtures("lenient_promotion"), pytest.mark.filterwarnings("ignore:.*:UserWarning:orbax")]


def run(case, *args):
    if case.refused is None:
        case.run(*args)
        return
    with pytest.raises((ValueError, TypeError), match=case.refused):
        case.run(*args)


@pytest.mark.parametrize("name", trees.TREES)
def test_a_tree(name):
    run(trees.TREES[name])


def usual(cases):
    """Every case with one optimizer, the slow ones with all three."""
    for number, name in enumerate(cases):
        for other, optimizer in enumerate(trees.OPTIMIZERS):
            marks = () if other == number % 3 else pytest.mark.slow
            yield pytest.param(name, optimizer, marks=marks, id=f"{name}-{optimizer}")


@pytest.mark.parametrize(("name", "optimizer"), list(usual(trees.WRAPPERS)))
def test_a_wrapper(name, optimizer):
    run(trees.WRAPPERS[name], optimizer)


@pytest.mark.parametrize("name", trees.PARTITION)
def test_parts(name):
    run(trees.PARTITION[name])


@pytest.mark.parametrize(("name", "optimizer"), list(usual(trees.SERIALIZERS)))
def test_a_way_out(name, optimizer):
    run(trees.SERIALIZERS[name], optimizer)


@pytest.mark.parametrize("name", trees.MODES)
def test_a_mode(name):
    run(trees.MODES[name])


def test_the_page_is_what_is_tried():
    assert trees.DOCUMENT.read_text() == trees.document()
