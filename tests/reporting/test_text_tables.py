"""The tables for a terminal, from results written by hand."""

from clipmoe_jax.evaluation import scores
from clipmoe_jax.reporting import text_tables

LINE, OTHER = "attributes:data.test", "attributes:data/scenes"


def make_results(gain=0.0, lines=(LINE,)):
    """A base, a stage and a CLIP-MoE; gain: of the CLIP-MoE's accuracy in ink."""
    results = {}
    for title, expert, ink in (("base", 0, 0.9), ("stage 1 alone", 1, 0.5), ("CLIP-MoE", None, 0.7 + gain)):
        attributes = {"ink": ink, "background": 0.4, "mean": (ink + 0.4) / 2}
        results[title] = {
            "parameters": 3_420_000,
            "active_parameters": 3_420_000,
            "expert": expert,
            "evaluations": {**dict.fromkeys(lines, attributes), "zero_shot:x": {"top1": 0.25}},
            "chance": dict.fromkeys(lines, {"ink": 1 / 6, "background": 1 / 4}),
        }
    return results


def test_attribute_table_has_rows_of_models_and_of_chance():
    table = text_tables.format_attributes([make_results()], LINE)
    assert table.splitlines() == [
        "Zero-shot accuracy by attribute, per cent",
        "                       ink  background    mean",
        "expert 0 (base)       90.0        40.0    65.0",
        "expert 1 (stage 1)    50.0        40.0    45.0",
        "CLIP-MoE              70.0        40.0    55.0",
        "chance                16.7        25.0    20.8",
    ]


def test_attributes_of_several_seeds_are_means_with_deviations():
    table = text_tables.format_attributes([make_results(), make_results(gain=0.02)], LINE)
    [row] = [line.split() for line in table.splitlines() if line.startswith("CLIP-MoE")]
    assert " ".join(row) == "CLIP-MoE 71.0 ± 1.4 40.0 ± 0.0 55.5 ± 0.7"


def test_attributes_of_several_data_sets_name_them():
    tables = text_tables.format_results([make_results(lines=(LINE, OTHER))])
    assert "by attribute of data.test, per cent" in tables and "of data/scenes, per cent" in tables


def test_attributes_have_no_table_among_further_evaluations():
    table = text_tables.format_evaluations([make_results()])
    assert table.splitlines()[0] == "zero_shot:x, per cent" and "ink" not in table
    assert text_tables.format_results([make_results()]).count("background") == 1


def test_run_without_attributes_has_no_such_table():
    assert text_tables.attribute_lines([make_results(lines=())]) == []
    assert "attribute" not in text_tables.format_results([make_results(lines=())])


def make_recall(ties):
    """Two models with recall, `ties` points more at 1 from images to captions with ties in random order."""
    numbers = {"parameters": 1000, "active_parameters": 1000}
    for direction in ("image_to_text", "text_to_image"):
        numbers |= {f"{direction}_r{k}": 0.25 for k in (1, 5)}
        numbers |= {f"{direction}_r{k}_random_ties": 0.25 for k in (1, 5)}
    numbers["image_to_text_r1_random_ties"] += ties / 100
    return {"base": dict(numbers), "CLIP-MoE": dict(numbers)}


def test_recall_with_ties_in_random_order_stands_beside_where_it_differs():
    heading, base, *_ = text_tables.format_table([make_recall(3)]).splitlines()
    assert "i2t R@1 ties" in heading and "t2i R@1 ties" not in heading
    assert base.split()[1:4] == ["25.0", "25.0", "28.0"]  # beside R@1 both ways
    assert "ties" not in text_tables.format_table([make_recall(0)])
    older = {title: {k: v for k, v in n.items() if "ties" not in k} for title, n in make_recall(0).items()}
    assert "ties" not in text_tables.format_table([older])  # results of an earlier version


def test_cost_of_training_is_two_columns_where_it_is_known():
    results = make_recall(ties=0)
    assert "FLOPs" not in text_tables.format_table([results])
    for row, numbers in enumerate(results.values()):
        numbers |= {"pairs": 15_360 * row, "flops": 2.25e11 * row}
    lines = text_tables.format_table([results]).splitlines()
    assert lines[0].split()[-2:] == ["pairs", "FLOPs"]
    assert [line.split()[-2:] for line in lines[1:3]] == [["0", "0.0"], ["15.36k", "225.00B"]]
    assert text_tables.HOW_TO_READ_COST in lines[-1]


def test_evaluations_are_in_per_cent_but_for_ranks():
    numbers = {"model": {"retrieval:x": {"image_to_text_r1": 0.4567, "image_to_text_mean_rank": 12.5}}}
    assert text_tables.format_models("retrieval:x", numbers).splitlines() == [
        "retrieval:x, per cent but for i2t_mean_rank",
        "                model",
        "i2t_r1           45.7",
        "i2t_mean_rank    12.5",
    ]
    seeds = [make_results(), make_results()]
    seeds[0]["base"]["evaluations"]["zero_shot:x"] = {"top1": 0.29}
    [row] = [r for r in text_tables.format_evaluations(seeds).splitlines() if r.startswith("base")]
    assert row.split() == ["base", "27.0", "±", "2.8"]


def test_share_of_a_group_is_a_share_whatever_its_name():
    numbers = {"model": {"zero_shot:x": {"worst_group": 0.5, "group C": 0.5, "group a rank": 1.0, "C": 0.5}}}
    heading, _, *rows = text_tables.format_models("zero_shot:x", numbers).splitlines()
    assert heading == "zero_shot:x, per cent but for C"
    assert [row.split()[-1] for row in rows] == ["50.0", "50.0", "100.0", "0.5"]
    assert not scores.lower_is_better("group Frank") and scores.lower_is_better("image_to_text_mean_rank")
