"""Notebooks and site as one sees them, in a real browser: `make test-lab`. Its pictures are in runs/lab/, to be looked at."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import nbformat
import pytest

from dsft.notebooks import committed

ROOT = Path(__file__).parents[2]
SITE, PICTURES = ROOT / "_docs" / "html", ROOT / "runs" / "lab"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MINUTES = 60_000  # milliseconds, as Playwright counts

if "DSFT_LAB" not in os.environ:
    pytest.skip("a browser is needed: run them with make test-lab", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: run them with make test-lab")
if not BROWSER:
    pytest.skip("there is no Chromium on this machine: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    PICTURES.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def not_drawn(page) -> list[str]:
    """The languages of the microcosm that no font of this machine can draw: another letter of theirs looks the same, namely like a code point that has no letter."""
    letters = {"zh": "猫狗", "vi": "ờũ", "ar": "قك"}
    looks = """letters => letters.map(letter => {
        const canvas = document.createElement("canvas"), context = canvas.getContext("2d")
        context.font = "32px sans-serif"
        context.fillText(letter, 4, 40)
        return canvas.toDataURL()
    })"""
    return [lang for lang, pair in letters.items() if len(set(page.evaluate(looks, [*pair, "\U0010fffd"]))) < 3]


def test_the_pictures_show_every_language(browser):
    page = browser.new_page()
    assert not not_drawn(page), "without a font for it the pictures show boxes: apt-get install fonts-noto-cjk (Chinese), fonts-dejavu-core (the others)"
    page.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what is committed, since JupyterLab saves what it runs."""
    folder = tmp_path_factory.mktemp("lab") / "project"
    for name in committed():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    """The address of JupyterLab, started as `make lab` does, but without a browser of its own; a function from the path of a notebook."""
    settings = tmp_path_factory.mktemp("settings")
    for name, content in {
        "notebook-extension/tracker": '{"windowingMode": "none"}',  # every cell is in the page, not only those in view
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--LabApp.default_url=/lab/tree/nbs/index.ipynb", "--no-browser", "--allow-root", f"--port={port}", f"--IdentityProvider.token={token}"]
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(settings)}
    log = (PICTURES / "jupyter.log").open("w")
    server = subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield lambda notebook: f"http://127.0.0.1:{port}/lab/tree/{notebook}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


HIGHEST, STEP, WIDTH = 14_000, 1400, 1300  # pixels


def photograph(page, name: str, scrolls: str, last: str) -> None:
    """Pictures of a page, one below the other, runs/lab/<name>-1.png, ...: of what `scrolls`, from its top to the end of the last element that is `last`."""
    height = f"Math.max(1000, ...[...document.querySelectorAll({last!r})].map(e => e.getBoundingClientRect().bottom + 40))"
    page.set_viewport_size({"width": WIDTH, "height": HIGHEST})
    page.evaluate(f"document.querySelectorAll({scrolls!r}).forEach(e => e.scrollTop = 0)")
    page.wait_for_timeout(1500)
    height = int(min(HIGHEST, page.evaluate(height)))
    for old in PICTURES.glob(f"{name}-*.png"):
        old.unlink()
    for n, top in enumerate(range(0, height, STEP), 1):
        page.screenshot(path=PICTURES / f"{name}-{n}.png", clip={"x": 0, "y": top, "width": WIDTH, "height": min(STEP, height - top)})


def run_all(browser, lab, project: Path, notebook: str, minutes: int):
    """Open a notebook, run all its cells and wait until the last one is done; returns the page."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(lab(notebook))
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=2 * MINUTES)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(state="attached", timeout=3 * MINUTES)
    page.wait_for_timeout(5000)  # the kernel may be started twice
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = "[...document.querySelectorAll('.jp-NotebookPanel .jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim())"
    over = f"{prompts}.every(text => /^\\[\\d+\\]:$/.test(text)) || !!document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
    for _ in range(minutes * 12):
        page.wait_for_timeout(5000)
        if page.evaluate(over):
            break
    else:
        page.screenshot(path=PICTURES / f"{Path(notebook).stem}-unfinished.png")
        pytest.fail(f"{notebook}: not done after {minutes} minutes: {page.evaluate(prompts)}")
    page.wait_for_timeout(2000)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(2000)
    cells = [cell for cell in nbformat.read(project / notebook, as_version=4).cells if cell.cell_type == "code"]
    errors = ["\n".join(output.traceback) for cell in cells for output in cell.outputs if output.output_type == "error"]
    photograph(page, Path(notebook).stem, ".jp-NotebookPanel .jp-WindowedPanel-outer", ".jp-NotebookPanel .jp-Cell")
    assert not errors, errors[0]
    return page


def broken_pictures(page) -> list[str]:
    return page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 200))")


def red_boxes(page) -> list[str]:
    """What stands on JupyterLab's red ground: what was written to stderr."""
    return page.evaluate("[...document.querySelectorAll('[data-mime-type=\"application/vnd.jupyter.stderr\"]')].map(e => e.textContent.slice(0, 300))")


