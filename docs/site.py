"""Hooks of the site: files that pages link to, pictures within the page, and mathematics as MathML, without a script.

A page links to a file outside `docs/` as the repository has it, `../benchmarks/results/…` or `../fgsgd_jax/…`. On the
site, reports and listings of source files are pages, JSON and PNG are files. The pictures of
`docs/images` become part of the page, so that their text has its colour, on light and on dark.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
SOURCE = re.compile(r"\]\(\.\./((?:fgsgd_jax|benchmarks|tests|tools)/[\w/]+\.py)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the results, and a listing of each source file that a page links to."""
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in (".json", ".md", ".png"):
            # Below `results/`, where benchmarks/README.md finds them too.
            name = path.relative_to(RESULTS.parent).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    pages = [page.content_string for page in files.documentation_pages() if not page.src_uri.startswith("results/")]
    for name in sorted({name for page in pages for name in SOURCE.findall(page)}):
        listing = f"# {Path(name).name}\n\n`{name}`\n\n```python\n{(ROOT / name).read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"{name}.md", content=listing, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point the links to the repository's files at their places on the site."""
    return SOURCE.sub(r"](\1.md)", markdown.replace("](../benchmarks/results/", "](results/"))


def on_page_content(content: str, **_: Any) -> str:
    """Replace what `pymdownx.arithmatex` marked by MathML, and the pages' pictures by their SVG."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda tex: _mathml(tex[1]), content)
    content = re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>',
        lambda tex: f'<div class="formula">{_mathml(tex[1], display="block")}</div>',
        content,
        flags=re.DOTALL,
    )
    content = re.sub(r"<t([dh])\b[^>]*>.*?</t\1>", lambda cell: _breakable(cell[0]), content, flags=re.DOTALL)
    return re.sub(r'<img alt="([^"]*)" src="(?:\.\./)*images/(\w+)\.svg" />', _inline, content)


def _breakable(cell: str) -> str:
    """Let long names in a table break behind their punctuation, and keep ± with what follows."""
    cell = cell.replace(" ± ", " ±&nbsp;")
    return re.sub(r"(<[^>]*>)|(?<=\w{3})([:/._=~+(,]+)(?=[^\W\d])", lambda part: part[1] or part[2] + "<wbr>", cell)


def _mathml(tex: str, **options: Any) -> str:
    # A bar that stretches on one side alone is what browsers make of a norm with an exponent.
    return convert(html.unescape(tex), **options).replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')


def _inline(image: re.Match[str]) -> str:
    alt, name = image.groups()
    svg = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Several pictures share a page, and matplotlib's names of their parts.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}_", svg)
    return svg.replace("<svg", f'<svg class="picture" role="img" aria-label="{alt}"', 1)
