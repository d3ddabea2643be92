"""README.md: short, without gaps, in its order, rendered from nbs/index.ipynb, with links and pictures that exist; and the list of notebooks is whole."""

import csv
import json
import re
from urllib.parse import unquote

import pytest
from conftest import ROOT

from dsft.files import git
from dsft.notebooks import committed, readme_text

README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST = 9_000  # bytes
BLANK = 0.4  # share of blank lines: Markdown needs one around each heading, table, block of code and picture
SECTIONS = ["Two commands", "What came out", "Your own model and data", "Which method when", "Layout", "Licence"]
LINKS = re.findall(r"\]\(([^)\s]+)\)", README)


def test_it_is_short_and_without_gaps():
    lines = README.splitlines()
    assert len(README.encode()) <= LONGEST
    assert not re.search(r"\n\s*\n\s*\n", README), "two blank lines in a row"
    assert sum(not line.strip() for line in lines) <= BLANK * len(lines)


def test_it_is_in_order():
    assert re.findall(r"^## (.+)$", README, re.M) == SECTIONS
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures[0] == "figures/micro/figure1.png" and re.fullmatch(r"figures/[\w-]+/figure2.png", pictures[1])
    real = ROOT / "figures" / "gemma3-270m"
    assert pictures[1].startswith("figures/gemma3-270m/") == (real / "figure2.png").exists()
    page = (real if (real / "replication.md").exists() else ROOT / "figures" / "micro-full") / "replication.md"
    assert page.read_text(encoding="utf-8").strip() in README
    assert README.index("make study") < README.index("What came out") < README.index("params/mine.yaml") < README.index("DSFTTrainer(")


@pytest.mark.parametrize("column, study", [(2, "micro-methods"), (3, "gemma3-270m")])
def test_the_systems_have_their_gains(column, study):
    """A mark where the table says so only, and brackets around what has no interval."""
    shown = {cells[0]: [*cells, "", ""][column] for line in README.split("## Which method when")[1].split("## ")[0].splitlines() if len(cells := line.split("|")) > 1}
    with open(ROOT / "figures" / study / "which_method.csv", newline="", encoding="utf-8") as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    assert sum(bool(re.search(r"\d", cell)) for cell in shown.values()) >= 8
    for system, cell in shown.items():
        row = rows.get(system)
        if not row:
            assert cell in ("", "-", "microcosm", "gemma")
        else:
            assert float(re.sub("[()▲▼]", "", cell)) == pytest.approx(float(row["gain"]), abs=0.0501)
            assert cell.startswith("(") == (row["p"] == "") and cell.endswith(("▲", "▼")) == (row["p_holm"] != "" and float(row["p_holm"]) < 0.05)


@pytest.mark.parametrize("link", sorted({link for link in LINKS if not re.match(r"\w+:|#", link)}))
def test_every_link_leads_to_a_committed_file(link):
    path = unquote(link.split("#")[0])
    assert committed(path), path


def test_it_is_what_is_rendered(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert README == readme_text(ROOT / "nbs" / "index.ipynb"), "make README.md again with: make readme"


@pytest.mark.parametrize("name", ["results", "guide", "layout"])
def test_links_of_the_pages_beside_it_lead_to_committed_files(name):
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [line for cell in cells for output in cell.get("outputs", ()) for line in output.get("data", {}).get("text/markdown", ())]
    text = "".join(line for cell in cells for line in [*cell["source"], "\n"] if cell["cell_type"] == "markdown") + "".join(outputs)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", link)]
    assert links and not [link for link in links if not (ROOT / "nbs" / link).exists()]


def test_the_layout_names_every_notebook_and_every_dependency():
    text = (ROOT / "nbs" / "layout.ipynb").read_text(encoding="utf-8")
    notebooks = [name.removeprefix("nbs/") for name in git("ls-files", "nbs/*.ipynb").splitlines() if re.search(r"/\d\d_|/(recipes|experiments|analysis|benchmarks|tutorials)/", name)]
    missing = [name for name in notebooks if f"]({name})" not in text]
    assert not missing, f"execute nbs/layout.ipynb again: {missing}"
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    wanted = [re.split(r"[<>=]", word)[0] for words in re.findall(r"^\w*requirements = (.+)$", settings, re.M) for word in words.split()]
    assert not [name for name in wanted if not re.search(rf"\b{re.escape(name)}\b", text)]
