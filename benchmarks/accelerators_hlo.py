"""What an optimized HLO module costs a device, read from its text: kernels launched, bytes they move, loops, branches.

Bytes are those of a kernel's operands and results, by shape (without a tile's padding); what of them is in the device's
main memory is counted apart, since a TPU's compiler keeps much in VMEM from one kernel to the next, S(1) in a layout,
and that depends on what else the program does. As in XLA's own cost analysis, an operand of which a fusion reads slices
alone counts as those slices, and a buffer that is updated in place as the update. What is computed inside a kernel
costs nothing here. A loop's body counts as often as it runs where that is known (as the compiler says, or its
condition: a count from zero to a constant), else once, and of the branches of a conditional the cheapest; but branches
and loops are counted wherever they are. Copies that are started and awaited are
no kernels: they count for main memory alone.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

# What launches nothing: names for values, and a scheduler's marks.
_NAMES = ["parameter", "constant", "tuple", "get-tuple-element", "bitcast"]
_MARKS = ["opt-barrier", "after-all", "add-dependency", "partition-id", "replica-id"]
_FREE = frozenset([*_NAMES, *_MARKS])
_FREE_CALLS = frozenset(["AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"])
_COLLECTIVES = frozenset(
    ["all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast"]
)
_PALLAS = frozenset(["tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2", "triton_kernel_call"])


@dataclasses.dataclass(frozen=True)
class Cost:
    """Totals over a module.

    `bytes` are those of kernels, `memory` those that main memory reads and writes. `cycles` are XLA's estimates for its
    own kernels on TPU: it has none for Pallas calls. `turn` are those of loops that last as long as the step decides,
    which `cycles` counts once. `gathered` are the bytes that all-gathers result in.
    """

    launches: int = 0
    bytes: int = 0
    memory: int = 0
    cycles: int = 0
    turn: int = 0
    pallas: int = 0
    branches: int = 0
    loops: int = 0
    gathered: int = 0
    collectives: tuple[str, ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, each.name) + getattr(other, each.name) for each in dataclasses.fields(self)))

    def __mul__(self, times: int) -> "Cost":
        return Cost(*(getattr(self, each.name) * times for each in dataclasses.fields(self)))


def cost(text: str) -> Cost:
    """The cost of the optimized module that `compiled.as_text()` prints."""
    module = _Module(text)
    return module.cost(module.entry)


def size(type_: str) -> Cost:
    """The bytes of an array or a tuple of arrays, by the text of its type."""
    total = Cost()
    for dtype, sizes, layout in _ARRAY.findall(type_):
        bits = re.search(r"\d+", dtype)
        count = int(bits[0]) if bits else 8 * (dtype == "pred")
        for each in sizes.split(","):
            count *= int(each.lstrip("<=")) if each else 1
        total += Cost(bytes=count // 8, memory=0 if "S(1)" in layout else count // 8)
    return total


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    arguments: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    @functools.cached_property
    def size(self) -> Cost:
        return size(self.type)

    @property
    def target(self) -> str:
        found = _TARGET.search(self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> Iterator[str]:
        yield from _CALLED.findall(self.rest)
        for group in _BRANCHES.findall(self.rest):
            yield from _NAME.findall(group)


Computation = dict[str, _Instruction]


class _Module:
    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if current is None:
                found = _COMPUTATION.match(line)
                if found and not line.startswith("HloModule"):
                    current = self.computations.setdefault(found[2], {})
                    self.entry = found[2] if found[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif found := _INSTRUCTION.match(line):
                current[found[2]] = _Instruction(found[2], found[3], found[4], *_split(found[5]), bool(found[1]))
        self.cost = functools.cache(self._cost)

    def _cost(self, computation: str) -> Cost:
        own = self.computations[computation]
        return sum((self._of(each, own) for each in own.values()), Cost())

    def _of(self, each: _Instruction, own: Computation) -> Cost:
        parts = [self.cost(name) for name in each.called] if each.op in _NESTED else []
        inner = sum(parts, Cost())
        kind = each.op.removesuffix("-start")
        if each.op == "while":
            trips = self._trips(each)
            once = dataclasses.replace(inner, turn=inner.cycles)
            return Cost(loops=1) + (once if trips is None else inner * trips)
        if each.op == "conditional":
            cheapest = min(parts, key=lambda part: part.bytes)
            return dataclasses.replace(cheapest, branches=1 + inner.branches, loops=inner.loops)
        if each.op in _NESTED:
            return inner
        if each.op in _FREE or each.target in _FREE_CALLS or each.op.endswith("-update"):
            return Cost()
        if each.op.endswith("-done"):
            # What it was started with is counted there, and the result here.
            return Cost(memory=each.size.memory)
        moved = self._moved(each, own)
        if kind in _COLLECTIVES:
            gathered = each.size.bytes if kind == "all-gather" else 0
            return Cost(collectives=(kind,), gathered=gathered) + moved
        if each.op.endswith("-start"):
            return Cost(memory=moved.memory)
        cycles = _CYCLES.search(each.rest)
        return Cost(1, cycles=int(cycles[1]) if cycles else 0, pallas=each.target in _PALLAS) + moved

    def _trips(self, loop: _Instruction) -> int | None:
        """How often a loop runs, None if the step decides. A TPU's compiler does not say it."""
        if found := _TRIPS.search(loop.rest):
            return int(found[1])
        condition = self.computations[_CONDITION.search(loop.rest)[1]]
        (root,) = (each for each in condition.values() if each.root)
        limit = condition[root.operands[-1]] if root.op == "compare" and "direction=LT" in root.rest else root
        return int(limit.arguments) if limit.op == "constant" and limit.type.startswith("s32[]") else None

    def _moved(self, each: _Instruction, own: Computation) -> Cost:
        operands = [own[name].size for name in each.operands]
        if each.op == "fusion":
            return self._moved_by_fusion(self.computations[next(each.called)], each, operands)
        if each.op == "slice-start":
            # What is read is as large as the result, which is the second part of the type.
            return _read_as(operands[0], each.size.bytes - operands[0].bytes)
        if each.op.endswith("-start"):
            return sum(operands, Cost())
        if each.op in ("slice", "dynamic-slice", "gather"):
            return _read_as(operands[0], each.size.bytes) + each.size
        if each.op == "dynamic-update-slice":
            return operands[1] + _read_as(each.size, operands[1].bytes)
        return sum(operands, each.size)

    def _moved_by_fusion(self, inner: Computation, outer: _Instruction, operands: list[Cost]) -> Cost:
        users: dict[str, list[tuple[_Instruction, int]]] = {}
        for each in inner.values():
            for place, name in enumerate(each.operands):
                users.setdefault(name, []).append((each, place))

        def read(name: str) -> int | None:
            """The bytes read of a value; None if all of it."""
            parts = []
            for user, place in users.get(name, ()):
                if user.op == "bitcast":
                    parts.append(read(user.name))
                elif user.op in ("slice", "dynamic-slice") and place == 0:
                    parts.append(user.size.bytes)
                elif user.op == "dynamic-update-slice" and place == 0 and updates_in_place(user):
                    parts.append(0)
                else:
                    return None
            return None if None in parts else sum(parts)

        def updates_in_place(each: _Instruction) -> bool:
            return each.root or all(user.root or user.op == "bitcast" for user, _ in users.get(each.name, ()))

        def written(each: _Instruction) -> int:
            if each.op == "tuple":
                return sum(written(inner[name]) for name in each.operands)
            if each.op == "bitcast":
                return written(inner[each.operands[0]])
            if each.op == "dynamic-update-slice":
                each = inner[each.operands[1]]
            return each.size.bytes

        moved = Cost()
        for each in inner.values():
            if each.op == "parameter":
                whole = operands[int(each.arguments)]
                part = read(each.name)
                moved += whole if part is None else _read_as(whole, part)
            if each.root:
                moved += _read_as(outer.size, written(each))
        return moved


_NESTED = frozenset(["while", "conditional", "call", "async-start"])


def _read_as(whole: Cost, part: int) -> Cost:
    """So many bytes of an array, wherever it lies; of a tuple that lies in both memories, each its share."""
    share = min(part / whole.bytes, 1) if whole.bytes else 0
    return Cost(bytes=round(share * whole.bytes), memory=round(share * whole.memory))


def _split(rest: str) -> tuple[str, str]:
    """Up to the parenthesis that closes the operands, and what follows."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""
