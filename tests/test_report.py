"""From run folders written by hand to tables, figures and provenance, in a project of its own."""
import csv
import hashlib
import json
import math
import os
import random
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import papermill
import pytest

from dsft.files import ParamsError
from dsft.report import TABLE_COLUMNS, caption, paper_layout, paper_table, published_numbers, query_gap_table, query_gap_text, save_figure, summarise, verdict, write_table
from dsft.metrics import NLU, QA
from dsft.results import CELL, METHOD_COLUMNS, QUERY_GAP_COLUMNS, RESULT_COLUMNS, in_bits, in_percent, load_costs, load_entropy, load_inside, load_item_scores
from dsft.results import load_query_gaps, load_results, write_csv, write_items, write_provenance
from dsft.statistics import bootstrap, compare, contrast, estimate, gains, holm
from dsft.study import load_study

ANALYSIS = Path(__file__).parents[1] / "nbs" / "analysis"
STUDY = """
models:
  micro-llama: {path: nowhere/micro-llama, published: llama-2-7b}
languages: [zh, vi]
methods: [base, tft, dsft_logits]
seeds: [0, 1, 2]
"""
# target -> method -> (F1 on xquad, accuracy on xcopa) of each seed; English scores are 30 points higher
SCORES = {
    "zh": {"base": [(10, 50)], "tft": [(20, 60), (22, 60), (24, 60)], "dsft_logits": [(21, 61), (24, 61), (27, 61)]},
    "vi": {"base": [(12, 52)], "tft": [(30, 70), (30, 71), (30, 72)]},  # DSFT has not run in Vietnamese
}


