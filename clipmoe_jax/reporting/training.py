"""The training section: curves of loss, load balance and learning rate, and the phases in numbers."""

from collections.abc import Sequence
from typing import Any

from clipmoe_jax.dmu.recipe import BASE_NAME, ROUTER_NAME
from clipmoe_jax.dmu.recipes import find_recipe
from clipmoe_jax.reporting import charts, tables
from clipmoe_jax.reporting.charts import ACCENT, INK, MUTED, Curve, expert_colour
from clipmoe_jax.reporting.read import Curves, Folder, read_curves

# Titles of panels, by group of recipes.
PANELS = {
    "base": "Dense base",
    "stage": "Stages: batches of one cluster each",
    "moe": "Routers",
    "baseline": "Baselines",
}
# The phases whose learning rates are drawn: all stages share a schedule.
RATES = {BASE_NAME: "dense base", "mcl_1": "each stage", ROUTER_NAME: "routers"}
MAX_CURVES = 40  # in a panel; more are not told apart
# Of baselines, each with every dash: as many looks as a panel has curves.
BASELINE_COLOURS = (ACCENT, INK, MUTED, *map(expert_colour, (2, 3, 4, 5, 6, 8, 9)))
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def training(folders: Sequence[Folder]) -> dict[str, Any]:
    """Returns {"panels": [(title, chart)], "wide": charts with more curves, "table": of phases}."""
    curves = {phase: curve for phase, curve in read_curves(folders[0]).items() if "loss" in curve}
    names = {phase: _title(phase) for phase in curves}
    groups = {title: [p for p in curves if _group(p) == group] for group, title in PANELS.items()}
    panels, wide = [], []
    for i, (title, phases) in enumerate(groups.items()):
        shown = phases[:MAX_CURVES]
        if len(phases) > len(shown):
            title += f", the first {len(shown)} of {len(phases):,}"
        if phases:
            losses = {names[phase]: (phase, curves[phase]) for phase in shown}
            of_size = wide if len(losses) > charts.MAX_IN_PANEL else panels
            of_size.append((f"Loss. {title}", _losses(f"loss-{i}", losses)))
    if "balance_image" in curves.get(ROUTER_NAME, {}):
        panels.append(("Load balance of the routers", _balance(folders[0], curves[ROUTER_NAME])))
    if curves.keys() & RATES.keys():
        panels.append(("Learning rate", _rates(curves)))
    measured = {
        phase: folders[0].done_field(recipe.folder, "measured")
        for phase in curves
        if (recipe := find_recipe(phase))
    }
    return {"panels": panels, "wide": wide, "table": tables.phase_table(curves, names, measured)}


def _losses(name: str, phases: dict[str, tuple[str, dict]]) -> charts.Markup:
    shown = {}
    for number, (title, (phase, curve)) in enumerate(phases.items()):
        colour, dash = _look(phase, number)
        shown[title] = Curve(curve["step"], curve["loss"], colour, noisy=True, dash=dash)
    longest = [curve.x[-1] for curve in shown.values()]
    alt = f"Loss by step. {_ends(shown, '{:.3f}')}"
    return charts.draw_curves(
        name, alt, shown, x="step", y="loss", from_zero=True, log_x=max(longest) > 3 * min(longest)
    )


def _balance(folder: Folder, curve: dict) -> charts.Markup:
    """Draws `losses.load_balance` of each tower, and its value for even loads where the config tells it."""
    reference = None
    if folder.has("config.json"):
        config = folder.config()
        released = config["router"]["balance"] == "released"
        level = config["moe"]["num_selected_experts"] if released else 1
        reference = (f"even: {level}", level)
    shown = {
        "vision tower": Curve(curve["step"], curve["balance_image"], ACCENT),
        "text tower": Curve(curve["step"], curve["balance_text"], INK),
    }
    alt = f"Load balance by step while the routers train. {_ends(shown, '{:.2f}')}"
    return charts.draw_curves("balance", alt, shown, x="step", y="balance", reference=reference)


def _rates(curves: Curves) -> charts.Markup:
    shown = {
        title: Curve(curves[phase]["step"], curves[phase]["learning_rate"], _look(phase)[0])
        for phase, title in RATES.items()
        if phase in curves
    }
    highest = ", ".join(f"{title} {curve.y.max():.2g}" for title, curve in shown.items())
    alt = f"Learning rate by step. Highest: {highest}."
    return charts.draw_curves("rates", alt, shown, x="step", y="learning rate", from_zero=True)


def _group(phase: str) -> str:
    """Returns the group of a phase's recipe; a phase of a recipe that is gone counts as a baseline."""
    recipe = find_recipe(phase)
    return recipe.group if recipe else "baseline"


def _title(phase: str) -> str:
    recipe = find_recipe(phase)
    if recipe is None:
        return phase
    return {"base": "dense base", "moe": "routers"}.get(recipe.group) or recipe.title.removesuffix(" alone")


def _look(phase: str, place: int = 0) -> tuple[str, Any]:
    """Returns a phase's colour and dash: its own in each panel. place: of its curve in the panel."""
    recipe = find_recipe(phase)
    if recipe is not None and recipe.number:
        return expert_colour(recipe.number), DASHES[0]
    if colour := {"base": MUTED, "stage": INK, "moe": INK}.get(_group(phase)):
        return colour, DASHES[0]
    dash, colour = divmod(place, len(BASELINE_COLOURS))
    return BASELINE_COLOURS[colour], DASHES[dash]


def _ends(shown: dict[str, Curve], form: str) -> str:
    ends = (f"{title} from {form.format(c.y[0])} to {form.format(c.y[-1])}" for title, c in shown.items())
    return f"{'; '.join(ends)}."
