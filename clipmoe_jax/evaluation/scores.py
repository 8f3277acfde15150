"""Shows the values of metrics by their names: evaluations return shares, people read per cent."""

GROUP = "group "  # the beginning of the name of a share of a group, whose own name may end in anything
# Endings of the other metrics' names.
LOWER_IS_BETTER = ("fpr95", "rank")
SETTINGS = ("C", "alpha")  # what a fit chose: neither high nor low is better
NO_SHARES = ("rank", *SETTINGS)  # not between 0 and 1


def is_share(metric: str) -> bool:
    """Returns whether a metric is between 0 and 1."""
    return metric.startswith(GROUP) or not metric.endswith(NO_SHARES)


def lower_is_better(metric: str) -> bool:
    """Returns whether a metric is better the lower it is."""
    return not metric.startswith(GROUP) and metric.endswith(LOWER_IS_BETTER)


def is_setting(metric: str) -> bool:
    """Returns whether a metric is no score, but what a fit chose."""
    return not metric.startswith(GROUP) and metric.endswith(SETTINGS)


def shown_score(metric: str, value: float) -> str:
    """Returns a metric's value to show: a share in per cent, without the sign; others as they are."""
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:.4g}"
