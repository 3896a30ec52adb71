"""The tests that Optax holds contributed optimizers to (optax/contrib/_common_test.py), as they stand, over ours.

They look for the free minimum of functions of vectors and matrices, so every leaf is a Euclidean matrix: it has groups,
ζ and a state like any other, and no manifold in the way.
"""

import ast
import importlib.util
import pathlib
import types

import optax
import pytest

import fgsgd_jax as fg

pytestmark = pytest.mark.slow

VIEWS = {1: "o -> 1 1 o 1", 2: "matrix", 3: "a b c -> 1 1 (a b) c"}
SCHEMES = {ndim: fg.Whole(fg.Euclidean(), view=view) for ndim, view in VIEWS.items()}


def on_all_leaves(make):
    """`make` of the plan of the parameters, whatever they are, as Optax's own optimizers take any."""
    plans = []

    def of(params):
        leaves = fg.groups.by_path(params)
        if leaves:
            plans.append(fg.plan(params, [(path, SCHEMES[leaf.ndim]) for path, leaf in leaves.items()]))
        # Asked for the structure of a state, without parameters, it is that of the last.
        return make(plans[-1])

    def update(updates, state, params, **extra):
        return of(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: of(params).init(params), update)


def fgsgd(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return on_all_leaves(lambda plan: fg.fgsgd(learning_rate, plan, momentum))


def sgd_on_manifolds(learning_rate: optax.ScalarOrSchedule):
    return on_all_leaves(lambda plan: fg.on_manifolds(optax.sgd(learning_rate), plan))


def adamw_on_manifolds(learning_rate: optax.ScalarOrSchedule):
    return on_all_leaves(lambda plan: fg.on_manifolds(optax.adamw(learning_rate), plan))


def riemannian_adam(learning_rate: optax.ScalarOrSchedule):
    return on_all_leaves(lambda plan: fg.riemannian_adam(learning_rate, plan))


OURS = {
    **{make.__name__: (make, {"learning_rate": 1e-2}) for make in (fgsgd, adamw_on_manifolds, riemannian_adam)},
    "fgsgd with momentum": (fgsgd, {"learning_rate": 1e-3, "momentum": 0.9}),
    "sgd_on_manifolds": (sgd_on_manifolds, {"learning_rate": 1e-3}),
}


def common():
    """Optax's module with our optimizers in the place of its own, before its tests are made for each of them."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    if spec is None or spec.origin is None:
        pytest.skip("this Optax comes without its tests", allow_module_level=True)
    tree = ast.parse(pathlib.Path(spec.origin).read_text(), spec.origin)
    (place,) = (n for n, node in enumerate(tree.body) if isinstance(node, ast.ClassDef))
    found = types.ModuleType("optax_common")

    def run(body):
        exec(compile(ast.Module(body, []), spec.origin, "exec"), vars(found))

    run(tree.body[:place])
    cases = tuple(
        {"opt_name": name, "opt_kwargs": options, "wrapper_name": None, "wrapper_kwargs": None}
        for name, (_, options) in OURS.items()
    )
    found._MAIN_OPTIMIZERS_UNDER_TEST = found._ALL_OPTIMIZERS_UNDER_TEST = cases
    found._get_opt_factory = lambda name: OURS[name][0]
    run(tree.body[place : place + 1])
    return found


@pytest.mark.usefixtures("lenient_promotion")
class TestCommon(common().ContribTest):
    """By the names of Optax's tests."""
