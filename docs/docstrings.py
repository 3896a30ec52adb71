"""For the site: the docstrings' heading `Example:` (Optax's) as the `Examples:` that griffe shows as a session."""

import re
from typing import Any

import griffe


class ExampleHeading(griffe.Extension):
    """Renames the heading in every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object once it was read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
