"""Hooks of the site: files of the repository that pages link to, and mathematics as MathML, which needs no script.

A page links to a file outside `docs/` as the repository has it, `../benchmarks/results/…` or `../fgsgd_jax/…`. On the
site, reports and listings of source files are pages, JSON and pictures are files.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
    """Replace what `pymdownx.arithmatex` marked by MathML."""
    content = re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda tex: convert(html.unescape(tex[1])), content
    )
    return re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>',
        lambda tex: f'<div class="formula">{convert(html.unescape(tex[1]), display="block")}</div>',
        content,
        flags=re.DOTALL,
    )
