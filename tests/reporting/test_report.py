"""The report of a hand-written run: what it says, read by an HTML parser, and how it looks in Chromium."""

import base64
import collections
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import synthetic_run
from etils import epath
from grids import grid
from PIL import Image

from clipmoe_jax.core import artifacts, metrics
from clipmoe_jax.reporting import charts, tables, training
from clipmoe_jax.reporting import page as page_of_report
from clipmoe_jax.reporting.expert_sections import expert_names
from clipmoe_jax.reporting.output import write_report
from clipmoe_jax.reporting.read import Folder, NotThereError, read_curves, seed_folders

# In the order of the table's columns.
METRICS = sorted(synthetic_run.METRICS, key=lambda metric: not metric.endswith("_r1"))
VOID = {"meta", "img", "link", "br"}


class Page(html.parser.HTMLParser):
    """Elements with attributes and text, and whether every one is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {[e['tag'] for e in self._open]}"

    def handle_starttag(self, tag, attributes):
        parents = [element["tag"] for element in self._open]
        element = {"tag": tag, "text": "", "parents": parents, **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", "parents": [], **dict(attributes)})

    def handle_endtag(self, tag):
        assert self._open[-1]["tag"] == tag, f"</{tag}> closes <{self._open[-1]['tag']}>"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] in tags]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    synthetic_run.write_run(folder)
    return folder


@pytest.fixture(scope="module")
def text(workdir):
    return write_report(epath.Path(workdir)).read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def seeds(workdir, tmp_path_factory):
    """Two seeds: the run, and a copy whose CLIP-MoE is better by 0.02 everywhere."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    for seed, gain in ((1, 0.0), (2, 0.02)):
        shutil.copytree(workdir, folder / f"seed_{seed}")
        file = folder / f"seed_{seed}" / "eval" / "results.json"
        results = json.loads(file.read_text())
        for metric in synthetic_run.METRICS:
            results["CLIP-MoE"][metric] += gain
        file.write_text(json.dumps(results))
    return folder


