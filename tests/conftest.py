"""Settings under which every test runs: stricter than a user's, so that what passes here passes there.

One thread to a process, where pytest-xdist already has a process to a core. OpenBLAS (NumPy, SciPy) collapses when
two processes spin on the same cores. Both variables must be set before the libraries load.
"""

import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NPROC", "1")  # the size of XLA's thread pool

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


@pytest.fixture(autouse=True)
def few_programs():
    """A compiled program takes some fifteen memory maps; where Linux gives no more, at 65,530, compiling crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


@pytest.fixture
def users_settings():
    """JAX's defaults instead of the strict ones, for tests of whole programs that third parties wrote parts of."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture
def lenient_promotion():
    """JAX's own promotion of dtypes, for tests that run through third parties' arithmetic (Optax's counters)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def users_promotion():
    """JAX's own promotion and precision for a module whose fixtures train, through Optax's counters too."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def refused(capsys):
    """Runs a command line that a user can mend; returns the one line on standard error with which it ends."""
    from fgsgd_jax.experiments.__main__ import main

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert "Traceback" not in out + err
        assert err.count("\n") == 1
        assert err.startswith("fgsgd: ")
        return err

    return run


def pytest_terminal_summary(terminalreporter):
    """The figures that tests put down by `record_property`: by file the sums, and the largest of what is the worst."""
    figures = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            of_file = figures.setdefault(report.nodeid.partition("::")[0], {})
            of_file[name] = (
                max(of_file.get(name, 0), value) if name.startswith("worst") else of_file.get(name, 0) + value
            )
    if figures:
        terminalreporter.section("figures")
        for file, found in sorted(figures.items()):
            terminalreporter.line(
                f"{file}: "
                + ", ".join(
                    f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value:,}"
                    for name, value in found.items()
                )
            )
