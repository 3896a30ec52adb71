"""The documentation: every public name has an example, files named are there, links lead somewhere, blocks run."""

import importlib.util
import inspect
import pathlib
import re
import types

import pytest

import fgsgd_jax as fg

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, *ROOT.glob("*.md")]
NAMED = [page.relative_to(ROOT).as_posix() for page in PAGES]


def public(module):
    """Functions and classes that a module's users call by its name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and value.__module__.startswith("fgsgd_jax")
    }


def own(module):
    """Those of them that the module defines itself."""
    return {name: value for name, value in public(module).items() if value.__module__ == module.__name__}


# Records: what makes them has the example.
RECORDS = {"StepMetrics", "Moments", "Observed"}
EXAMPLES = {f"fg.{name}": value for name, value in public(fg).items() if name not in RECORDS}
EXAMPLES |= {
    f"fg.{module}.{name}": value
    for module in ("nnx", "linen")
    for name, value in own(getattr(fg, module)).items()
    if name not in RECORDS
}
EXAMPLES |= {
    f"fg.Manifold.{name}": value
    for name, value in vars(fg.Manifold).items()
    if inspect.isfunction(value) and not name.startswith("_") and not getattr(value, "__isabstractmethod__", False)
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_public_name_has_an_example(name):
    doc = inspect.getdoc(EXAMPLES[name]) or ""
    assert re.search(r"^Example:\n(?:.*\n)*?\s+>>> ", doc + "\n", re.MULTILINE), f"{name} has no Example section"


def test_every_public_name_is_in_the_reference():
    shown = set(re.findall(r"^::: fgsgd_jax\.([\w.]+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE))
    missing = {*public(fg), "nnx", "linen"} - shown
    assert not missing, f"add to a page of docs/reference: {missing}"
    for name in shown:
        value = fg
        for part in name.split("."):
            value = getattr(value, part)
        assert isinstance(value, types.ModuleType) or value.__doc__


def test_every_public_name_is_in_the_index():
    index = (ROOT / "docs/reference/index.md").read_text()
    missing = [name for name in (*public(fg), "nnx", "linen") if f"[`fg.{name}`][fgsgd_jax.{name}]" not in index]
    assert not missing, f"add to docs/reference/index.md: {missing}"


def anchors(text):
    """The anchors of a page's headings, as MkDocs makes them."""
    from markdown.extensions.toc import slugify

    found = set()
    # What other files are shown on a page.
    text = re.sub(r'--8<-- "([^":]+).*"', lambda shown: (ROOT / shown[1]).read_text(), text)
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        own_name = re.search(r"\{#([\w-]+)\}", heading)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading)
        found.add(own_name[1] if own_name else slugify(plain, "-"))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_internal_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found.read_text()), f"{page.name}: {target}"
    # Cross-references of the site, by the name of an object.
    for name in re.findall(r"\]\[(fgsgd_jax[\w.]*)\]", text):
        value = fg
        for part in name.split(".")[1:]:
            value = getattr(value, part)


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "page.md").write_text("# A\n[one](page.md#a) [two](gone.md)")
    with pytest.raises(AssertionError, match=r"gone\.md"):
        test_internal_links_lead_somewhere(tmp_path / "page.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    for path in re.findall(r"\b(?:fgsgd_jax|tests|tools|benchmarks)/[\w/.]+\.py\b", page.read_text()):
        assert (ROOT / path).is_file(), f"{page.name} names {path}"


def program(name):
    """A program of docs/, which no path leads to."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PICTURES = program("pictures")
# Compiles every retraction.
SLOW_PICTURES = {"retractions": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW_PICTURES.get(name, ())) for name in PICTURES.PICTURES])
def test_a_picture_shows_the_committed_results(name):
    drawn = PICTURES.drawn_from((PICTURES.IMAGES / f"{name}.svg").read_text(encoding="utf-8"))
    assert drawn == PICTURES.PICTURES[name].figures(), f"draw it again: python docs/pictures.py {name}"


def test_every_picture_is_on_a_page():
    files = {path.stem for path in PICTURES.IMAGES.iterdir()}
    shown = set(re.findall(r"\]\(images/(\w+)\.svg\)", "\n".join(page.read_text() for page in PAGES)))
    assert files == set(PICTURES.PICTURES) == shown


def test_the_site_puts_pictures_and_mathematics_into_the_page():
    content = """<p><img alt="A plot" src="../images/share.svg" /></p>
<span class="arithmatex">\\(\\lVert x \\rVert_F^2\\)</span>"""
    page = program("site").on_page_content(content)
    assert '<svg class="picture" role="img" aria-label="A plot"' in page
    assert "currentColor" in page
    assert "<math" in page
    assert page.count('stretchy="false"') == 2
    assert not re.search("<img|metadata|arithmatex", page)


def test_long_names_in_tables_break_behind_punctuation_alone():
    content = '<p>conv/kernel</p><td>−0.92 ± 0.1</td><td><code>conv/kernel</code>, fg.spel, <a href="long/b">x</a></td>'
    page = program("site").on_page_content(content)
    assert page.replace("<code>conv/<wbr>kernel", "<code>conv/kernel").replace("±&nbsp;", "± ") == content
    assert "<wbr>" in page
    assert "−0.92 ±&nbsp;0.1" in page


RUNNABLE = [name for name in NAMED if "```python\n" in (ROOT / name).read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNABLE)
def test_blocks_run_as_they_stand(name, users_settings):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
        exec(compile(block, name, "exec"), names)
