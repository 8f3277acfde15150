"""Zero-shot classification: the class whose prompts are nearest.

Letters: T prompts, N images, C classes, d embedding.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipmoe_jax.data.sources.base import AttributeTable
from clipmoe_jax.evaluation.ties import first_equal_rows, inner_products

Labels = Sequence[int] | np.ndarray


def class_embeddings(
    text_features: np.ndarray, class_of_text: Labels, *, normalize: bool = True
) -> np.ndarray:
    """Returns unit means of each class's unit prompt features: (T, d), (T,) int -> (C, d) float32.

    As OpenAI's notebook Prompt_Engineering_for_ImageNet has it. normalize: False leaves the means as they
    are: their inner product with an image is the mean of its similarities to the prompts. Raises ValueError
    for a class, of those up to the highest in class_of_text, that has no prompt.
    """
    counts = np.bincount(class_of_text)
    if not counts.all():
        raise ValueError(
            f"class {np.argmin(counts)} of {len(counts)} has no prompt: give each class one or more"
        )
    sums = np.zeros((len(counts), text_features.shape[1]), np.float32)
    np.add.at(
        sums, np.asarray(class_of_text), text_features / np.linalg.norm(text_features, axis=-1, keepdims=True)
    )
    return sums / (np.linalg.norm(sums, axis=-1, keepdims=True) if normalize else counts[:, None])


def classification_metrics(
    image_features: np.ndarray, classes: np.ndarray, labels: Labels
) -> dict[str, float]:
    """Returns top1, top5 and mean_per_class, as `metrics_of_ranks`, of images by their nearest classes.
    Arguments as for `nearest_ranks`."""
    return metrics_of_ranks(nearest_ranks(image_features, classes, labels), labels)


def nearest_ranks(
    image_features: np.ndarray, classes: np.ndarray, labels: Labels, *, chunk_size: int = 4096
) -> np.ndarray:
    """Returns, as `label_ranks`, how many classes are nearer to each image than its own, (N,) int.

    image_features (N, d), classes (C, d) float32, compared by inner product; labels (N,) int.
    """
    ranks, first = [], first_equal_rows(classes)
    for start in range(0, len(image_features), chunk_size):
        chunk = slice(start, start + chunk_size)
        ranks.append(label_ranks(inner_products(image_features[chunk], classes, first), labels[chunk]))
    return np.concatenate(ranks)


def attribute_accuracy(
    image_features: np.ndarray,
    labels: Mapping[str, Labels],
    table: AttributeTable,
    encode_texts: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, float]:
    """Returns {attribute: top1} of classification by the table's prompts, one for each value.

    image_features (N, d) float32; labels {attribute: (N,) int, indices into its values}; encode_texts: T
    sentences -> (T, d) float32 unit features.
    """
    prompts = [
        attribute.prompt.replace("{}", value) for attribute in table.values() for value in attribute.values
    ]
    stops = np.cumsum([len(attribute.values) for attribute in table.values()])
    accuracy = {}
    for name, features in zip(table, np.split(encode_texts(prompts), stops[:-1]), strict=True):
        classes = class_embeddings(features, range(len(features)))
        accuracy[name] = classification_metrics(image_features, classes, labels[name])["top1"]
    return accuracy


def label_ranks(scores: np.ndarray, labels: Labels) -> np.ndarray:
    """Counts the classes that stand before the right one: scores (N, C), labels (N,) int -> (N,) int.

    Of classes with the same score the lower one stands first, as argmax has it: ImageNet has two classes
    named missile and two named sunglasses, which have equal scores.
    Raises ValueError for scores that are not finite and for labels that are no class.
    """
    labels = np.asarray(labels)
    num_classes = scores.shape[1]
    if not np.isfinite(scores).all():
        raise ValueError("classification: some scores are not finite")
    if wrong := sorted(set(labels[(labels < 0) | (labels >= num_classes)].tolist())):
        raise ValueError(f"classification: labels {wrong[:10]} are not among the {num_classes} classes")
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(num_classes)[None, :] < labels[:, None]
    return np.sum((scores > own) | ((scores == own) & before), axis=1)


def metrics_of_ranks(ranks: np.ndarray, labels: Labels) -> dict[str, float]:
    """Returns top1 and top5, the shares of inputs whose label is first and among the first five, and
    mean_per_class, top1 averaged over the classes in labels. ranks (N,) int from 0, labels (N,) int.
    """
    _, class_of_input, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    right_of_class = np.bincount(class_of_input, weights=ranks < 1)
    return {
        "top1": float(np.mean(ranks < 1)),
        "top5": float(np.mean(ranks < 5)),
        "mean_per_class": float(np.mean(right_of_class / counts)),
    }
