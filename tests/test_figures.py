"""Figures: one colour and marker a method in all of them, told apart by the colour-blind; what a panel says and how far its axes go."""
import re
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from execnb.nbio import read_nb
from matplotlib.colors import CSS4_COLORS, to_rgb
from test_analysis import ANALYSIS, MEASURED, analyse, project, with_rule  # noqa: F401

from dsft import report
from dsft.methods import METHODS, Method, method_from_name
from dsft.report import STYLES, legible, study_styles, styles
from dsft.study import load_study

PARAMS = Path(__file__).parents[1] / "params"
DEUTERANOPIA = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])  # Machado et al. 2009, linear RGB
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of linear sRGB


def seen(color: str, by=np.eye(3)) -> np.ndarray:
    """A colour in CIELAB, in which distances are as large as they look, as seen with the matrix `by`."""
    rgb = np.array(to_rgb(color))
    linear = np.clip(by @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    x, y, z = np.cbrt(np.maximum(XYZ @ linear / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_two_methods_of_a_study_look_the_same(path):
    study = load_study(str(path))
    look = study_styles(study)
    assert set(look) == set(METHODS) | set(study.every_method)
    assert len({style[:2] for style in look.values()}) == len(look)
    assert all(look[name] == STYLES[name] for name in set(look) & set(STYLES))
    for method in study.every_method.values():
        assert look[method.name].color == look.get(method.stem, look[method.name]).color  # variations have the colour of their stem


@pytest.mark.parametrize("by", [np.eye(3), DEUTERANOPIA], ids=["by most", "with deuteranopia"])
def test_the_colours_are_told_apart(by):
    """A distance of 2.3 is just noticeable side by side; 15 can be told apart in a plot and its legend."""
    near = {(a, b): np.linalg.norm(seen(STYLES[a].color, by) - seen(STYLES[b].color, by)) for a, b in combinations(STYLES, 2)}
    assert min(near.values()) > 15, min(near, key=near.get)
    assert len({style.marker for style in STYLES.values()}) == len(STYLES)


def test_the_papers_methods_are_the_most_visible():
    chroma = {name: np.hypot(*seen(style.color)[1:]) for name, style in STYLES.items()}
    quiet = [name for name, method in METHODS.items() if method.role != "ours" and name in STYLES] + ["tft_compute"]
    ours = ("dsft_logits", "dsft_feature")
    assert min(chroma[name] for name in ours) > 1.3 * max(chroma[name] for name in quiet)
    assert all(STYLES[name].width > style.width for name in ours for other, style in STYLES.items() if other not in ours)


def test_a_method_without_a_style_has_the_same_in_every_study():
    mine, other = (Method(name=name, stages=[{"rows": ["en"]}]) for name in ("mine", "other"))
    assert styles([mine])["mine"] == styles([other, *METHODS.values(), mine])["mine"]
    many = [Method(name=f"m{n}", stages=[{"rows": ["en"]}]) for n in range(60)]  # more than there are colours and markers
    variations = [Method(name=f"tft_v{n}", stem="tft") for n in range(5)] + [method_from_name(f"dsft_logits_{name}_n75") for name in ("last", "head", "positional")]
    alike = [Method(name=name, stem="m0", variant="alike") for name in ("m0_long", "m0_last")]  # both are l in short
    look = styles([*many, *variations, *alike])
    assert len({style[:2] for style in look.values()}) == 60 + 8 + 2
    assert {look["m0_long"].color, look["m0_last"].color} == {look["m0"].color}
    for style in look.values():
        plt.plot([0, 1], color=style.color, marker=style.marker)
    plt.gcf().canvas.draw()  # matplotlib draws all of them
    plt.close("all")


DRAWS_METHODS = ["code_switch_sweep", "cost", "data_size", "figure3", "figure4", "inside", "retention", "weights"]


def code_of(path: Path) -> str:
    return "\n".join(cell.source for cell in read_nb(path).cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", sorted(ANALYSIS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_analyses_take_colours_from_the_table(path):
    """None but greys, white and colour maps stand in an analysis; figure 1 has two for the losses that are no methods."""
    code = code_of(path)
    named = [word for word in re.findall(r"[\"']([a-z]+)[\"']", code) if word in CSS4_COLORS and word != "white"]
    cycled = re.findall(r"colou?rs?\b.*[\"'](?:C\d)[\"']|[\"'](?:tab|xkcd):\w+[\"']|color_palette|husl", code)
    coded = [code for code in re.findall(r"#[0-9a-fA-F]{6}\b", code) if path.stem != "figure1"]
    assert not named + cycled + coded
    if path.stem in DRAWS_METHODS:
        assert "study_styles" in code or "by_title" in code


def test_the_list_of_analyses_that_draw_methods_is_whole():
    others = {"figure1", "figure2", "claims", "layers", "which_method"}  # a scheme, languages, claims, one map a method, and names on points
    drawing = {path.stem for path in ANALYSIS.glob("*.ipynb") if "save_figure(" in code_of(path)}
    assert drawing - others == set(DRAWS_METHODS)


@pytest.mark.parametrize(
    "text, shown",
    [("được", "được"), ("السيارة", "السيارة"), ("北京", "BeiJing"), ("。", "."), ("서울", "SeoUl"), ("Ελλάδα", "Ελλάδα"), ("Москва", "Москва"), ("दिल्ली", "dilli")],
)
def test_tokens_of_any_script_are_legible(text, shown, recwarn):
    assert legible(text) == shown
    figure = plt.figure()
    figure.text(0.5, 0.5, legible(text))
    figure.canvas.draw()
    plt.close(figure)
    assert not [w for w in recwarn if "missing from font" in str(w.message)]


@pytest.fixture
def drawn(project, monkeypatch):  # noqa: F811
    """A function that runs an analysis and returns the figure that it saves."""
    saved = {}
    save_figure = report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, folder, name: (save_figure(figure, folder, name), saved.update({name: figure})))

    def draw(name: str, study: str = "wide") -> plt.Figure:
        analyse(project, name, study)
        return saved[name]

    return draw


def texts(axis) -> str:
    return " | ".join(text.get_text() for text in axis.get_legend().get_texts())


def test_an_unmet_premise_stands_in_the_panel(project, drawn):  # noqa: F811
    rising = {"entropy": [0.5, 3.0, 4.0, 2.0], "falls_twice": False, "example": {"tokens": ["a", "b"], "entropy": [[1.0, 2.0]] * 4}}
    with_rule(project, **rising)
    figure = drawn("figure2", "ruled")
    assert texts(figure.axes[0]) == "Chinese: i = 1, j = 2, does not fall twice †"
    assert [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() in ("o", "s")] == ["white", "white"]
    letters = [text.get_text() for text in figure.axes[0].texts]
    assert letters == ["i", "j"]
    with_rule(project, **rising, rule="fixed")
    fixed = drawn("figure2", "ruled")  # the curve is the same, but nothing rests on it
    assert texts(fixed.axes[0]) == "Chinese: i = 1, j = 2, does not fall twice"
    with_rule(project, **MEASURED, rule="english", i=1, j=2, falls_twice=False)
    other = drawn("figure2", "ruled")  # a curve that falls twice, whatever the file says
    assert texts(other.axes[0]) == "Chinese: i = 1, j = 2"
    rules = [{"rule": "english", "i": 1, "j": 2, "holds": False, "rests_on": "0.0"}]
    with_rule(project, **MEASURED | {"rules": rules}, rule="english")
    other = drawn("figure2", "ruled")
    assert texts(other.axes[0]) == "Chinese: i = 1, j = 2, the english rule has no ground †"


def test_no_axis_of_retention_goes_beyond_what_can_be_scored(drawn):
    for axis in drawn("retention").axes:
        low, high = axis.get_xlim()
        assert 0 <= low < high <= 100


def test_figure_3_has_points_in_the_colours_of_its_methods(drawn):
    axis = drawn("figure3").axes[0]
    assert [bars.lines[0].get_color() for bars in axis.containers] == [STYLES["et_logits"].color, STYLES["et_feature"].color]
    assert np.allclose(axis.containers[0].lines[0].get_ydata(), [(44 + 44 + 60) / 3, (54 + 54 + 70) / 3, (30 + 30 + 50) / 3], atol=0.01)


def test_the_map_of_layers_shows_its_noise(drawn):
    figure = drawn("layers")
    cells = figure.axes[0].collections[0]
    low, high = cells.get_clim()
    middle = (190 / 3 + 196 / 3 + 140 / 3) / 3
    assert (low + high) / 2 == pytest.approx(middle, abs=0.01) and high - middle == pytest.approx(middle - 140 / 3, abs=0.01)  # no noise here: the farthest cell
    assert [text.get_text() for text in figure.axes[0].texts][0] == "63.3\n±0.0"


def test_claims_of_one_unit_share_a_panel(drawn):
    figure = drawn("claims")
    found = {axis.get_xlabel().split(" (")[0]: [label.get_text().split()[0] for label in axis.get_yticklabels()] for axis in figure.axes}
    assert found == {
        "points of F1, accuracy or MC1": ["C1a", "C1b", "C2", "C3", "C4", "C5a", "C5b", "C8"],  # no SDRRL here
        "hundredths of a cosine": ["C6"],
        "points of retrieval": ["C6"],
        "points of chrF++": ["C7a"] * 4 + ["C7b"] * 2,  # LC and ET, and into English
    }


@pytest.mark.parametrize("count, shape", [(0, (1, 1)), (1, (1, 1)), (2, (1, 2)), (5, (3, 2))])
def test_many_panels_fit_the_page(count, shape):
    figure, axes = report.panel_grid(count)
    assert axes[0].get_gridspec().get_geometry() == shape and sum(axis.axison for axis in axes) == max(1, count)
    assert 8 <= figure.get_size_inches()[0] <= 10
    plt.close(figure)


def test_curves_run_from_layer_to_layer(project, drawn):  # noqa: F811
    """Where the probability of the answer is known, it does not decide about the order."""
    with_rule(project, **MEASURED | {"target": [0.4, 0.02, 0.3, 0.1]}, falls_twice=True)
    above, below = drawn("figure2", "ruled").axes[:2]
    assert above.lines[0].get_xdata().tolist() == [0, 1, 2, 3] and above.lines[0].get_ydata().tolist() == [6.0, 3.0, 2.9, 1.0]
    assert below.lines[1].get_ydata().tolist() == [0.4, 0.02, 0.3, 0.1]
