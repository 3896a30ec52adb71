"""Floor 3, grouping: which matrix of which tensor lives where. Knows nothing of gradients."""

from ._as_plan import Rules as Rules, as_plan as as_plan, as_rules as as_rules
from ._automatic import automatic as automatic
from ._buckets import Bucket as Bucket
from ._collection import Collection as Collection
from ._paths import array_leaves as array_leaves, by_path as by_path, from_paths as from_paths, unboxed as unboxed
from ._plan import Plan as Plan, plan as plan
from ._schemes import (
    PI as PI,
    PIO as PIO,
    PO as PO,
    Custom as Custom,
    Each as Each,
    Scheme as Scheme,
    Whole as Whole,
)
from ._stacks import (
    Stacks as Stacks,
    gammas as gammas,
    groups_of as groups_of,
    kinds_of as kinds_of,
    names_of as names_of,
)
from ._trace import Trace as Trace
from ._views import View as View
from ._weights import (
    Radii as Radii,
    check_scales as check_scales,
    checked_leaves as checked_leaves,
    initialize as initialize,
    is_scale as is_scale,
    nearest as nearest,
    violation as violation,
    with_radius as with_radius,
)
