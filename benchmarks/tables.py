"""The tables, from the JSON that `bench.py` wrote; and the texts that contain them, brought up to date.

A text names a table by a line `<!-- TABLE FOLDER -->`, with the folder of the results, and ends it by `<!-- end -->`.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = (ROOT / "README.md", ROOT / "docs" / "cost.md", ROOT / "benchmarks" / "README.md")

# What a peer may be off by and still count as feasible; of us 1e-6 is wanted.
FEASIBLE = 1e-5
FLOORS = ("copy", "products")

Rows = list[dict[str, Any]]


class Results:
    """What there is of each part in a folder; no rows of a part that was not run."""

    def __init__(self, folder: Path):
        self.parts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}

    @property
    def repeated(self) -> "Results":
        """With the times of programs that ran once more at once, and no other times."""

        def row(each: dict[str, Any]) -> dict[str, Any]:
            kept = {
                key: value for key, value in each.items() if "over" not in key and key not in ("median", "of a step")
            }
            return kept | each.get("repeated", {})

        results = copy.copy(self)
        results.parts = {part: found | {"rows": [*map(row, found["rows"])]} for part, found in self.parts.items()}
        return results

    def rows(self, part: str, **wanted: Any) -> Rows:
        rows = self.parts.get(part, {}).get("rows", [])
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    def value(self, part: str, case: str, name: str, key: str) -> float | None:
        return next((row.get(key) for row in self.rows(part, case=case, name=name)), None)

    def fastest(self, case: str) -> dict[str, Any] | None:
        """The fastest of the others that stays on the manifold."""
        peers = [
            row
            for row in self.rows("kernels", case=case)
            if row["name"] not in ("fgsgd_jax", *FLOORS) and row["violation"] <= FEASIBLE and "over ours" in row
        ]
        return min(peers, key=lambda row: row["over ours"], default=None)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without a power of ten."""
    if value is None:
        return "—"
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}" if value else "0"
    plain = f"{value:.{digits}g}"
    return f"{float(plain):,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{float(plain):g}"


def cases(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def ratios(results: Results) -> str:
    """Ours beside the fastest feasible peer and the floor, by shape: with a cold cache, and with a warm one."""
    lines = []

    def together(values: list[float | None], digits: int = 2) -> str:
        return " · ".join(number(value, digits) for value in values if value is not None) or "—"

    for case in cases(results.rows("kernels", name="fgsgd_jax")):
        both = (results, results.repeated)
        times = [each.value("kernels", case, "fgsgd_jax", "median") for each in both]
        peers = [peer for each in both if (peer := each.fastest(case))]
        names = ", ".join(dict.fromkeys(peer["name"] for peer in peers))
        floors = [[each.value("kernels", case, floor, "over ours") for each in both] for floor in FLOORS]
        lines.append(
            [
                case,
                together([time and 1e3 * time for time in times], 3),
                f"{together([peer['over ours'] for peer in peers])} × ({names})" if peers else "—",
                *(together([over and 1 / over for over in floor]) for floor in floors),
                f"{results.value('kernels', case, 'fgsgd_jax', 'violation'):.0e}",
            ]
        )
    header = ["cold cache · warm cache", "ours, ms", "fastest feasible peer takes", "ours / copy", "ours / products"]
    return markdown([*header, "violation"], lines)


def cost(results: Results) -> str:
    """What the update takes of a training step, and beside Optax's: the few figures that a reader asks for first."""
    lines, versions = [], {row["versions"]["fgsgd-jax"] for row in results.rows("updates")}
    for case in ("ResNet-20", "ResNet-110", "ResNet-50", "GPT-2 small"):
        for row in (row for row in results.rows("updates", case=case) if row["name"].startswith("fgsgd, ")):
            share = results.value("steps", row["case"], "update alone", "of a step")
            lines.append(
                [
                    f"{row['case']}, {row['name'].removeprefix('fgsgd, ')}",
                    "—" if share is None else f"{number(100 * share, 2)} %",
                    *(f"{number(row[key], 2)} ×" for key in ("over sgd", "over muon")),
                    number(row["compile"], 2),
                ]
            )
    first = f"network, constraint (version {', '.join(sorted(versions))})"
    header = [first, "of a training step", "update, optax.sgd = 1", "optax.contrib.muon = 1", "compiles in, s"]
    return markdown(header, lines)


def kernels(results: Results) -> str:
    """Milliseconds of every library, and the worst violation."""
    rows = results.rows("kernels")
    columns, lines = cases(rows), []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["case"]: row for row in rows if row["name"] == name}
        used = next(iter(own.values()))["versions"]
        version = next((f" {used[package]}" for package in used if package == name), "")
        worst = [(row["violation"], row["steps"]) for row in own.values() if "violation" in row]
        times = [number(1e3 * own[case]["median"]) if case in own else "—" for case in columns]
        counts = sorted({steps for _, steps in worst})
        count = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else "".join(map(str, counts))
        lines.append([name + version, *times, f"{max(worst)[0]:.0e} ({count})" if worst else "—"])
    return markdown(["ms, median", *columns, "worst violation (after steps)"], lines)


