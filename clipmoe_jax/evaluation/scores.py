"""Shows the values of metrics by their names: evaluations return shares, people read per cent."""

# Endings of metrics' names.
LOWER_IS_BETTER = ("fpr95", "rank")
NO_SHARES = ("rank", "C", "alpha")  # not between 0 and 1


def shown_score(metric: str, value: float) -> str:
    """Returns a metric's value to show: a share in per cent, without the sign; others as they are."""
    return f"{value:.4g}" if metric.endswith(NO_SHARES) else f"{100 * value:.1f}"