@pytest.mark.parametrize("notebook, minutes", [("nbs/experiments/train.ipynb", 20), ("nbs/analysis/figure2.ipynb", 10)], ids=["train", "analysis"])
def test_a_notebook_runs_to_its_end(browser, lab, project, notebook, minutes):
    page = run_all(browser, lab, project, notebook, minutes)
    assert not broken_pictures(page)
    assert not red_boxes(page)
    page.close()


def test_the_explorer_answers_when_its_widgets_are_moved(browser, lab, project):
    page = run_all(browser, lab, project, "nbs/explore.ipynb", 20)
    assert not broken_pictures(page)
    assert not red_boxes(page)
    panel = page.locator(".jp-OutputArea-output .widget-vbox").last
    read = "text => [...document.querySelectorAll('.widget-vbox table th bdi')].map(e => e.textContent).join('').includes(text)"
    panel.locator("select").nth(0).select_option(label="micro-gemma2 (study micro-full)")
    panel.locator("select").nth(1).select_option(label="Arabic (ar)")
    page.wait_for_function(read, arg="اليوم", timeout=2 * MINUTES)  # of the question that it begins with
    field = panel.locator("input[type=text]").first
    field.fill("ماذا يأكل القط؟")
    field.press("Enter")
    page.wait_for_function(read, arg="القط", timeout=2 * MINUTES)
    panel.screenshot(path=PICTURES / "panel-arabic.png")
    field.fill(" ")
    field.press("Enter")
    panel.get_by_text("there is nothing in it; write a question").wait_for(timeout=MINUTES)
    panel.screenshot(path=PICTURES / "panel-blank.png")
    page.close()


class Links(HTMLParser):
    """The addresses in a page, and the names that one can jump to."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[name] for name in ("href", "src") if found.get(name)]
        self.names |= {found[name] for name in ("id", "name") if found.get(name)}


@pytest.fixture(scope="module")
def site() -> dict[Path, Links]:
    pages = {file: Links(file.read_text(encoding="utf-8")) for file in sorted(SITE.rglob("*.html")) if "_static" not in file.parts}
    if not pages:
        pytest.skip("the site is not there: make docs")
    return pages


def test_links_of_the_site_lead_somewhere(site):
    broken = []
    for file, links in site.items():
        for address in links.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            aim = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            known = site[aim].names if aim in site else set()
            if not aim.exists() or (parts.fragment and aim in site and unquote(parts.fragment) not in known and not address.startswith("#")):
                broken.append(f"{file.relative_to(SITE)}: {address}")
    assert not broken, "\n".join(broken)


def test_every_notebook_is_a_page(site):
    assert {f"{name.removeprefix('nbs/').removesuffix('.ipynb')}.html" for name in committed("nbs/*.ipynb")} <= {file.relative_to(SITE).as_posix() for file in site}


def test_tables_are_tables_in_outputs_too(site):
    assert "C1a TFT" in "".join(re.findall(r"<td.*?</td>", (SITE / "index.html").read_text(encoding="utf-8"), re.DOTALL))
    assert not [file.name for file in site if re.search(r"<p>\|[^<]*\|\s*(—|-{2,})", file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", ["index", "14_losses", "06_phrasebook", "analysis/figure2", "explore"])
def test_a_page_of_the_site_loads_nothing_from_elsewhere(browser, site, name):
    page, asked = browser.new_page(viewport={"width": 1300, "height": 1000}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((SITE / f"{name}.html").as_uri())
    page.wait_for_timeout(1000)
    if page.locator("span.math, div.math").count():
        page.wait_for_function("window.MathJax && MathJax.Hub && MathJax.Hub.queue.running === 0 && document.querySelectorAll('.MathJax').length > 0", timeout=MINUTES)
        assert not page.locator(".MathJax_Error, .merror").count()
    assert not [address for address in asked if not address.startswith(("file:", "data:", "about:"))]
    assert not broken_pictures(page)
    photograph(page, f"site-{name.replace('/', '-')}", "html", "article")
    page.close()