def write_run(root, target, method, seed, scores):
    key = {"study": "toy", "model": "micro-llama", "lang": target, "method": method, "seed": seed}
    rows = [
        {"dataset": dataset, "lang": lang, "metric": metric, "value": value + extra, "items": items, "chance": chance}
        for (dataset, metric, items, chance), value in zip((("xquad", "f1", 400, None), ("xcopa", "acc", 500, 50.0)), scores)
        for lang, extra in ((target, 0), ("en", 30))
    ]
    folder = root / "runs" / "toy" / "micro-llama" / target / method / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(key | {"scores": rows}))
    samples = [  # of N items the first so many are right
        {"dataset": row["dataset"], "lang": row["lang"], "id": f"q{n:03d}", "value": float(n < row["value"] * row["items"] / 100)}
        for row in rows for n in range(row["items"])
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    step = {"commit": f"commit-of-{method}", "dirty": False, "packages": {"torch": "2.13.0"}, "hardware": "a CPU"}
    before = f"train {target} {method} {seed}" if method != "base" else "pretrain"  # one base serves both languages
    model = step | {"command": before, "seconds": 100.0, "dirty": True}
    if method != "base":
        model |= {"data_sha256": f"data-{target}", "steps": 100, "train_seconds": {"tft": 60.0, "dsft_logits": 90.0}[method] + seed}
    evaluation = step | {"command": f"evaluate {target} {method} {seed}", "seconds": 10.5, "model": model}
    (folder / "provenance.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the study `toy`: params, run folders, nothing else; it is the current folder."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "toy.yaml").write_text(STUDY)
    for target, methods in SCORES.items():
        for method, seeds in methods.items():
            for seed, scores in enumerate(seeds):
                write_run(tmp_path, target, method, seed, scores)
        layers = {"model": "micro-llama", "lang": target, "entropy": [6.0, 5.5, 3.0, 2.9, 2.0], "i": 2, "j": 3}
        layers |= {"rule": "entropy", "falls_twice": True, "r2": 0.97, "tokens": 900, "example": {"tokens": ["a", "b"], "entropy": [[1.0, 2.0]] * 3}}
        (tmp_path / "runs" / "toy" / "micro-llama" / target / "layers.json").write_text(json.dumps(layers))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_target(results):
    return results[results["lang"].astype(str) == results["target"].astype(str)]


def test_one_row_a_score(project):
    results = load_results(load_study("toy"))
    assert list(results.columns) == RESULT_COLUMNS
    assert len(results) == 4 * (1 + 3 + 3 + 1 + 3)
    row = results.query("target == 'zh' and method == 'tft' and seed == 2 and dataset == 'xcopa' and lang == 'en'").iloc[0]
    assert (row["value"], row["items"], row["chance"]) == (90.0, 500, 50.0)
    assert results.query("dataset == 'xquad'")["chance"].isna().all()


def test_what_a_method_is_stands_in_columns(project):
    written_out = "{name: shallow, title: LC below, stages: [{supervisions: [{stage: lc, kind: feature, layer: 1}]}]}"
    study = load_study("toy")
    (project / "params" / "toy.yaml").write_text(STUDY.replace("dsft_logits]", f"tft_n75, dsft_logits_last_at2_3, {written_out}]"))
    swept = load_study("toy")
    write_csv(load_results(study).drop(columns=METHOD_COLUMNS), "figures/toy/results.csv")  # as before there were such columns
    os.rename("runs", "elsewhere")
    table = pd.read_csv("figures/toy/results.csv")
    renamed = {"base": "tft_n75", "tft": "dsft_logits_last_at2_3", "dsft_logits": "shallow"}
    write_csv(table.assign(method=table["method"].map(renamed)), "figures/toy/results.csv")
    told = load_results(swept).drop_duplicates("method").set_index("method")[METHOD_COLUMNS].astype(object).fillna("").to_dict("index")
    assert told == {
        "tft_n75": {"title": "TFT-n75", "role": "control", "stem": "tft", "variant": "", "supervises": "", "layers": "", "examples": 75},
        "dsft_logits_last_at2_3": {
            "title": "DSFT-logits-last-at2-3", "role": "ours", "stem": "dsft_logits", "variant": "last", "supervises": "lc_et", "layers": "2_3", "examples": ""},
        "shallow": {"title": "LC below", "role": "ours", "stem": "shallow", "variant": "", "supervises": "lc", "layers": "1", "examples": ""},
    }
    write_csv(load_results(swept).replace({"title": {"LC below": "what it was called once"}}), "figures/toy/results.csv")
    assert "LC below" in set(load_results(swept)["title"])  # the study's word counts


def test_a_table_with_a_method_that_the_study_lost(project):
    write_csv(load_results(load_study("toy")), "figures/toy/results.csv")
    os.rename("runs", "elsewhere")
    (project / "params" / "toy.yaml").write_text(STUDY.replace("[base, tft, dsft_logits]", "[base, tft]"))
    with pytest.raises(ParamsError, match="study toy has no method dsft_logits, which a table of it names; make the table again"):
        load_results(load_study("toy"))


def test_mean_spread_and_published_number(project):
    table = summarise(on_target(load_results(load_study("toy"))), {"micro-llama": "llama-2-7b"})
    tft = table.query("method == 'tft' and dataset == 'xquad' and lang == 'zh'").iloc[0]
    assert (tft["value"], tft["sd"], tft["seeds"], tft["items"], tft["published"]) == (22.0, 2.0, 3, 400, 23.41)
    xcopa = table.query("method == 'tft' and dataset == 'xcopa' and lang == 'zh'").iloc[0]
    assert (xcopa["value"], xcopa["sd"], xcopa["chance"], xcopa["published"]) == (60.0, 0.0, 50.0, 65.0)
    base = table[table["method"] == "base"]
    assert base["sd"].isna().all() and base["published"].isna().all()  # one seed; and the paper shows no base model
    assert summarise(load_results(load_study("toy")))["published"].isna().all()  # no correspondence given
    assert summarise(load_results(load_study("toy")), {"micro-llama": None})["published"].isna().all()


def test_published_numbers_are_the_papers():
    table = published_numbers()
    assert not table.duplicated(["model", "method", "dataset", "lang", "metric"]).any()
    assert table["model"].unique().tolist() == ["llama-2-7b", "gemma-2-2b"]
    illegible = table.query("model == 'llama-2-7b' and method == 'sft' and dataset == 'xquad'")
    assert len(illegible) == 3 and illegible["published"].isna().all()


def test_table_as_csv_and_markdown(project):
    table = summarise(on_target(load_results(load_study("toy"))), {"micro-llama": "llama-2-7b"})
    text = paper_layout(table) + "\n\n" + caption(table, {"micro-llama": "llama-2-7b"})
    write_table(table[TABLE_COLUMNS], "out", "table1", text)
    rows = list(csv.reader(Path("out/table1.csv").open(encoding="utf-8")))
    assert rows[0] == ["model", "method", "dataset", "lang", "metric", "value", "sd", "seeds", "items", "published"]
    assert ["micro-llama", "tft", "xquad", "zh", "f1", "22.0", "2.0", "3", "400", "23.41"] in rows
    assert ["micro-llama", "base", "xquad", "zh", "f1", "10.0", "", "1", "400", ""] in rows
    header, _, *lines, _, below = Path("out/table1.md").read_text(encoding="utf-8").splitlines()
    assert header == "| model | method | XQuAD F1, vi | XQuAD F1, zh | XCOPA accuracy, vi | XCOPA accuracy, zh |"
    assert lines == [
        "| micro-llama | base | 12.0 | 10.0 | 52.0 | 50.0 |",
        "| micro-llama | TFT | 30.0 ± 0.0 [27.36] | 22.0 ± 2.0 [23.41] | 71.0 ± 1.0 [66.00] | 60.0 ± 0.0 [65.00] |",
        "| micro-llama | DSFT-logits | - | **24.0 ± 3.0** [24.77] | - | **61.0 ± 0.0** [66.40] |",
    ]
    for fact in ("over 3 seeds", "400 to 500 items", "Chance: XCOPA 50.", "llama-2-7b for micro-llama"):
        assert fact in below
    assert not list(Path("out").glob(".*"))  # no temporary file stays


def test_nothing_to_show(project):
    nothing = load_results(load_study("toy")).query("dataset == 'mkqa'")
    table = summarise(nothing)
    assert table.empty and list(table.columns[: len(TABLE_COLUMNS)]) == TABLE_COLUMNS
    assert (paper_layout(table), caption(table)) == ("", "The study has no such benchmarks.")
    comparison = compare(load_item_scores(load_study("toy")).query("dataset == 'mkqa'"))
    assert verdict(comparison, load_study("toy")).startswith("There are no two fine-tuned methods")


def test_items_are_the_parts_of_the_scores(project):
    means = on_target(load_item_scores(load_study("toy"))).astype(dict.fromkeys(CELL, str)).groupby([*CELL, "seed"])["value"].mean()
    scores = on_target(load_results(load_study("toy"))).set_index([*CELL, "seed"])["value"]
    pd.testing.assert_series_equal(means, scores.sort_index())


def test_paired_comparison(project):
    comparison = compare(on_target(load_item_scores(load_study("toy"))))
    assert comparison[["method", "lang", "dataset", "seeds", "items"]].values.tolist() == [
        ["dsft_logits", "zh", "xquad", 3, 400], ["dsft_logits", "zh", "xcopa", 3, 500]  # not the base, and only what both have run
    ]
    xquad, xcopa = comparison.itertuples()
    assert (xquad.difference, xcopa.difference) == (2.0, 1.0)
    assert 0 < xquad.low < 2 < xquad.high < 6 and 0 < xcopa.low < 1 < xcopa.high < 3
    assert list(comparison["p_holm"]) == pytest.approx(list(holm(comparison["p"])))
    assert "1.5 points above TFT; it is above in 2 of 2 cells" in verdict(comparison, load_study("toy"))
    assert "significantly above in 2 and below in 0" in verdict(comparison, load_study("toy"))


def test_bootstrap_against_one_written_as_a_loop():
    """Draw seeds and items with plain `random`, one draw at a time; the seeds' part of the scatter is widened afterwards."""
    rng = random.Random(0)
    d = [[rng.gauss(1 + 2 * k, 5) for _ in range(40)] for k in range(4)]
    overall, draws = statistics.fmean(map(statistics.fmean, d)), []
    for _ in range(20_000):
        items = [rng.randrange(40) for _ in range(40)]
        rows = [statistics.fmean(row[n] for n in items) for row in d]
        center = statistics.fmean(rows)
        draws.append(center + (4 / 3) ** 0.5 * (statistics.fmean(rng.choices(rows, k=4)) - center))
    draws.sort()
    low, high, p = bootstrap(np.array(d), draws=20_000)
    assert (low, high) == pytest.approx((draws[500], draws[-500]), abs=0.12)
    assert p == pytest.approx(2 * sum(x <= 0 for x in draws) / 20_000, abs=0.01)
    assert low < overall < high


def test_clustered_bootstrap_against_one_written_as_a_loop():
    """Draw seeds and whole clusters of different sizes with plain `random`; the mean is that of the items drawn, however many they are."""
    rng = random.Random(1)
    sizes = [1, 1, 2, 3, 5, 8, 4, 4, 2, 6, 1, 3]
    names = [f"p{g}" for g, size in enumerate(sizes) for _ in range(size)]
    order = rng.sample(range(len(names)), len(names))  # the items of a cluster need not stand together
    hard = {f"p{g}": rng.gauss(0, 6) for g in range(len(sizes))}
    d = [[rng.gauss(1 + k + hard[names[n]], 3) for n in order] for k in range(4)]
    clusters = [names[n] for n in order]
    members = {name: [n for n, other in enumerate(clusters) if other == name] for name in hard}
    draws = []
    for _ in range(20_000):
        items = [n for name in rng.choices(list(members), k=len(members)) for n in members[name]]
        rows = [statistics.fmean(row[n] for n in items) for row in d]
        center = statistics.fmean(rows)
        draws.append(center + (4 / 3) ** 0.5 * (statistics.fmean(rng.choices(rows, k=4)) - center))
    draws.sort()
    low, high, p = bootstrap(np.array(d), draws=20_000, clusters=clusters)
    assert (low, high) == pytest.approx((draws[500], draws[-500]), abs=0.15)
    assert p == pytest.approx(2 * min(sum(x <= 0 for x in draws), sum(x >= 0 for x in draws)) / 20_000, abs=0.015)
    alone = bootstrap(np.array(d), draws=20_000)
    assert high - low > 1.3 * (alone[1] - alone[0])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("clusters", [None, [f"q{n}" for n in range(300)], list(range(300, 0, -1))])
def test_clusters_of_single_items_change_no_digit(order, clusters):
    """However single items are named and laid out, the numbers are the same; and near those of a plain bootstrap over seeds and items."""
    d = np.asarray(np.random.default_rng(5).normal(0.7, 20, (3, 300)), order=order)
    rng = np.random.default_rng(0)
    seeds = 1 / 3 + (3 / 2) ** 0.5 * (rng.multinomial(3, np.full(3, 1 / 3), 10_000) / 3 - 1 / 3)
    means = (seeds @ d * rng.multinomial(300, np.full(300, 1 / 300), 10_000) / 300).sum(1)
    expected = bootstrap(np.ascontiguousarray(d))
    assert expected[:2] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.1)
    assert bootstrap(d, clusters=clusters) == pytest.approx(expected)
    assert estimate(d, clusters)[1:4] == pytest.approx(expected)