def updates(results: Results) -> str:
    lines = [
        [
            f"{row['case']}: {row['name']}",
            number(1e3 * row["median"]),
            number(row["over sgd"], 2),
            number(row.get("repeated", {}).get("over sgd"), 2),
            number(row["over muon"], 2),
            number(row.get("compile"), 2),
            f"{row['violation']:.0e} ({row['steps']})" if "violation" in row else "—",
        ]
        for row in results.rows("updates")
    ]
    return markdown(
        ["update", "ms", "× sgd, cold", "× sgd, warm", "× muon", "compile, s", "violation (after steps)"], lines
    )


def memory(results: Results) -> str:
    lines = []
    for row in results.rows("updates"):
        sgd = next((each for each in results.rows("updates", case=row["case"], name="optax.sgd")), {})
        if "temporary" not in row:
            continue
        state, temporary = (row[key] - sgd[key] for key in ("state", "temporary"))
        size = row["weights"]
        lines.append(
            [f"{row['case']}: {row['name']}"]
            + [f"{row[key] / 2**20:.1f}" for key in ("weights", "state", "temporary")]
            + [f"{state / size:+.2f}", f"{temporary / size:+.2f}"]
        )
    header = [
        "MiB",
        "weights",
        "state",
        "temporary",
        "state above sgd, of the weights",
        "temporary above sgd, of the weights",
    ]
    return markdown(header, lines)


def steps(results: Results) -> str:
    lines = [
        [
            f"{row['case']}: {row['name']}",
            number(1e3 * row["median"]),
            number(row["over sgd"]),
            number(100 * row["of a step"]),
        ]
        for row in results.rows("steps")
    ]
    return markdown(["training step, batch 128", "ms", "× sgd's step", "% of FG-SGD's step"], lines)


def growth(results: Results) -> str:
    lines = []
    for row in results.rows("growth"):
        over = row.get("over sgd", row.get("over products"))
        compared = f"{number(over, 2)} × {'sgd' if 'over sgd' in row else 'products'}"
        program = f"{row['program'] / 1000:,.0f}" if "program" in row else "—"
        lines.append(
            [
                f"{row['case']}: {row['name']}",
                number(1e3 * row["median"]),
                compared,
                number(row.get("compile"), 2),
                program,
            ]
        )
    return markdown(["growth", "ms", "against", "compile, s", "program, thousand characters"], lines)


@dataclass(frozen=True)
class Target:
    what: str
    # The most or, of something to exceed, the least that meets it.
    limit: float
    at_least: bool
    found: Callable[[Results], float | None]

    def line(self, results: Results) -> list[str]:
        wanted = f"{'≥' if self.at_least else '≤'} {number(self.limit)}"
        return [self.what, wanted, *self._judged(results), *self._judged(results.repeated)]

    def _judged(self, results: Results) -> tuple[str, str]:
        found = self.found(results)
        if found is None:
            return "—", "not measured"
        met = found >= self.limit if self.at_least else found <= self.limit
        distance = self.limit / found if self.at_least else found / self.limit
        return number(found, 2), "met" if met else f"missed by a factor of {number(distance, 3)}"


def _floor(case: str, floor: str) -> Callable[[Results], float | None]:
    def found(results):
        over = results.value("kernels", case, floor, "over ours")
        return 1 / over if over else None

    return found


def _peer(case: str) -> Callable[[Results], float | None]:
    return lambda results: (results.fastest(case) or {}).get("over ours")


def _growing(results: Results) -> float | None:
    """Compile time from the fewest to the most layers, as a share of the growth of the layers."""
    rows = results.rows("growth", axis="layers", name="fgsgd")
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    return (last["compile"] / first["compile"]) / (last["count"] / first["count"])


