"""The report's sections on the experts: routing, experts of patches and words, differences between experts.

Letters: M MoE blocks, E experts, G patches along a side, R rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from clipmoe_jax.dmu.recipes import find_recipe
from clipmoe_jax.reporting import charts, pictures
from clipmoe_jax.reporting.charts import ACCENT, INK, Curve
from clipmoe_jax.reporting.read import DIAGNOSTICS, Folder

Context = dict[str, Any]
TOWERS = {"visual": "vision tower", "text": "text tower"}  # a tower's key in the run's files: its title
COLOURS = {"visual": ACCENT, "text": INK}
DIGITS_UP_TO = 4  # patches a side: larger ones have room for the expert's number


def routing(folders: Sequence[Folder]) -> Context:
    """Returns load, co-activation, load by position and by kind of word of each tower; entropy and largest
    gate; tokens whose experts router training changed."""
    tables = folders[0].json("eval/routing.json", DIAGNOSTICS)
    change = folders[0].json("eval/routing_change.json", DIAGNOSTICS)
    num_experts = len(tables["visual"]["load"][0])
    even = math.log(num_experts)
    # Twice an even share, or the largest of both towers, is as strong as one gets: the same in both.
    most = 100 * max(2 / num_experts, *(np.max(tables[tower]["load"]) for tower in TOWERS))
    return {
        "experts": expert_names(folders[0], num_experts),
        "towers": {title: _routing_of(tower, tables[tower], most) for tower, title in TOWERS.items()},
        "entropy": _by_block(
            "entropy",
            "Entropy of the router",
            {tower: (tables[tower]["layers"], tables[tower]["entropy"]) for tower in TOWERS},
            y="nats",
            reference=(f"even: {even:.2f}", even),
        ),
        "gate": _by_block(
            "gate",
            "Largest gate of a token, mean,",
            {tower: (tables[tower]["layers"], tables[tower]["top1_gate"]) for tower in TOWERS},
            y="gate",
        ),
        "change": _by_block(
            "change",
            "Share of tokens whose experts changed by router training",
            {tower: (tables[tower]["layers"], 100 * np.array(change[tower])) for tower in TOWERS},
            y="% of tokens",
        ),
    }


def _routing_of(tower: str, tables: dict, most: float) -> Context:
    """most: the share in per cent that has the strongest colour."""
    title, load = TOWERS[tower], 100 * np.array(tables["load"])
    together = 100 * np.mean(tables["coactivation"], axis=0)
    names = [f"expert {e}" for e in range(load.shape[1])]
    blocks = [f"block {i}" for i in tables["layers"]]
    loads = (f"{block} {_list(row)}" for block, row in zip(blocks, load, strict=True))
    load_alt = f"Heat map of the experts' shares of routed slots, {title}, in per cent: {'; '.join(loads)}."
    together_alt = (
        f"Heat map of the share of tokens that chose two experts together, {title}, mean over blocks. On the "
        f"diagonal, that chose the expert: {_list(np.diagonal(together))} per cent."
    )
    look = {"low": 0, "form": "{:.0f} %"}
    charts_of = {
        "Load: share of routed slots": charts.draw_matrix(
            f"load-{tower}", load_alt, load, blocks, names, high=most, **look
        ),
        "Chosen together: share of tokens, mean over blocks": charts.draw_matrix(
            f"together-{tower}", together_alt, together, names, names, high=100, **look
        ),
        "Load by position, mean over blocks": _shares(
            f"places-{tower}", f"position, {title}", tables["bins"], tables["load_by_position"]
        ),
    }
    if by_class := tables.get("load_by_word_class"):
        shares = np.swapaxes(list(by_class.values()), 0, 1)
        charts_of["Load by kind of word, mean over blocks"] = _shares(
            "words", "kind of word", list(by_class), shares
        )
    return charts_of


def heat_maps(folders: Sequence[Folder]) -> Context:
    """Returns images and captions with the first expert of each patch and word, block by block."""
    folder = folders[0]
    arrays = folder.array("eval/heat_maps.npz", DIAGNOSTICS)
    texts = folder.json("eval/heat_maps.json", DIAGNOSTICS, list)
    routing_tables = folder.json("eval/routing.json", DIAGNOSTICS)
    examples = []
    for i, text in enumerate(texts):
        patches, words = arrays["visual_experts"][i], arrays["text_experts"][i]
        maps = [
            {
                "block": block,
                "overlay": pictures.overlay(experts),
                "alt": f"Block {block}: {_counts(experts)}",
                "digits": experts.tolist() if len(experts) <= DIGITS_UP_TO else [],
            }
            for block, experts in zip(routing_tables["visual"]["layers"], patches, strict=True)
        ]
        examples.append(
            {
                "caption": text["caption"],
                "image": pictures.thumbnail(arrays["images"][i]),
                "maps": maps,
                "words": [(word, words[:, place].tolist()) for place, word in enumerate(text["words"])],
            }
        )
    num_experts = len(routing_tables["visual"]["load"][0])
    return {
        "examples": examples,
        "blocks": routing_tables["text"]["layers"],
        "experts": expert_names(folder, num_experts),
    }


def experts(folders: Sequence[Folder]) -> Context:
    """Returns how much the experts differ: outputs by CKA and divergence, weights by cosine."""
    differences = folders[0].json("eval/experts.json", DIAGNOSTICS)
    towers, by_depth = {}, {}
    divergences = {tower: np.mean(differences[tower]["js_divergence"], axis=0) for tower in TOWERS}
    most = max(1e-6, *(divergence.max() for divergence in divergences.values()))
    for tower, title in TOWERS.items():
        of_tower = differences[tower]
        cka = np.array(of_tower["cka"])
        pairs = ~np.eye(cka.shape[1], dtype=bool)
        by_depth[tower] = (of_tower["layers"], 1 - cka[:, pairs].mean(axis=1))
        towers[title] = {
            "Outputs alike: CKA": _pairs(f"cka-{tower}", title, cka.mean(axis=0), 0, 1),
            "Outputs apart: Jensen-Shannon divergence, bits": _pairs(
                f"divergence-{tower}", title, divergences[tower], 0, most
            ),
            "Weights alike: cosine of what changed": _pairs(
                f"cosine-{tower}", title, np.mean(of_tower["weight_cosine"], axis=0), 1, 1
            ),
        }
    label = "1 − CKA, mean over pairs of experts"
    return {
        "towers": towers,
        "diversity": differences["diversity"],
        "by_depth": (label, _by_block("depth", label, by_depth, y="1 − CKA", from_zero=True)),
    }


def expert_names(folder: Folder, num_experts: int) -> list[tuple[int, str]]:
    """Returns (number, origin) of each expert: by the config, else the base and the stages in order."""
    named = ["base", *(f"mcl_{stage}" for stage in range(1, num_experts))]
    if folder.has("config.json"):
        config = folder.config()
        last = f"mcl_{config['mcl']['num_stages']}"
        named = [last if n == "last_stage" else n for n in config["moe"].get("experts", ())] or named
        if extended := config["base"]["architecture"]["moe"]:
            named = [*(f"expert {e} of the base" for e in range(extended["num_experts"])), *named[1:]]
    titles = [recipe.title if (recipe := find_recipe(name)) else name for name in named]
    return [(e, title.removesuffix(" alone")) for e, title in enumerate(titles[:num_experts])]


def _pairs(name: str, tower: str, values: np.ndarray, first: int, high: float) -> charts.Markup:
    """Draws values (R, R), expert by expert, from expert `first` on."""
    names = [f"expert {first + e}" for e in range(len(values))]
    rows = (f"{label}: {_list(row, '{:.2f}')}" for label, row in zip(names, values, strict=True))
    alt = f"Heat map, expert by expert, {tower}, mean over blocks. {'; '.join(rows)}."
    return charts.draw_matrix(name, alt, values, names, names, low=0, high=high)


def _shares(name: str, kind: str, rows: list[str], shares: Any) -> charts.Markup:
    """Draws shares (M, R, E) as their mean over blocks."""
    mean = np.mean(shares, axis=0)
    parts = (f"{row} {_list(100 * of_row)}" for row, of_row in zip(rows, mean, strict=True))
    alt = f"Stacked bars of the experts' shares of routed slots by {kind}, in per cent: {'; '.join(parts)}."
    return charts.draw_shares(name, alt, rows, mean)


def _by_block(
    name: str, title: str, values: Mapping[str, tuple[ArrayLike, ArrayLike]], **look: Any
) -> charts.Markup:
    """Draws a curve for each tower; values: {tower: (blocks (M,), values (M,))}."""
    shown = {
        TOWERS[tower]: Curve(np.asarray(blocks), np.asarray(numbers), COLOURS[tower])
        for tower, (blocks, numbers) in values.items()
    }
    parts = (f"{tower} {_list(curve.y, '{:.2f}')}" for tower, curve in shown.items())
    alt = f"{title} by block: {'; '.join(parts)}."
    return charts.draw_curves(name, alt, shown, x="block", dots=True, **look)


def _counts(patches: np.ndarray) -> str:
    numbers, counts = np.unique(patches, return_counts=True)
    parts = (f"expert {e} on {count}" for e, count in zip(numbers, counts, strict=True))
    return f"{', '.join(parts)} of {patches.size} patches."


def _list(values: ArrayLike, form: str = "{:.0f}") -> str:
    return ", ".join(form.format(value) for value in np.asarray(values))