def test_one_cluster_alone_has_no_scatter_of_items():
    d = np.stack([np.arange(10.0)] * 3)
    assert bootstrap(d, clusters=["p"] * 10)[:2] == pytest.approx((4.5, 4.5))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # worked by hand: 4 x .005, 3 x .01, 2 x .03, then not less than that
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02, math.nan], [0.02, math.nan]),
        ([], []),
    ],
)
def test_holm(p, expected):
    assert holm(p).tolist() == pytest.approx(expected, nan_ok=True)


def test_a_gain_counts_against_the_best_baseline(project):
    items = load_item_scores(load_study("toy")).query("lang == 'zh' and target == 'zh' and dataset == 'xquad'")
    longer = items.query("method == 'tft'").assign(method="tft_compute", stem="tft_compute", value=lambda t: t["value"].where(t["id"] > "q007", 0.0))
    best = items.query("method == 'tft'").assign(method="tft_en", stem="tft_en", value=lambda t: t["value"].where(t["id"] < "q390", 100.0))
    comparison = compare(pd.concat([items, longer, best]))
    assert comparison[["method", "baseline", "difference"]].values.tolist() == [["dsft_logits", "tft_en", -0.5]]  # 24 against 22 + 2.5
    fewer = best.assign(method="tft_n75", stem="tft")  # a variation of a control is compared, not compared with
    comparison = compare(pd.concat([items, longer, fewer]))
    assert comparison[["method", "baseline", "difference"]].values.tolist() == [["dsft_logits", "tft", 2.0], ["tft_n75", "tft", 2.5]]


