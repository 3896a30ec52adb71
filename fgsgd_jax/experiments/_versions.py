import platform
from importlib.metadata import PackageNotFoundError, version

import jax

PACKAGES = ("fgsgd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """What a run was made with: for its log."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
