"""Runs notebooks from top to bottom, each in a kernel of its own; says how long each took.

    python tools/notebooks.py [NAME ...] [--pictures FOLDER]

With a folder, the pictures are written there on a light and on a dark page, to be looked at.
"""

import argparse
import base64
import io
import pathlib
import sys
import time

import nbclient
import nbformat

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
PAGES = {"light": "#ffffff", "dark": "#1e1e1e"}
LONGEST = 180


def execute(path):
    """The notebook with its outputs. Raises on an exception, and on anything a cell says to standard error."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    # Or the kernel warns that it talks to us over TCP without encryption.
    client.extra_arguments = ["--log-level=ERROR"]
    client.execute()
    for output in outputs(notebook):
        if output.output_type == "stream" and output.name == "stderr":
            raise AssertionError(f"{path.name} warns: {output.text}")
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return [
        base64.b64decode(output.data["image/png"])
        for output in outputs(notebook)
        if "image/png" in output.get("data", {})
    ]


def save(notebook, name, folder):
    from PIL import Image

    for index, png in enumerate(pictures(notebook)):
        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        for page, colour in PAGES.items():
            below = Image.new("RGBA", picture.size, colour)
            Image.alpha_composite(below, picture).convert("RGB").save(folder / f"{name}-{index}-{page}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks; all where left out")
    parser.add_argument("--pictures", type=pathlib.Path)
    options = parser.parse_args()
    late = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if options.names and path.stem not in options.names:
            continue
        start = time.perf_counter()
        notebook = execute(path)
        seconds = time.perf_counter() - start
        print(f"{path.stem:20} {seconds:5.0f} s, {len(pictures(notebook))} pictures", flush=True)
        late += [path.stem] if seconds > LONGEST else []
        if options.pictures:
            options.pictures.mkdir(parents=True, exist_ok=True)
            save(notebook, path.stem, options.pictures)
            for output in outputs(notebook):
                if output.output_type == "stream":
                    print(output.text)
    if late:
        sys.exit(f"longer than {LONGEST} s: {', '.join(late)}")


if __name__ == "__main__":
    main()