def test_other_items_are_not_compared(project):
    items = load_item_scores(load_study("toy")).query("lang == 'zh' and target == 'zh'")
    with pytest.raises(ParamsError, match="micro-llama zh .*: dsft_logits and tft answered different items"):
        compare(items[~((items["method"] == "tft") & (items["id"] == "q001"))])


def test_no_interval_below_three_seeds(project):
    comparison = compare(on_target(load_item_scores(load_study("toy"))).query("seed < 2"))
    assert comparison[["low", "high", "p", "p_holm"]].isna().all(axis=None)
    assert "an interval needs 3 seeds, 2 ran" in verdict(comparison, load_study("toy"))


def test_without_runs_the_committed_tables_are_read(project, capsys):
    results, items, entropy = (load(load_study("toy")) for load in (load_results, load_item_scores, load_entropy))
    write_csv(results, "figures/toy/results.csv")
    write_items(items, "figures/toy/items.parquet")
    write_csv(entropy, "figures/toy/entropy.csv")
    assert capsys.readouterr().out == ""
    os.rename("runs", "elsewhere")
    pd.testing.assert_frame_equal(load_results(load_study("toy")), results)
    pd.testing.assert_frame_equal(load_item_scores(load_study("toy")), items)
    pd.testing.assert_frame_equal(load_entropy(load_study("toy")), entropy, check_dtype=False)
    out = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in out] == ["results.csv.", "items.parquet.", "entropy.csv."]


def test_costs_and_what_was_read_inside(project):
    costs, inside = load_costs(load_study("toy")), load_inside(load_study("toy"))
    assert costs.query("target == 'zh'")[["method", "seed", "steps", "train_seconds"]].values.tolist() == [
        ["tft", 0, 100, 60.0], ["tft", 1, 100, 61.0], ["tft", 2, 100, 62.0], ["dsft_logits", 0, 100, 90.0], ["dsft_logits", 1, 100, 91.0], ["dsft_logits", 2, 100, 92.0]
    ]
    assert inside.empty  # there is no inside.json
    file = project / "runs/toy/micro-llama/zh/tft/seed1/inside.json"
    found = {"study": "toy", "model": "micro-llama", "lang": "zh", "method": "tft", "seed": 1, "rows": [{"layer": 3, "quantity": "en", "value": 0.5}]}
    file.write_text(json.dumps(found))
    assert load_inside(load_study("toy"))[["title", "layer", "quantity", "value"]].values.tolist() == [["TFT", 3, "en", 0.5]]
    file.write_text(json.dumps(found | {"seed": 2}))
    with pytest.raises(ParamsError, match=r"inside\.json: written for another run, toy micro-llama zh tft 2; delete that file"):
        load_inside(load_study("toy"))


