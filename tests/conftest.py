"""Settings under which every test runs: stricter than a user's, so that what passes here passes there.

OpenBLAS (NumPy, SciPy) spins one thread per core and collapses when a second process wants the same cores, as
under pytest-xdist; one thread is faster for the matrices here. It has to be set before NumPy loads.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

# Both dtypes are testable in one process, and a silent promotion or broadcast is an error.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

pytest.register_assert_rewrite("helpers", "reference")

# Annotations are checked at run time. This must come before the package's first import.
install_import_hook("fgsgd_jax", "helpers.typechecked")


@pytest.fixture
def users_settings():
    """JAX's defaults instead of the strict ones, for tests of whole programs that third parties wrote parts of."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
