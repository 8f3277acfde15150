"""A run's workdir written by hand: every file that the report reads, in its format, with drawn numbers.

Letters: n examples, M MoE blocks, E experts, L length, G patches along a side.
"""

import json
import pathlib

import numpy as np

from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.sources import open_source

SCRIPT = "<script>alert('caption')</script> a \"large\" seven & more"
TITLES = ("base", "stage 1 alone", "stage 2 alone", "feature ensemble", "CLIP-MoE")
METRICS = [f"{d}_r{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
NUM_PAIRS, NUM_TEST, NUM_STAGES = 64, 12, 2
ATTRIBUTE_LINE = "attributes:data.test"
CHANCE = {"ink": 1 / 6, "size": 1 / 2, "digit": 1 / 10}  # of each attribute


def write_run(folder: pathlib.Path, seed: int = 0) -> None:
    """All of a run of two stages on digit scenes, whose first captions are a script."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", NUM_PAIRS), ("test", NUM_TEST)):
        write_records(folder / "data", split, count, seed)
    config = {
        "seed": seed,
        "data": {
            "train": "digit_scenes:train?pairs=64",
            "train_split": "train",
            "weights": [3, 1],
            "test": "digit_scenes:test?pairs=12",
            "test_split": "test",
        },
        "mcl": {"batch_size": 8, "num_stages": NUM_STAGES},
        "base": {"architecture": {"moe": None}},
        "moe": {"num_selected_experts": 2},
        "router": {"balance": "paper"},
    }
    write_json(folder / "config.json", config)
    datasets = {
        name: {"path": f"data/{name}", "split": name, "source": f"digit_scenes:{name}"}
        for name in ("train", "test")
    }
    write_json(folder / "datasets.json", datasets)
    write_metrics(folder, rng)
    for stage in range(1, NUM_STAGES + 1):
        clusters, params = folder / f"stage_{stage}" / "clusters", folder / f"stage_{stage}" / "params"
        clusters.mkdir(parents=True)
        others = rng.permutation(np.repeat([0, 4, 17, 2, 80], [23, 16, 12, 11, 1]))
        labels = np.concatenate([[0], others])  # record 0, with the script, lies in the largest cluster
        np.save(clusters / "pseudo_labels.npy", labels)
        levels = {"pairs_level_0": 48, "pairs_level_1": 16, "pairs_unused": 0}
        times = {"num_steps": 400, "steps_now": 400, "seconds_now": 61.2, "compile_seconds_now": 12.4}
        write_json(params / "done.json", {"measured": levels | times})
    resumed = {"num_steps": 200, "steps_now": 80, "seconds_now": 420.0, "compile_seconds_now": 30.0}
    made = {"finished": 1e9 + 2000, "seconds": 500.0, "devices": "8 × TPU v5p"}
    routers = {"measured": resumed, "versions": {"jax": "0.10.2"}, "made": made}
    write_json(folder / "moe" / "params" / "done.json", routers)
    write_results(folder, rng)
    write_diagnostics(folder / "eval", rng, num_experts=NUM_STAGES + 1)


def write_records(folder: pathlib.Path, split: str, count: int, seed: int) -> None:
    first, *others = open_source(f"digit_scenes:{split}?pairs={count}&seed={seed}")
    prepare([first._replace(captions=(SCRIPT,)), *others], str(folder / split), split=split)


def write_metrics(folder: pathlib.Path, rng: np.random.Generator) -> None:
    """metrics.jsonl: step 20 of stage 1 stands there twice, as after a kill, and the last line is cut off."""
    lines = []
    for phase, num_steps in (
        ("base", 200),
        ("mcl_1", 400),
        ("mcl_2", 400),
        ("router", 200),
        ("direct_ft", 400),
    ):
        for step in range(10, num_steps + 1, 10):
            loss = 3 / np.sqrt(step) + 0.02 * rng.random()
            values = {
                "loss": loss,
                "batch_accuracy": 1 - loss / 3,
                "learning_rate": 1e-3 * (1 - step / num_steps),
            }
            values |= {"pairs_per_second": 900 + rng.random(), "input_wait_fraction": 0.02}
            if phase == "router":
                values |= {"balance_image": 1.2 - step / 2000, "balance_text": 1.1 - step / 4000}
            lines.append({"phase": phase, "step": step, "time": 1e9 + 6 * len(lines), **values})
    lines.insert(23, lines[21] | {"loss": 99.0})
    lines.insert(24, lines[21])
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"phase": "direct_ft", "st'
    (folder / "metrics.jsonl").write_text(text)


def write_results(folder: pathlib.Path, rng: np.random.Generator) -> None:
    """eval/results.json. Of every recall the best is the ensemble's, but text_to_image_r10: stage 1's."""
    experts = {"base": 0, "stage 1 alone": 1, "stage 2 alone": 2}
    results = {}
    for row, title in enumerate(TITLES):
        numbers = {m: round(0.1 + 0.1 * row + 0.05 * rng.random(), 4) for m in METRICS}
        if title == "feature ensemble":
            numbers = {m: round(0.9 + 0.01 * rng.random(), 4) for m in METRICS}
        if title == "stage 1 alone":
            numbers["text_to_image_r10"] = 0.99
        attributes = {name: round(float(rng.random()), 3) for name in CHANCE}
        size = 13_700_000 if title == "feature ensemble" else 3_400_000
        results[title] = numbers | {
            "parameters": size + 400_000 * (title == "CLIP-MoE"),
            "active_parameters": size + 140_000 * (title == "CLIP-MoE"),
            "expert": experts.get(title),
            "evaluations": {
                ATTRIBUTE_LINE: attributes | {"mean": float(np.mean(list(attributes.values())))},
                "ood: places": {"auroc": 0.6 + row / 50, "fpr95": 0.6 - row / 50},
            },
            "chance": {ATTRIBUTE_LINE: CHANCE},
        }
    write_json(folder / "eval" / "results.json", results)
    write_json(
        folder / "eval" / "done.json", {"measured": {"num_images": NUM_TEST, "num_captions": NUM_TEST}}
    )


def write_diagnostics(
    folder: pathlib.Path, rng: np.random.Generator, num_experts: int, num_blocks: int = 2, grid: int = 2
) -> None:
    """routing.json, routing_change.json, heat_maps, neighbours.json, experts.json, cost.json."""

    def shares(*shape: int) -> list:
        return rng.dirichlet(np.full(num_experts, 4.0), shape).tolist()

    def alike(size: int) -> list:
        matrices = np.clip(rng.normal(0.5, 0.2, (num_blocks, size, size)), -0.05, 1)
        matrices = (matrices + matrices.swapaxes(1, 2)) / 2
        matrices[:, np.arange(size), np.arange(size)] = 1
        return matrices.tolist()

    def routing(bins: list[str]) -> dict:
        return {
            "layers": list(range(num_blocks)),
            "load": shares(num_blocks),
            "entropy": rng.uniform(0.3, 1, num_blocks).tolist(),
            "top1_gate": rng.uniform(0.5, 1, num_blocks).tolist(),
            "coactivation": rng.uniform(0, 0.6, (num_blocks, num_experts, num_experts)).tolist(),
            "load_by_position": shares(num_blocks, len(bins)),
            "bins": bins,
        }

    classes = {name: shares(num_blocks) for name in ("numbers", "colour words", "function words", "other")}
    tables = {
        "visual": routing(["class token", *(f"row {i + 1}" for i in range(grid))]),
        "text": routing(["0", "1-4", "5-9", "end token"]) | {"load_by_word_class": classes},
    }
    write_json(folder / "routing.json", tables)
    change = {tower: rng.uniform(0, 1, num_blocks).tolist() for tower in tables}
    write_json(folder / "routing_change.json", change)

    def difference() -> dict:
        cosine, divergence = alike(num_experts - 1), 1 - np.array(alike(num_experts))
        layers = list(range(num_blocks))
        return {"layers": layers, "cka": alike(num_experts), "js_divergence": divergence.tolist(),
                "weight_cosine": cosine}  # fmt: skip

    experts = {"visual": difference(), "text": difference(), "diversity": 0.437}
    write_json(folder / "experts.json", experts)

    words = ["<|startoftext|>", "<script>", "large", "seven", "<|endoftext|>"]
    text_experts = rng.integers(0, num_experts, (2, num_blocks, 8)).astype(np.int8)
    text_experts[:, :, len(words) :] = -1
    np.savez_compressed(
        folder / "heat_maps.npz",
        images=rng.integers(0, 255, (2, 32, 32, 3)).astype(np.uint8),
        visual_experts=rng.integers(0, num_experts, (2, num_blocks, grid, grid)).astype(np.int8),
        text_experts=text_experts,
        tokens=np.zeros((2, 8), np.int32),
    )
    write_json(
        folder / "heat_maps.json", [{"caption": SCRIPT, "words": words, "record": i} for i in range(2)]
    )

    right, wrong = "a small cyan two on dotted navy", "a small lime two on dotted navy"
    neighbours = {
        "clip_moe_right": [{"image": 0, "caption": SCRIPT, "base": [wrong, 0.31], "clip_moe": [SCRIPT, 0.42]},
                           {"image": 3, "caption": right, "base": [wrong, 0.3], "clip_moe": [right, 0.4]}],
        "base_right": [{"image": 2, "caption": right, "base": [right, 0.41], "clip_moe": [wrong, 0.4]}],
    }  # fmt: skip
    write_json(folder / "neighbours.json", neighbours)

    base = {"parameters": 3_400_000, "active_parameters": 3_400_000, "flops_per_image": 1.0e6,
            "flops_per_caption": 6.0e6, "xla_flops_per_image": 1.1e6, "latency_ms": 2.0,
            "pairs_per_second": 5200.0, "best_batch": 32, "peak_bytes": 21_000_000}  # fmt: skip
    moe = base | {"parameters": 3_800_000, "active_parameters": 3_540_000, "latency_ms": 3.5}
    write_json(folder / "cost.json", {"base": base, "CLIP-MoE": moe})


def write_json(path: pathlib.Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