def test_query_gaps_stand_beside_those_of_the_base(project):
    """By hand: LC is as blind to the query after training as before, ET is not; the base is measured once, at the critical layers."""
    values = {("base", 0): (-0.01, -0.02, -0.5, -0.06)} | {("tft", seed): (0.0, -0.03, -0.6 - 0.1 * seed, -0.05) for seed in range(3)}
    values |= {("dsft_logits", seed): (-0.011, -0.04, -3.0 - seed, -0.07) for seed in range(3)}
    names = [f"query_gap_{stage}_{kind}" for stage in ("lc", "et") for kind in ("logits", "feature")]
    for (method, seed), found in values.items():
        key = {"study": "toy", "model": "micro-llama", "lang": "zh", "method": method, "seed": seed}
        rows = [{"layer": 2 if "lc" in name else 3, "quantity": name, "value": value} for name, value in zip(names, found)]
        rows.append({"layer": 3, "quantity": "en", "value": 0.5})
        (project / f"runs/toy/micro-llama/zh/{method}/seed{seed}/inside.json").write_text(json.dumps(key | {"rows": rows}))
    gaps = load_query_gaps(load_study("toy"))
    assert list(gaps) == [*QUERY_GAP_COLUMNS, *METHOD_COLUMNS] and len(gaps) == 2 * 7
    assert gaps.query("method == 'dsft_logits' and seed == 2 and kind == 'logits'")[["query_gap_lc", "query_gap_et"]].values.tolist() == [[-0.011, -5.0]]
    table = query_gap_table(load_study("toy"))
    assert table[["method", "kind", "seeds"]].values.tolist() == [["tft", "feature", 3], ["tft", "logits", 3], ["dsft_logits", "logits", 3]]
    last = table.iloc[-1]
    assert last[["query_gap_lc_before", "query_gap_lc", "query_gap_et_before", "query_gap_et"]].tolist() == pytest.approx([-0.01, -0.011, -0.5, -4.0])
    assert query_gap_table(load_study("toy"), ["dsft_logits"], {"vi"}).empty and len(query_gap_table(load_study("toy"), ["dsft_logits"], {"zh"})) == 1
    text = query_gap_text(table)
    assert "| DSFT-logits | logits | -0.010 | -0.011 | -0.500 | -4.000 |" in text
    assert query_gap_text(query_gap_table(load_study("toy"), ["sft"])) == "The query gap was not measured in these runs."
    write_csv(load_inside(load_study("toy")).drop(columns=METHOD_COLUMNS), "figures/toy/inside.csv")  # a clone has this file and no runs
    (project / "runs").rename(project / "elsewhere")
    pd.testing.assert_frame_equal(query_gap_table(load_study("toy")), table)