def _geoopt(results: Results) -> float | None:
    row = next(iter(results.rows("updates", case="ResNet-110", name=PIO)), {})
    return min((value for key, value in row.items() if key.startswith("geoopt")), default=None)


def _worst(results: Results) -> float | None:
    rows = [*results.rows("kernels", name="fgsgd_jax"), *(r for r in results.rows("updates") if "violation" in r)]
    return max((row["violation"] for row in rows), default=None)


PIO = "fgsgd, PIO(Sp+Ob+St)"
LARGE = ("64 × St(64, 16)", "St(512, 128)", "St(1024, 256)")


def _targets() -> Iterator[Target]:
    for case in LARGE:
        yield Target(f"{case}: times its own four products", 1.25, False, _floor(case, "products"))
        yield Target(f"{case}: faster than the fastest feasible peer, times", 1.8, True, _peer(case))
    yield Target("4,096 × St(9, 3): faster than the fastest feasible peer, times", 4, True, _peer("4,096 × St(9, 3)"))
    yield Target("4,096 × St(3, 3): faster than the fastest feasible peer, times", 10, True, _peer("4,096 × St(3, 3)"))
    for case in ("4,096 × Sp(576)", "Ob(576, 512)"):
        yield Target(f"{case}: times a copy", 1.3, False, _floor(case, "copy"))
    yield Target(
        "ResNet-110 update: times optax.sgd", 3, False, lambda r: r.value("updates", "ResNet-110", PIO, "over sgd")
    )
    yield Target("ResNet-110 update: faster than geoopt, times", 20, True, _geoopt)
    share: Callable[[Results], float | None] = lambda r: r.value("steps", "ResNet-110", "update alone", "of a step")  # noqa: E731
    yield Target("ResNet-110 update: share of a training step", 0.01, False, share)
    yield Target(
        "GPT-2 small, Stiefel by matrices: times optax.contrib.muon",
        0.5,
        False,
        lambda r: r.value("updates", "GPT-2 small", "fgsgd, Stiefel by matrices", "over muon"),
    )
    yield Target(
        "ResNet-110 update: compile time, s", 10, False, lambda r: r.value("updates", "ResNet-110", PIO, "compile")
    )
    yield Target("compile time's growth from 10 to 200 layers, as a share of the layers'", 1, False, _growing)
    yield Target("violation, the worst of all", 1e-6, False, _worst)


def targets(results: Results) -> str:
    return markdown(
        ["on CPU", "wanted", "cold cache", "", "warm cache", ""], [target.line(results) for target in _targets()]
    )


def machine(results: Results) -> str:
    """What the tables hold for, in a sentence; and what was left out."""
    lines = []
    for part, found in results.parts.items():
        about = found["machine"]
        versions: dict[str, str] = {}
        for row in found["rows"]:
            versions |= row["versions"]
        used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        device = about["processor"] if about["platform"] == "cpu" else about["device"]
        lines.append(f"- {part}: {device}, {about['cores used']} of {about['cores']} cores; {used}.")
        lines += [f"  Left out: {each['case']}, {each['name']}: {each['why']}." for each in found["left out"]]
    return "\n".join(lines)


def versions(results: Results) -> str:
    """Times and compile times of this version, that of the earlier one being 1, and the violations of both."""
    rows = {row["case"]: row for row in results.rows("versions")}
    lines = []
    for case, row in rows.items():
        if case.endswith(", by maps"):
            continue
        by_maps = rows.get(f"{case}, by maps", {}).get("ratio")
        before, after = (row["violation"][name] for name in ("before", "after"))
        violations = "—" if after is None else f"{after:.1e} · {before:.1e}"
        lines.append([case, number(row["ratio"]), number(by_maps), number(row["compile ratio"]), violations])
    columns = ["update or displacement", "by a manifold's own maps", "compile time", "violation, now · before"]
    return markdown(["× version 0.1", *columns], lines)


TABLES = {
    table.__name__: table
    for table in (cost, ratios, kernels, updates, memory, steps, growth, targets, machine, versions)
}


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every table that it names as the JSON has it."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]](Results(results / match[3]))}\n\n<!-- end -->"

    return re.sub(r"(<!-- (\w+) ([\w.-]+) -->)\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def write() -> None:
    """Bring all texts up to date."""
    for path in TEXTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