def decode(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def table_rows(page: Page, caption: str) -> dict[str, list[tuple[str, bool]]]:
    """{row's heading: (text, whether bold) of each cell} of the table with a caption."""
    rows, inside, cells = {}, False, None
    for element in page.elements:
        if element["tag"] == "table":
            inside = False
        if element["tag"] == "caption":
            inside = element["text"].startswith(caption)
        if not inside:
            continue
        if element["tag"] == "th" and element.get("scope") == "row":
            cells = rows.setdefault(element["text"], [])
        if element["tag"] == "td" and cells is not None:
            cells.append((element["text"], False))
        if element["tag"] == "b" and element["parents"][-1] == "td":
            cells[-1] = (cells[-1][0], True)
    return rows


def test_best_value_of_each_column_is_bold(page, workdir):
    results = json.loads((workdir / "eval" / "results.json").read_text())
    rows = table_rows(page, "Recall in per cent")
    chance = rows.pop("chance")
    # One caption to each of 12 images: the right one among k of them.
    assert [text for text, _ in chance[:6]] == ["8.3", "8.3", "41.7", "83.3", "41.7", "83.3"]
    assert list(rows) == list(synthetic_run.TITLES)
    for column, metric in enumerate(METRICS):
        best = max(results, key=lambda title: results[title][metric])
        assert [title for title in rows if rows[title][column][1]] == [best], metric
        for title, cells in rows.items():
            assert cells[column][0] == f"{100 * results[title][metric]:.1f}"
    assert [cell for cell, _ in rows["CLIP-MoE"][6:]] == ["3.80M", "3.54M"]
    # Named by the fixture: not the maximum of a row, and not all of one model.
    assert rows["stage 1 alone"][5] == ("99.0", True)


def test_least_value_is_bold_where_less_is_better(page):
    rows = table_rows(page, "ood: places")
    assert rows["base"] == [("60.0", False), ("60.0", False)]
    assert rows["CLIP-MoE"] == [("68.0", True), ("52.0", True)]  # 0.6 ± 4/50: highest AUROC, lowest FPR


def test_what_a_fit_chose_is_shown_as_it_is_and_has_no_best():
    found = {"base": (0.5, 0.00316, 0.5, 12.34), "CLIP-MoE": (0.75, 0.001, 1e6, 2.0)}
    metrics = ("top1", "C", "alpha", "i2t_mean_rank")
    results = {
        title: {"evaluations": {"linear_probe:x": dict(zip(metrics, numbers, strict=True))}}
        for title, numbers in found.items()
    }
    [table] = tables.evaluation_tables([results])
    shown = {title: [(cell.text, cell.best) for cell in row] for title, row in table.rows.items()}
    assert shown == {
        "base": [("50.0", False), ("0.00316", False), ("0.5", False), ("12.34", False)],
        "CLIP-MoE": [("75.0", True), ("0.001", False), ("1e+06", False), ("2", True)],
    }


def test_attributes_are_shown_as_a_heat_map_alone(page, workdir):
    results = json.loads((workdir / "eval" / "results.json").read_text())
    [chart] = [c for c in page.all("svg") if c["aria-label"].startswith("Heat map in per cent. Zero-shot")]
    rows = {
        "expert 0: base": "base",
        "expert 1: stage 1": "stage 1 alone",
        "expert 2: stage 2": "stage 2 alone",
    }
    rows["CLIP-MoE"] = "CLIP-MoE"
    for attribute in synthetic_run.CHANCE:
        accuracy = {
            row: results[title]["evaluations"][synthetic_run.ATTRIBUTE_LINE][attribute]
            for row, title in rows.items()
        }
        assert f"{attribute} {max(accuracy, key=accuracy.get)}" in chart["aria-label"]
        assert all(f"{100 * value:.0f}" in chart["text"].split() for value in accuracy.values())
    captions = [element["text"] for element in page.all("caption")]
    assert "ood: places" in captions and not any("attributes" in caption for caption in captions)


def test_attributes_are_shown_without_a_test_set_for_recall(workdir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    file = folder / "eval" / "results.json"
    results = json.loads(file.read_text())
    for numbers in results.values():
        for metric in synthetic_run.METRICS:
            del numbers[metric]
    file.write_text(json.dumps(results))
    page = Page(write_report(epath.Path(folder)).read_text())
    assert any("Zero-shot accuracy, the best" in chart["aria-label"] for chart in page.all("svg"))


def test_equal_best_values_are_all_bold():
    cells = tables.score_cells(100 * np.array([[[0.5, 0.1], [0.5, 0.2]]]))
    assert [[cell.best for cell in row] for row in cells] == [[True, False], [True, True]]


def test_summary_states_the_numbers_of_the_results(page, workdir):
    results = json.loads((workdir / "eval" / "results.json").read_text())
    [lead] = [element["text"] for element in page.all("p") if element.get("class") == "lead"]
    for key in ("image_to_text_r1", "text_to_image_r1"):
        base, moe = 100 * results["base"][key], 100 * results["CLIP-MoE"][key]
        for number in (f"{moe:.1f}\u202f%", f"{base:.1f}\u202f%", f"{moe - base:+.1f}"):
            assert number in lead
    assert "12 test images" in lead and "1.04 times" in lead  # 3.54 / 3.40
    assert "feature ensemble" in lead and "at 4.03 times" in lead  # 13.7 / 3.4


def test_page_says_when_and_where_the_run_was_made(page):
    """metrics.jsonl begins a billion seconds after 1970, 9 September 2001; routers alone say how long they
    took: 500 s for what the last start made and 120 steps before it, each 420 / 80 s."""
    assert "9 September 2001, 19 min on 8 × TPU v5p; jax 0.10.2" in {p["text"] for p in page.all("p")}


def test_duration_is_that_of_what_the_run_made(tmp_path):
    """Pauses count as little as data and copies; of earlier versions nothing is known."""
    folder = Folder(epath.Path(tmp_path), epath.Path(tmp_path))
    synthetic_run.write_json(tmp_path / "base/done.json", {"measured": {}})
    assert folder.seconds() is None

    def write(name, finished, seconds, measured=None, **others):
        made = {"finished": finished, "seconds": seconds, "devices": "1 × cpu"}
        synthetic_run.write_json(
            tmp_path / name / "done.json", {"made": made, "measured": measured or {}} | others
        )

    write("base", 1e9, 10.0)
    write("stage_1/features", 1.1e9, 2.0, copied_from="other/stage_1/features")
    write("data/train", 1e9, 200.0)
    write("evaluated/base/test", 1.2e9, 3.0)
    write("eval", 1.3e9, 4.0)
    write("moe/params", 1.3e9, 20.0, {"num_steps": 100, "steps_now": 25, "seconds_now": 16.0})
    assert folder.seconds() == 10 + 3 + 4 + 20 + 75 * 16 / 25


def test_phases_have_their_time_and_what_of_it_was_compilation(page):
    rows = table_rows(page, "Phases of training")
    assert [text for text, _ in rows["stage 1"][:3]] == ["400", "61 s", "12 s"]
    assert [text for text, _ in rows["routers"][:3]] == ["200", "7 min for the last 80", "30 s"]
    assert [text for text, _ in rows["dense base"][1:3]] == ["2 min", ""]  # no done.json: of logged lines


def test_lead_names_the_best_control_of_as_many_pairs(workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "run")
    results = json.loads((folder / "eval" / "results.json").read_text())
    pairs = {"base": 0, "stage 1 alone": 992, "stage 2 alone": 1008, "feature ensemble": 1100}
    for title, numbers in results.items():
        numbers |= {"retention": 0.25, "pairs": pairs.get(title, 1000), "flops": 1.0}
    results["stage 2 alone"]["retention"] = 0.125
    synthetic_run.write_json(folder / "eval" / "results.json", results)
    [lead] = [
        e["text"]
        for e in Page(write_report(epath.Path(folder)).read_text()).all("p")
        if e.get("class") == "lead"
    ]
    i2t, t2i = (100 * results["stage 2 alone"][f"{d}_r1"] for d in ("image_to_text", "text_to_image"))
    lead = " ".join(lead.split())
    assert f"best control, stage 2 alone, reaches {i2t:.1f} % and {t2i:.1f} %" in lead
    assert "CLIP-MoE 25.0 %, that control 12.5 %" in lead


def test_one_seed_has_intervals(workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "run")
    results = json.loads((folder / "eval" / "results.json").read_text())
    for row, numbers in enumerate(results.values()):
        numbers |= {f"{m}_error": 0.01 * (row + 1) for m in synthetic_run.METRICS}
    synthetic_run.write_json(folder / "eval" / "results.json", results)
    rows = table_rows(Page(write_report(epath.Path(folder)).read_text()), "Recall in per cent; ±")
    assert [rows[title][0][0].partition(" ± ")[2] for title in list(rows)[:3]] == ["1.0", "2.0", "3.0"]


def test_every_curve_of_a_panel_looks_its_own():
    looks = {training._look(f"baseline {place}", place) for place in range(training.MAX_CURVES)}
    assert len(looks) == training.MAX_CURVES


def test_numbers_of_points_stand_apart():
    places = np.concatenate([np.random.default_rng(0).normal(100, 6, (12, 2)), [[300, 300]]])
    numbers = charts._apart(places)
    gaps = np.abs(numbers[:, None] - np.concatenate([places, numbers])) / charts.NUMBER_SIZE
    gaps[np.arange(13), np.arange(13) + 13] = 1  # each to itself
    assert (gaps.max(axis=2) >= 1).all()
    assert np.hypot(*(numbers[-1] - places[-1])) == pytest.approx(charts.NUMBER_AWAY)


def test_experts_are_named_by_the_config(tmp_path):
    folder = Folder(epath.Path(tmp_path), epath.Path(tmp_path))
    assert expert_names(folder, 2) == [(0, "base"), (1, "stage 1")]
    config = {"mcl": {"num_stages": 3}, "moe": {"experts": ["base", "last_stage", "base", "consolidation"]}}
    config["base"] = {"architecture": {"moe": None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ["base", "stage 3", "base", "dense curriculum"]
    assert expert_names(folder, 4) == list(enumerate(names))
    config["base"], config["moe"] = (
        {"architecture": {"moe": {"num_experts": 2}}},
        {"experts": ["base", "mcl_1"]},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ["expert 0 of the base", "expert 1 of the base", "stage 1"]
    assert expert_names(folder, 3) == list(enumerate(names))


@pytest.fixture(scope="module")
def keeping_page(workdir, tmp_path_factory):
    """The page of the run with retention, costs, and two blends of its last stage with the base."""
    folder = tmp_path_factory.mktemp("runs") / "keeping"
    shutil.copytree(workdir, folder)
    file = folder / "eval" / "results.json"
    results = json.loads(file.read_text())
    for row, numbers in enumerate(results.values()):
        numbers |= {"retention": 0.7 - 0.1 * row, "pairs": 1000 * row, "flops": 2.5e12 * row}
    both = {"image_to_text_r1": 0.3, "text_to_image_r1": 0.2, "retention": 0.6}
    results["stage 2 alone"]["blends"] = {"0.25": both, "0.75": both | {"retention": 0.4}}
    file.write_text(json.dumps(results))
    return Page(write_report(epath.Path(folder)).read_text())


def test_what_the_base_knew_is_a_column_and_a_sentence(keeping_page):
    rows = table_rows(keeping_page, "Recall in per cent")
    assert [cells[2] for title, cells in rows.items() if title != "chance"] == [
        *(("70.0", True), ("60.0", False), ("50.0", False), ("40.0", False), ("30.0", False))
    ]
    [lead] = [element["text"] for element in keeping_page.all("p") if element.get("class") == "lead"]
    assert "Of what the base knew, the base has 70.0\u202f% right and CLIP-MoE 30.0\u202f%" in lead
    assert "the model with the highest recall 40.0\u202f%" in lead


def test_training_costs_are_columns(keeping_page, page):
    rows = table_rows(keeping_page, "Recall in per cent")
    assert [cell for cell, _ in rows["CLIP-MoE"][-2:]] == ["4.00k", "10.00T"]
    assert [cell for cell, _ in table_rows(page, "Recall in per cent")["base"][-2:]] == ["3.40M", "3.40M"]


def test_both_axes_are_a_chart_with_a_point_for_each_model(keeping_page, page):
    [chart] = [e for e in keeping_page.all("svg") if e["aria-label"].startswith("Old knowledge and new")]
    for number, title in enumerate(synthetic_run.TITLES, 1):
        assert f"{title} {70 - 10 * (number - 1)}.0" in chart["aria-label"] and str(number) in chart["text"]
    [points] = [e for e in keeping_page.all("ol") if e.get("class") == "points"]
    [listed] = [
        [e["text"] for e in keeping_page.all("li") if "ol" in e["parents"]],
    ]
    assert listed == list(synthetic_run.TITLES) and points["text"] == "".join(listed)
    assert not [e for e in page.all("svg") if e["aria-label"].startswith("Old knowledge")]


def test_lines_are_explained_where_there_are_blends(keeping_page, workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "run")
    results = json.loads((folder / "eval" / "results.json").read_text())
    for numbers in results.values():
        numbers["retention"] = 0.5
    synthetic_run.write_json(folder / "eval" / "results.json", results)
    without = Page(write_report(epath.Path(folder)).read_text())
    told = [[e["text"] for e in p.all("p") if e["text"].startswith("Up:")] for p in (keeping_page, without)]
    assert ["Thin lines" in text for [text] in told] == [True, False]


def test_several_seeds_are_means_with_deviations(seeds):
    page = Page(write_report(epath.Path(seeds)).read_text())
    first, second = (
        json.loads((seeds / f"seed_{s}" / "eval" / "results.json").read_text())["CLIP-MoE"] for s in (1, 2)
    )
    rows = table_rows(page, "Recall in per cent, mean ± standard deviation of 2 seeds")
    rows.pop("chance")
    for column, metric in enumerate(METRICS):
        mean = 50 * (first[metric] + second[metric])
        assert rows["CLIP-MoE"][column][0] == f"{mean:.1f} ± 1.4"  # two values 2 apart: sqrt(2)
        assert rows["base"][column][0].endswith("± 0.0")
    differences = table_rows(page, "CLIP-MoE minus")["base"]
    mean, least, most = (float(cell.partition(" /")[0].replace("−", "-")) for cell, _ in differences[:3])
    assert most - least == pytest.approx(2, abs=0.11) and mean - least == pytest.approx(1, abs=0.11)
    assert differences[3][0] == "2 / 2"
    [lead] = [element["text"] for element in page.all("p") if element.get("class") == "lead"]
    assert "means of 2 seeds" in lead and "in\neach of them" in lead
    assert "Of seed_1 alone." in {element["text"] for element in page.all("p")}


def test_seeds_that_lack_models_of_others_are_compared_in_what_all_have(seeds, tmp_path):
    """As of a run that goes on with more baselines."""
    folder = tmp_path / "two"
    shutil.copytree(seeds, folder)
    file = folder / "seed_1" / "eval" / "results.json"
    results = json.loads(file.read_text())
    more = {"more": results["base"], **results}
    more["base"] = results["base"] | {"blends": {"0.5": results["base"]}}
    file.write_text(json.dumps(more))
    caption = "Recall in per cent, mean ± standard deviation of 2 seeds"
    rows, expected = (
        table_rows(Page(write_report(epath.Path(path)).read_text()), caption) for path in (folder, seeds)
    )
    assert rows == expected and "more" not in rows


def test_captions_are_escaped(page, text):
    assert "<script" not in text and not page.all("script")
    shown = [element for element in page.all("p", "dd") if element["text"].strip() == synthetic_run.SCRIPT]
    assert len(shown) == 3  # the largest cluster of two stages, and the neighbours
    assert any("<script>" in element["text"] for element in page.all("span"))  # a token


def test_captions_turn_no_text_around(workdir, tmp_path):
    """A right-to-left override ends nowhere: what follows it would be read backwards."""
    folder = shutil.copytree(workdir, tmp_path / "run\u202eknaf")
    for name in ("eval/neighbours.json", "eval/heat_maps.json"):
        content = (folder / name).read_text(encoding="utf-8")
        script = json.dumps(synthetic_run.SCRIPT)[1:-1]
        assert script in content
        (folder / name).write_text(content.replace(script, r"\u202efdp.exe \u2067\u05e9 \u001b[2J"))
    text = write_report(epath.Path(folder)).read_text()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", text)
    page = Page(text)
    hostile = r"\u202efdp.exe \u2067" + "\u05e9" + r" \x1b[2J"
    shown = [element for element in page.all("dd") if element["text"].strip() == hostile]
    assert shown and all(element["dir"] == "auto" for element in shown)
    assert r"run\u202eknaf" in page.all("h1")[0]["text"] and r"run\u202eknaf" in page.all("title")[0]["text"]


def test_charts_have_room_for_so_much():
    """A stranger's numbers: each part of a chart takes milliseconds."""
    many = [str(i) for i in range(2001)]
    look = {"x": "x", "strong": ""}
    for draw in (
        lambda: charts.draw_paired_bars("name", "alt", many, {"y": (np.zeros(2001), None)}, **look),
        lambda: charts.draw_scatter("name", "alt", dict.fromkeys(many, (0.0, 0.0)), {}, y="y", **look),
        lambda: charts.draw_matrix("name", "alt", np.zeros((2001, 1)), many, ["x"], low=0, high=1),
        lambda: charts.draw_shares("name", "alt", many, np.zeros((2001, 1))),
    ):
        with pytest.raises(ValueError, match="a chart has room for .*, not for 2,001"):
            draw()


def test_characters_that_a_font_lacks_are_no_warning(recwarn):
    """Whoever reads the page has other fonts."""
    charts.draw_shares("name", "alt", ["東\x1b"], np.ones((1, 1)))
    assert not recwarn.list


def test_page_loads_nothing_from_elsewhere(page, text):
    assert not re.search(r"https?:|//[a-z]+\.", text)
    assert not page.all("script", "iframe", "object", "embed", "audio", "video", "source")
    for element in page.elements:
        for name in ("src", "href", "srcset", "data", "poster"):
            assert element.get(name, "#").startswith(("#", "data:")), element
    assert all(url.startswith(("data:", "#")) for url in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text


def test_pictures_and_charts_have_alternative_texts(page):
    images = page.all("img")
    # 2 stages x 2 clusters x 6 examples, 2 examples x (image + 2 blocks), 3 neighbours
    assert len(images) == 24 + 6 + 3
    assert all(image["alt"].strip() for image in images)
    charts = page.all("svg")
    assert len(charts) > 20
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 20 for chart in charts)
    assert len({chart["aria-label"] for chart in charts}) == len(charts)


def test_page_is_well_formed(page, text):
    assert text.startswith('<!doctype html>\n<html lang="en">')
    [title] = page.all("title")
    assert title["text"] == "tiny: a CLIP-MoE run"
    [viewport] = [element for element in page.all("meta") if element.get("name") == "viewport"]
    assert viewport["content"] == "width=device-width, initial-scale=1"
    assert [element["text"] for element in page.all("h1")] == ["tiny"]
    levels = [int(element["tag"][1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = collections.Counter(element["id"] for element in page.elements if "id" in element)
    assert max(ids.values()) == 1, ids.most_common(1)
    for element in page.elements:
        for name in ("href", "aria-labelledby"):
            target = element.get(name, "")
            if target.startswith("#") or name == "aria-labelledby" and target:
                assert target.removeprefix("#") in ids
    assert all(name in ids for name in re.findall(r"url\(#([^)]*)\)", text))


def test_examples_come_from_the_two_largest_clusters(page, workdir):
    labels = np.load(workdir / "stage_1" / "clusters" / "pseudo_labels.npy")
    sizes = sorted(collections.Counter(labels.tolist()).values(), reverse=True)
    headings = [element["text"] for element in page.all("h4")][:2]
    assert headings == [f"Largest: {sizes[0]} pairs", f"Second largest: {sizes[1]} pairs"]
    alts = " ".join(image["alt"] for image in page.all("img"))
    shown = re.findall(r"Training image (\d+), stage 1, cluster (\d+)", alts)
    assert len(shown) == 12 and all(labels[int(record)] == int(cluster) for record, cluster in shown)


def test_words_that_a_wrong_answer_adds_are_marked(page):
    marked = [element["text"] for element in page.all("mark")]
    assert marked[-2:] == ["lime", "lime"]  # "a small lime two …" for "a small cyan two …", twice
    assert marked[:-2] == "small lime two on dotted navy".split()  # the script's caption has "a" alone


def test_heat_maps_colour_patches_and_words_by_expert(page, workdir):
    with np.load(workdir / "eval" / "heat_maps.npz") as arrays:
        visual, words = arrays["visual_experts"], arrays["text_experts"]
    maps = [element for element in page.all("img") if element["alt"].startswith("Block")]
    colours = {}
    for element, experts in zip(maps, visual.reshape(-1, 2, 2), strict=True):
        picture = decode(element["src"].partition(",")[2]).convert("RGBA")
        for place, expert in np.ndenumerate(experts):
            colours.setdefault(int(expert), set()).add(picture.getpixel(place[::-1])[:3])
    assert all(len(of_expert) == 1 for of_expert in colours.values())  # one colour an expert
    assert len(set.union(*colours.values())) == len(colours)
    tokens = [element for element in page.all("span") if element.get("class") == "token"]
    assert len(tokens) == 2 * 5
    assert tokens[0]["title"] == f"experts {words[0, 0, 0]}, {words[0, 1, 0]}"
    assert tokens[9]["title"] == f"experts {words[1, 0, 4]}, {words[1, 1, 4]}"


def test_cost_is_compared_with_the_base(page):
    rows = table_rows(page, "On the machine that evaluated")
    assert rows["CLIP-MoE"][5][0] == "3.50 1.75×" and rows["base"][5][0] == "2.00"


def test_steps_written_twice_count_as_written_last(workdir):
    curves = read_curves(Folder(epath.Path(workdir), epath.Path(workdir)))
    assert list(curves) == ["base", "mcl_1", "mcl_2", "router", "direct_ft"]
    assert curves["mcl_1"]["step"].tolist() == list(range(10, 401, 10))
    assert curves["mcl_1"]["loss"].max() < 2  # not the 99 of the line that was written again


def test_line_cut_off_by_a_kill_costs_nothing_else(tmp_path):
    """A resumed run writes on where the cut line ends, without a line break."""
    lines = [json.dumps({"phase": "base", "step": step, "loss": 0.5}) for step in (10, 20)]
    (tmp_path / "metrics.jsonl").write_text(lines[0][:30] + lines[0] + "\n" + lines[1] + "\n" + lines[0][:9])
    curves = read_curves(Folder(epath.Path(tmp_path), epath.Path(tmp_path)))
    assert curves["base"]["step"].tolist() == [10, 20]


def test_numbers_may_come_and_go_between_lines(tmp_path):
    """As validation does that is turned on when a killed run goes on."""
    lines = [
        {"step": 10, "loss": 0.5},
        {"step": 20, "loss": 0.4, "validation_r1": 0.1},
        {"step": 30, "loss": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"phase": "base"} | line) + "\n" for line in lines)
    )
    curve = read_curves(Folder(epath.Path(tmp_path), epath.Path(tmp_path)))["base"]
    np.testing.assert_array_equal(curve["validation_r1"], [np.nan, 0.1, np.nan])


DAMAGED_LINES = {
    "no object": ("]}", "is damaged"),
    "no line break before": ('j{"phase": "base", "step": 2}', "is damaged"),
    "no end": ('{"phase": "base", "step": 2', "is damaged"),
    "no phase": ('{"step": 3}', ": no field 'phase'"),
    "a word for a step": ('{"phase": "base", "step": "x"}', ": step is 'x', not a number"),
}


@pytest.mark.parametrize(("line", "message"), DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_damaged_line_is_named(tmp_path, line, message):
    first = json.dumps({"phase": "base", "step": 1, "loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{line}\n{first}\n")
    with pytest.raises(ValueError, match=f"^line 2 of {tmp_path}/metrics.jsonl ?{message}"):
        read_curves(Folder(epath.Path(tmp_path), epath.Path(tmp_path)))


@pytest.mark.parametrize(
    ("file", "place", "value"),
    grid(
        ("results.json", ("base", "image_to_text_r1"), "x"),
        ("routing_change.json", ("text",), {}),
        ("experts.json", ("diversity",), "x"),  # which the template finds
        rest=[
            ("results.json", ("CLIP-MoE", "parameters"), []),
            ("results.json", ("base",), None),
            ("routing.json", ("text", "load", 0, 0), "x"),
            ("neighbours.json", ("base_right", 0, "base", 1), []),
            ("cost.json", ("base", "pairs_per_second"), "x"),
        ],
    ),
)
def test_file_with_an_odd_value_is_named(tmp_path, file, place, value):
    folder = tmp_path / "run"
    synthetic_run.write_results(folder, np.random.default_rng(0))
    synthetic_run.write_diagnostics(folder / "eval", np.random.default_rng(0), num_experts=3)
    (folder / "metrics.jsonl").touch()
    if file == "neighbours.json":
        synthetic_run.write_records(folder / "data", "test", 4, seed=0)
        datasets = {"test": {"path": "data/test", "split": "test", "source": "digit_scenes:test"}}
        synthetic_run.write_json(folder / "datasets.json", datasets)
    content = changed = json.loads((folder / "eval" / file).read_text())
    for key in place[:-1]:
        changed = changed[key]
    changed[place[-1]] = value
    synthetic_run.write_json(folder / "eval" / file, content)
    with pytest.raises(ValueError, match=f"{folder}/eval/{file}.* is damaged, or of another version"):
        write_report(epath.Path(folder))


def test_more_experts_than_colours_have_a_page(tmp_path):
    folder = tmp_path / "run"
    synthetic_run.write_results(folder, np.random.default_rng(0))
    synthetic_run.write_diagnostics(folder / "eval", np.random.default_rng(0), num_experts=12)
    (folder / "metrics.jsonl").touch()
    page = Page(write_report(epath.Path(folder)).read_text())
    classes = {element.get("class") or "" for tag in ("b", "i") for element in page.all(tag)}
    assert {"e0", "e9"} <= classes and not {"e10", "e11"} & classes


def test_run_that_has_written_no_line_yet_has_a_page(tmp_path):
    """As while it imports its base."""
    (tmp_path / "metrics.jsonl").touch()
    page = Page(write_report(epath.Path(tmp_path)).read_text())
    boxes = [element["text"] for element in page.all("div") if element.get("class") == "absent"]
    assert any("metrics.jsonl" in box and f"--workdir={tmp_path} --stage=base" in box for box in boxes)


def test_same_files_give_the_same_bytes(workdir, text):
    assert write_report(epath.Path(workdir)).read_text() == text


NOT_THERE = {
    "not evaluated": {
        "eval/results.json": "--stage=evaluate",
        "eval/routing.json": "--stage=evaluate",
        "eval/heat_maps.npz": "--stage=evaluate",
        "eval/experts.json": "--stage=evaluate",
        "eval/neighbours.json": "--stage=evaluate",
        "eval/cost.json": "--stage=evaluate",
        "stage_1/clusters/pseudo_labels.npy": "--stage=cluster_1",
    },
    "data gone": {"data/train": "--stage=data", "data/test": "--stage=data"},
    "not finished": {"config.json": ""},
}


@pytest.mark.parametrize("files", NOT_THERE.values(), ids=NOT_THERE)
def test_missing_file_is_named_with_the_command_that_makes_it(workdir, tmp_path, files):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    for name in files:
        (folder / name).rename(tmp_path / name.replace("/", "-"))
    page = Page(write_report(epath.Path(folder)).read_text())
    boxes = [element["text"] for element in page.all("div") if element.get("class") == "absent"]
    assert len(page.all("h2")) == 9
    for name, stage in files.items():
        made_by = f"python -m clipmoe_jax.main --config=CONFIG --workdir={folder} {stage}".strip()
        again = f"python -m clipmoe_jax.report --workdir={folder}"
        assert any(name in box and f"{made_by}\n{again}" in box for box in boxes), name


def test_name_of_a_workdir_adds_nothing_to_a_command_to_copy(tmp_path):
    folder = tmp_path / "run\ntouch here; ls \u200e"
    folder.mkdir()
    with pytest.raises(FileNotFoundError) as none:
        seed_folders(epath.Path(folder))
    quoted = f"'{tmp_path}/run\\ntouch here; ls \\u200e'"
    assert str(none.value).endswith(f"--config=CONFIG --workdir={quoted}")
    (folder / "metrics.jsonl").touch()
    page = Page(write_report(epath.Path(folder)).read_text())
    boxes = [element["text"] for element in page.all("pre")]
    assert any(box.endswith(f"python -m clipmoe_jax.report --workdir={quoted}") for box in boxes)
    assert page.all("h1")[0]["text"] == "run\\ntouch here; ls \\u200e"


def test_data_of_a_workdir_of_version_0_1_is_found(workdir, tmp_path):
    """It has no datasets.json: the config names the user's data, and the demo's lies beside it."""
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    (folder / "datasets.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["data"] = {"train": "", "test": str(folder / "data" / "test"), "test_split": "test[:5]"}
    (folder / "config.json").write_text(json.dumps(config))
    run = Folder(epath.Path(folder), epath.Path(folder))
    assert len(run.records("train")) == synthetic_run.NUM_PAIRS and len(run.records("test")) == 5


def name_data(folder, path, config, source=""):
    """Has a run's files say where its training pairs lie."""
    dataset = {"path": path, "split": "train", "source": source}
    (folder / "datasets.json").write_text(json.dumps({"train": dataset}))
    (folder / "config.json").write_text(json.dumps({"data": {"train": config}}))


ELSEWHERE = {
    "another folder": ("/home", "data/train", ""),
    "a bucket": ("gs://bucket/data", "data/train", ""),
    "no folder of a run": ("../../../home", "digit_scenes:train", "digit_scenes:train"),
    "another name": ("../data/../../home", "digit_scenes:train", "digit_scenes:train"),
}


@pytest.mark.parametrize(("path", "config", "source"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_data_elsewhere_than_the_config_says_is_not_opened(tmp_path, path, config, source):
    """A stranger's run could have private images shown, or a bucket opened with the user's credentials."""
    name_data(tmp_path, path, config, source)
    with pytest.raises(ValueError, match=f"datasets.json: train lies in '{path}', .*: it is not opened"):
        Folder(epath.Path(tmp_path), epath.Path(tmp_path)).records("train")


def test_data_elsewhere_is_told_before_it_is_opened(workdir, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    data = str(workdir / "data" / "train")
    name_data(tmp_path, data, config=data)
    told = []
    monkeypatch.setattr(
        page_of_report, "_made", lambda *_: told.append("made") or {"absent": NotThereError("", "")}
    )
    page_of_report.render(epath.Path(tmp_path), told.append)
    assert told[:2] == [f"opens {data} for images and captions, as the run's config says", "made"]


@pytest.mark.parametrize("content", [[], {}, {"data": 3}, {"data": {"train": 3}}], ids=str)
def test_config_that_is_none_is_no_reason_to_open_data(tmp_path, content):
    name_data(tmp_path, "/home", config="/home")
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert Folder(epath.Path(tmp_path), epath.Path(tmp_path)).data_elsewhere() == []


RUN_FILES = ("config.json", "datasets.json", "eval/results.json")


@pytest.mark.parametrize("name", RUN_FILES)
def test_flipped_bit_of_a_file_of_a_run_is_told(tmp_path, name):
    folder = Folder(epath.Path(tmp_path), epath.Path(tmp_path))
    for file in RUN_FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        artifacts.write_verified_json(epath.Path(tmp_path / file), {"data": {"train": 1024}})

    def read():
        folder.config(), folder.json("eval/results.json", "evaluate")
        with pytest.raises(NotThereError):
            folder.records("train")

    read()
    artifacts.write_verified_json(epath.Path(tmp_path / name), {"data": {"train": 1025}})
    read()  # written anew
    content = (tmp_path / name).read_text()
    (tmp_path / name).write_text(content.replace("1025", "1035"))
    with pytest.raises(ValueError, match=f"{name} is damaged .its CRC-32 is .*: (copy it|delete .*eval)"):
        read()


def test_any_flipped_bit_of_the_training_numbers_is_told(tmp_path):
    """Or costs nothing: the number of a line is that which was written."""
    run = metrics.Metrics(epath.Path(tmp_path))
    run._lines.add('{"phase": "base", "st')  # cut off by a kill
    for step in (1, 2):
        run.log("base", step, {"loss": 0.5 / step})
    run.close()
    folder, file = Folder(epath.Path(tmp_path), epath.Path(tmp_path)), tmp_path / "metrics.jsonl"
    whole, contents = read_curves(folder)["base"], file.read_bytes()
    assert whole["loss"].tolist() == [0.5, 0.25] and "crc32" not in whole
    silent = 0
    for bit in range(0, 8 * len(contents), 5):
        damaged = bytearray(contents)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = read_curves(folder)
        except ValueError as error:
            assert f"{file}" in str(error)
        else:
            silent += list(found) != ["base"] or any((found["base"][n] != whole[n]).any() for n in whole)
    assert silent == 0


def test_deleted_user_data_is_named_with_the_command_that_prepares_it(workdir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    name_data(folder, "nowhere/train", config="nowhere/train")
    with pytest.raises(NotThereError) as gone:
        Folder(epath.Path(folder), epath.Path(folder)).records("train")
    assert gone.value.what == "nowhere/train"
    assert gone.value.command == "python -m clipmoe_jax.prepare --source=KIND:PATH --out=nowhere/train"


def test_run_with_one_logged_step_has_a_page(tmp_path):
    """One phase's first line and nothing else."""
    values = ("loss", "batch_accuracy", "learning_rate", "pairs_per_second", "input_wait_fraction", "time")
    line = json.dumps({"phase": "base", "step": 10, **dict.fromkeys(values, 0.5)})
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    page = Page(write_report(epath.Path(tmp_path)).read_text())
    assert len(page.all("svg")) == 2  # loss and learning rate
    absent = [element for element in page.all("div") if element.get("class") == "absent"]
    assert len(absent) == 9  # the summary, and every section but training


def test_many_phases_are_a_table_and_some_curves(tmp_path):
    """A stranger's metrics.jsonl: drawing took 5 milliseconds a phase."""
    values = ("loss", "batch_accuracy", "learning_rate", "pairs_per_second", "input_wait_fraction", "time")
    lines = [{"phase": f"p{i}", "step": 10, **dict.fromkeys(values, 0.5)} for i in range(50)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = Page(write_report(epath.Path(tmp_path)).read_text())
    [chart] = page.all("svg")  # no learning rates: these are drawn of other phases
    assert chart["text"].count("p") - chart["text"].count("step") == 40
    titles = [element["text"] for element in page.all("figcaption")]
    assert titles == ["Loss. Baselines, the first 40 of 50"]
    assert len(table_rows(page, "Phases of training")) == 50


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "no run"])
def test_workdir_without_a_run_is_refused_in_one_line(tmp_path, there):
    workdir = tmp_path / "runs"
    if there:
        (workdir / "seed_1").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "clipmoe_jax.report", f"--workdir={workdir}"],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},  # no such device is there, and none is needed
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: --workdir={workdir} {'has no run in it' if there else 'does not exist'}")
    assert "python -m clipmoe_jax.main --config=CONFIG --workdir=" in line


FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A real Chromium without a window."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.fail(
            "the report is tested in Chromium, which is not there: install the packages chromium and "
            "chromium-driver (apt-get install -y chromium chromium-driver)"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def look(browser, workdir, width: int, scheme: str) -> np.ndarray:
    """Opens the page at a width, light or dark; a picture of all of it, uint8 (H, W, 3)."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get((workdir / "report.html").as_uri())
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return np.asarray(decode(shot["data"]).convert("RGB"))


@pytest.mark.parametrize(
    ("width", "scheme"), grid((390, "dark"), (1280, "light"), rest=[(390, "light"), (1280, "dark")])
)
def test_chromium_shows_the_page_whole(browser, workdir, text, width, scheme):
    browser.get_log("browser")
    shot = look(browser, workdir, width, scheme)
    assert browser.get_log("browser") == []
    empty = "return [...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert browser.execute_script(empty) == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [url for url in loaded if not url.startswith("data:")] == []
    page_colour, brightness = shot[2, 2], shot.mean()
    assert shot.shape[1] == width and shot.shape[0] > 3000
    if scheme == "dark":
        assert page_colour.max() < 40 and brightness < 90
    else:
        assert page_colour.min() > 240 and brightness > 180


# Text whose contrast with what it stands on is under 4.5, by the formulas of WCAG 2 (1.4.3).
CONTRAST = """
const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const faint = [], tags = 'p, td, th, a, h1, h2, h3, h4, caption, figcaption, dt, dd, mark, i, em, svg text';
for (const e of document.querySelectorAll(tags)) {
  const style = getComputedStyle(e);
  if (!e.textContent.trim() || !e.getClientRects().length || style.fontSize === '0px') continue;
  let back = [0, 0, 0, 0];
  for (let under = e; under && back[3] === 0; under = under.parentElement)
    back = numbers(getComputedStyle(under).backgroundColor);
  const ink = numbers(e.ownerSVGElement ? style.fill : style.color);
  const [low, high] = [luminance(ink), luminance(back)].sort((a, b) => a - b);
  if ((high + .05) / (low + .05) < 4.5) faint.push([e.tagName, e.textContent.slice(0, 30), ink, back]);
}
return [faint, document.querySelectorAll(tags).length]"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(browser, workdir, text, scheme):
    look(browser, workdir, 1280, scheme)
    faint, looked_at = browser.execute_script(CONTRAST)
    assert faint == [] and looked_at > 300


@pytest.mark.parametrize("width", [390, 1200])
def test_both_axes_are_seen_without_scrolling(browser, workdir, tmp_path, width):
    folder = shutil.copytree(workdir, tmp_path / "run")
    results = json.loads((folder / "eval" / "results.json").read_text())
    for title in list(results):
        results[title] |= {"retention": 0.25, **dict.fromkeys([f"{m}_error" for m in METRICS], 0.05)}
        results[title] |= dict.fromkeys([f"{metric}_random_ties" for metric in METRICS], 0.75)
        if title != "CLIP-MoE":
            results[f"{title}, same total pairs as a mixture"] = results[title]
    synthetic_run.write_json(folder / "eval" / "results.json", results)
    write_report(epath.Path(folder))
    look(browser, folder, width, "light")
    places = """
        const table = document.querySelector('#results .scroll');
        const old = [...table.querySelectorAll('th')].find(heading => heading.textContent === 'old');
        return [old, table].map(element => element.getBoundingClientRect().right)"""
    old, edge = browser.execute_script(places)
    assert old <= edge