# ---- bits a byte and clusters
@pytest.fixture
def measured(project):
    """The same runs with bits a byte: an item that is right takes 1, another one 3; one in a hundred has none. Twenty items are on one passage."""
    for path in (project / "runs").rglob("metrics.json"):
        metrics = json.loads(path.read_text())
        samples = [json.loads(line) for line in path.with_name("samples.jsonl").read_text().splitlines()]
        samples = [s | {"cluster": f"p{int(s['id'][1:]) // 20}"} | ({"bits_per_byte": 3 - 2 * s["value"]} if s["id"][-2:] != "99" else {}) for s in samples]
        samples += [{"dataset": "instructions", "lang": lang, "id": f"i{n}", "cluster": f"i{n}", "value": 1.5, "bits_per_byte": 1.5} for lang in (metrics["lang"], "en") for n in range(8)]
        for dataset, lang in dict.fromkeys((s["dataset"], s["lang"]) for s in samples):
            found = [s["bits_per_byte"] for s in samples if (s["dataset"], s["lang"]) == (dataset, lang) and "bits_per_byte" in s]
            metrics["scores"].append({"dataset": dataset, "lang": lang, "metric": "bits_per_byte", "value": statistics.fmean(found), "items": len(found)})
        path.write_text(json.dumps(metrics))
        path.with_name("samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return project


def test_older_runs_and_tables_have_an_item_a_cluster_and_no_bits(project):
    items = load_item_scores(load_study("toy"))
    assert (items["cluster"] == items["id"]).all() and items["bits_per_byte"].isna().all()
    assert in_bits(items).empty and in_bits(load_results(load_study("toy"))).empty
    pd.testing.assert_frame_equal(in_percent(items), items)
    Path("figures/toy").mkdir(parents=True)
    items.drop(columns=[*METHOD_COLUMNS, "cluster", "bits_per_byte"]).to_parquet("figures/toy/items.parquet", index=False)
    os.rename("runs", "elsewhere")
    pd.testing.assert_frame_equal(load_item_scores(load_study("toy")), items)


@pytest.mark.parametrize("study", ["micro", "micro-full", "micro-sweeps", "code_switch_sweep"])
def test_committed_items_load_with_their_clusters(study):
    stored = pd.read_parquet(f"figures/{study}/items.parquet")
    items = load_item_scores(load_study(study).model_copy(update={"runs": "nowhere"}))
    assert len(items) == len(stored) > 10_000
    assert items["cluster"].tolist() == stored["cluster"].tolist() and items["cluster"].nunique() < items["id"].nunique() / 2  # questions about one word are a cluster


def test_bits_stand_in_both_tables_and_leave_the_others_as_they_are(measured, capsys):
    study = load_study("toy")
    results, items = load_results(study), load_item_scores(study)
    assert set(in_percent(results)["metric"]) == set(in_percent(items)["metric"]) == {"f1", "acc"}
    assert set(in_bits(results)["dataset"]) == set(in_bits(items)["dataset"]) == {"xquad", "xcopa", "instructions"}
    assert items.query("dataset == 'instructions'")[["metric", "value"]].drop_duplicates().values.tolist() == [["bits_per_byte", 1.5]]
    assert items.query("dataset == 'xcopa' and id == 'q041'")["cluster"].unique().tolist() == ["p2"]
    assert len(in_bits(items).query("dataset == 'xquad'")) == 0.99 * len(items.query("dataset == 'xquad'"))
    for unit in (in_percent, in_bits):
        means = unit(on_target(items)).astype(dict.fromkeys(CELL, str)).groupby([*CELL, "seed"])["value"].mean()
        pd.testing.assert_series_equal(means, unit(on_target(results)).set_index([*CELL, "seed"])["value"].sort_index(), rtol=1e-6)
    write_csv(results, "figures/toy/results.csv")
    write_items(items, "figures/toy/items.parquet")
    os.rename("runs", "elsewhere")
    pd.testing.assert_frame_equal(load_item_scores(study), items)
    pd.testing.assert_frame_equal(load_results(study), results)


def test_the_papers_tables_do_not_show_bits(measured):
    study = load_study("toy")
    text, comparison = paper_table(study, "table1", QA)
    assert "bits" not in text and comparison["metric"].unique().tolist() == ["f1"] and comparison["difference"].tolist() == [2.0]
    assert "bits" not in Path("figures/toy/table1.csv").read_text()


def test_of_bits_the_lowest_is_the_best(measured):
    text, comparison = paper_table(load_study("toy"), "bits", [*QA, *NLU, "instructions"], unit=in_bits)
    header, _, *lines = text.splitlines()[:5]
    assert header == "| model | method | XQuAD bits a byte, vi | XQuAD bits a byte, zh | XCOPA bits a byte, vi | XCOPA bits a byte, zh | Instructions bits a byte, vi | Instructions bits a byte, zh |"
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[2] == "DSFT-logits" and cells[4].startswith("**2.5") and cells[8] == "1.500 ± 0.000"  # all alike: none is best
    assert "**" not in lines[0] and "**2.5" not in lines[1]
    assert "In bits for each byte of the right answer, of which less is better" in text
    xquad = comparison.query("dataset == 'xquad'").iloc[0]
    assert xquad["difference"] == pytest.approx(-2 * (8 - 1 / 3) / 396) and xquad["items"] == 396 and xquad["low"] < xquad["difference"] < xquad["high"]
    told = verdict(comparison.query("dataset != 'instructions'"), load_study("toy"))
    mean = (2 * (8 - 1 / 3) / 396 + comparison.query("dataset == 'xcopa'")["difference"].abs().iloc[0]) / 2
    assert f"DSFT-logits is {mean:.3f} bits a byte below TFT; it is below in 2 of 2 cells" in told


def test_of_bits_the_control_with_the_fewest_counts(measured):
    items = in_bits(load_item_scores(load_study("toy"))).query("lang == 'zh' and target == 'zh' and dataset == 'xquad'")
    fewer = items.query("method == 'tft'").assign(method="tft_en", stem="tft_en", value=lambda t: t["value"] - 0.5)
    more = items.query("method == 'tft'").assign(method="tft_compute", stem="tft_compute", value=lambda t: t["value"] + 0.5)
    (row,) = compare(pd.concat([items, more, fewer])).itertuples()
    assert (row.baseline, row.difference) == ("tft_en", pytest.approx(0.46, abs=2e-3))
    (gained,) = gains(items, [("dsft_logits", "tft")]).itertuples()
    assert gained.gain == pytest.approx(0.04, abs=2e-3) and gained.low < gained.gain < gained.high  # fewer bits are a gain


def test_comparisons_draw_whole_clusters(measured):
    study = load_study("toy")
    items = on_target(in_percent(load_item_scores(study))).query("target == 'zh'")
    alone = items.assign(cluster=items["id"])
    for dataset, clustered, single in zip(("xquad", "xcopa"), compare(items).itertuples(), compare(alone).itertuples()):
        assert clustered.difference == single.difference and clustered.high - clustered.low > single.high - single.low
        cells = {("micro-llama", "zh", method, dataset, "zh"): weight for method, weight in (("dsft_logits", 1.0), ("tft", -1.0))}
        rows = items[items["dataset"] == dataset]
        pairs = [rows[rows["method"] == method].pivot(index="seed", columns="id", values="value") for method in ("dsft_logits", "tft")]
        of_id = rows.drop_duplicates("id").set_index("id")["cluster"]
        expected = bootstrap((pairs[0] - pairs[1]).to_numpy(), clusters=of_id[pairs[0].columns])
        assert (clustered.low, clustered.high, clustered.p) == expected == estimate(*contrast(items, cells))[1:4]
    both = gains(items, [("dsft_logits", "tft")]).iloc[0]
    assert both["gain"] == pytest.approx(1.5) and both["items"] == 900
    assert both["high"] - both["low"] > np.subtract(*gains(alone, [("dsft_logits", "tft")]).iloc[0][["high", "low"]])


def test_passages_of_two_benchmarks_are_not_one_cluster(measured):
    """XQuAD's and XCOPA's clusters have the same names here."""
    items = on_target(in_percent(load_item_scores(load_study("toy")))).query("target == 'zh'")
    cells = {("micro-llama", "zh", "tft", dataset, "zh"): 0.5 for dataset in ("xquad", "xcopa")}
    assert len(set(contrast(items, cells).clusters)) == 400 // 20 + 500 // 20


@pytest.mark.parametrize("load", [load_results, load_item_scores, load_entropy])
def test_neither_runs_nor_tables(project, load):
    with pytest.raises(FileNotFoundError, match="study nowhere: neither finished runs nor a committed .*; make them with: make study STUDY=nowhere$") as error:
        study = load_study("toy").model_copy(update={"name": "nowhere"})
        study._file = "nowhere"
        load(study)
    assert "\n" not in str(error.value)


def edited(**changes):
    return lambda metrics: json.dumps(metrics | changes)


def with_score(**changes):
    return lambda metrics: json.dumps(metrics | {"scores": [metrics["scores"][0] | changes]})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda metrics: json.dumps(metrics)[:-20], "Invalid JSON"),
        (lambda metrics: "", "Invalid JSON"),
        (lambda metrics: "[]", "object"),
        (edited(scores=None), "scores"),
        (with_score(value="high"), "scores.0.value"),
        (with_score(value=float("nan")), "scores.0.value"),
        (with_score(items=0), "scores.0.items"),
        (edited(method="sft"), "written for another run, toy micro-llama zh sft 1"),
        (edited(seed=7), "written for another run"),
        (lambda metrics: json.dumps(metrics | {"scores": metrics["scores"] * 2}), "the score xcopa en acc stands twice"),
    ],
)
def test_broken_metrics_file(project, spoil, message):
    path = project / "runs/toy/micro-llama/zh/tft/seed1/metrics.json"
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(ParamsError) as error:
        load_results(load_study("toy"))
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)
    assert "delete that file" in str(error.value)


