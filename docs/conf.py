"""The site that `make docs` makes of all notebooks, with sphinx and myst-nb: nothing in it is loaded from elsewhere, formulas neither."""

import json
import re
from pathlib import Path

import jupyter_server_mathjax

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
project, author, copyright = "dsft", "The dsft authors", "2026 onwards, the dsft authors"
extensions = ["myst_nb"]
exclude_patterns = ["**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # the outputs are the committed ones
nb_merge_streams = True
nb_render_markdown_format = "myst"  # outputs have tables, too
nb_ipywidgets_js = {}  # they would come from elsewhere, and there is no kernel behind a page
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]  # a notebook may begin a level lower; widgets have no picture

html_theme = "furo"
html_title = "dsft"
html_copy_source = False
html_show_sourcelink = False
html_static_path = [str(Path(jupyter_server_mathjax.__file__).parent / "static")]  # MathJax 2, from a package
mathjax_path = "MathJax.js"
myst_update_mathjax = False
mathjax2_config = {
    "config": ["TeX-AMS-MML_HTMLorMML-full.js"],
    "HTML-CSS": {"availableFonts": [], "preferredFont": None, "webFont": "STIX-Web", "imageFont": None},  # the one font that the package has
    "tex2jax": {"inlineMath": [["\\(", "\\)"]], "displayMath": [["\\[", "\\]"]], "processClass": "math", "ignoreClass": "document"},
    "messageStyle": "none",
}

CONTENTS = {
    "To begin with": ["explore", "guide", "layout", "results", "lab_log", "protocol"],
    "Tutorials": ["tutorials/*"],
    "The library": ["[0-9]*"],
    "Recipes": ["recipes/*"],
    "Experiments": ["experiments/*"],
    "Analysis": ["analysis/*"],
    "Benchmarks": ["benchmarks/*"],
}


def contents() -> str:
    """The table of contents, which stands in the sidebar of every page."""
    pages = {caption: [p for p in patterns if any(NOTEBOOKS.glob(f"{p}.ipynb"))] for caption, patterns in CONTENTS.items()}
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *found, "```"]) for caption, found in pages.items() if found)


def linked_pages_only(text: str, folder: Path) -> str:
    """Markdown in which links to folders and to Markdown files, which are no pages of the site, are plain text."""
    is_none = lambda path: path.is_dir() or path.suffix == ".md"
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)\)", lambda link: link[1] if is_none(folder / link[2]) else link[0], text)


def as_page(app, docname: str, source: list[str]) -> None:
    """A notebook without the cells that nbdev hides and without its directives; the input of cells tagged hide_input goes, too."""
    notebook, folder, kept = json.loads(source[0]), (NOTEBOOKS / docname).parent, []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = linked_pages_only(text, folder)
        elif re.search(r"^#\|\s*(hide|default_exp)", text, re.MULTILINE):
            continue
        else:
            cell["source"] = re.sub(r"^#\|.*\n?", "", text, flags=re.MULTILINE)
            if "hide_input" in cell["metadata"].get("tags", []):
                cell["metadata"]["tags"].append("remove-input")
            for output in cell.get("outputs", []):
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = linked_pages_only("".join(output["data"]["text/markdown"]), folder)
        kept.append(cell)
    if docname == "index":
        kept.append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": contents()})
    source[0] = json.dumps(notebook | {"cells": kept})


def setup(app) -> None:
    app.connect("source-read", as_page)