@pytest.mark.parametrize("content", ["", "{", '{"dataset": "xquad"}\n'])
def test_broken_samples_file(project, content):
    path = project / "runs/toy/micro-llama/zh/tft/seed1/samples.jsonl"
    path.write_text(content)
    with pytest.raises(ParamsError, match=r"samples\.jsonl: .*delete metrics\.json") as error:
        load_item_scores(load_study("toy"))
    assert "\n" not in str(error.value)


def test_seeds_on_different_items_are_not_averaged(project):
    path = project / "runs/toy/micro-llama/zh/tft/seed1/metrics.json"
    path.write_text(path.read_text().replace('"items": 400', '"items": 40'))
    with pytest.raises(ParamsError, match="micro-llama/zh/tft, xquad in .*: seeds were tested on 40 and on 400 items"):
        summarise(load_results(load_study("toy")))


def test_broken_layers_file(project):
    path = project / "runs/toy/micro-llama/zh/layers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"entropy": [1.0, None]}))
    with pytest.raises(ParamsError, match=r"layers\.json: entropy\.1"):
        load_entropy(load_study("toy"))


def test_provenance_of_a_study(project):
    with pytest.raises(FileNotFoundError):
        write_provenance(load_study("toy"))  # results.csv comes first
    write_csv(load_results(load_study("toy")), "figures/toy/results.csv")
    record = write_provenance(load_study("toy"))
    assert record == json.loads(Path("figures/toy/provenance.json").read_text())
    assert (record["study"], record["command"], record["runs"], record["seconds"]) == ("toy", "make study STUDY=toy", 11, 11 * 10.5 + 1000)
    assert record["commit"] == ["commit-of-base", "commit-of-dsft_logits", "commit-of-tft"]
    assert (record["packages"], record["dirty"]) == ({"torch": ["2.13.0"]}, [False, True])
    assert record["data_sha256"] == ["data-vi", "data-zh"]
    assert record["results_sha256"] == hashlib.sha256(Path("figures/toy/results.csv").read_bytes()).hexdigest()
    os.rename("runs", "elsewhere")
    assert write_provenance(load_study("toy")) == record


def test_figures_are_reproducible(tmp_path):
    for name in ("a", "b"):
        figure, axes = plt.subplots()
        axes.plot([0, 1], [1, 0], label="x")
        axes.legend()
        save_figure(figure, tmp_path, name)
        plt.close(figure)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]


def analyse(project, name):
    """Execute an analysis notebook on the study; the text of its outputs."""
    parameters = {"study": "toy"}
    executed = papermill.execute_notebook(
        ANALYSIS / f"{name}.ipynb", project / f"{name}.ipynb", parameters, cwd=project, progress_bar=False, kernel_name="python3"
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]
    return "\n".join(o.get("text") or o["data"].get("text/markdown") or o["data"]["text/plain"] for o in outputs)


EVERY = ["table1", "table2", "retention", "figure1", "figure2", "cost"]


def test_bits_of_a_study_and_of_one_that_has_none(measured):
    shown = analyse(measured, "bits")
    folder = measured / "figures" / "toy"
    assert {p.name for p in folder.iterdir()} == {f"{name}.{kind}" for name in ("bits", "bits_against_tft", "bits_english") for kind in ("csv", "md")}
    table = pd.read_csv(folder / "bits.csv")
    assert set(table["metric"]) == {"bits_per_byte"} and set(table["dataset"]) == {"xquad", "xcopa", "instructions"}
    assert "it is below in 2 of 3 cells" in shown  # the instructions are alike
    english = pd.read_csv(folder / "bits_english.csv").set_index(["target", "method", "dataset"])["change"]
    assert english["zh", "tft", "xquad"] == pytest.approx(-0.24, abs=0.01) and english["zh", "tft", "instructions"] == 0
    assert "after TFT the right English answers take 0.1" in shown and "bits a byte less than before" in shown
    assert "bits" not in analyse(measured, "retention").replace("bits.ipynb", "")


def test_bits_of_runs_from_before_they_were_measured(project):
    assert "The models of study toy were evaluated before bits a byte were measured." in analyse(project, "bits")
    for table in ("bits", "bits_english"):
        assert "The models of study toy were evaluated before" in (project / "figures" / "toy" / f"{table}.md").read_text()


def test_analysis_notebooks_from_runs_and_again_from_their_own_tables(project):
    shown = {name: analyse(project, name) for name in EVERY}
    folder = project / "figures" / "toy"
    assert "1 of 1 cell" in shown["table1"] and "2.0 points above TFT" in shown["table1"]
    assert "1.0 points above TFT" in shown["table2"]
    assert "after TFT English scores are 14.8 points above those of the base model" in shown["retention"]  # (12 + 10 + 18 + 19) / 4
    assert "from 6.00 nats at the embeddings to 2.00 after layer 4; the steepest fall is 2.50, at layer 2" in shown["figure2"]
    assert f"DSFT-logits scores 42.5 at {91 / 61:.2f}× the training time of TFT; cheaper and at least as good: TFT." in shown["cost"]
    assert "xcopa" not in (folder / "table1.csv").read_text() and "xquad" not in (folder / "table2.csv").read_text()
    assert "micro-llama,dsft_logits,xquad,zh,f1,24.0,3.0,3,400,24.77" in (folder / "table1.csv").read_text()
    named = {p.stem for p in folder.iterdir()}
    assert named == {*EVERY, "table1_against_tft", "table2_against_tft", "results", "items", "entropy", "entropy_tokens", "costs", "provenance"}
    first = {p.name: p.read_bytes() for p in folder.iterdir()}

    os.rename("runs", "elsewhere")
    assert "reading its committed results.csv" in analyse(project, "table1")
    assert "reading its committed entropy.csv" in analyse(project, "figure2")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
