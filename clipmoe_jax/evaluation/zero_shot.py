"""Zero-shot classification: the class whose prompts are nearest.

Letters: N images, C classes, d embedding.
"""

from collections.abc import Sequence

import numpy as np


def class_embeddings(text_features: np.ndarray, class_of_text: Sequence[int]) -> np.ndarray:
    """Mean of each class's prompt features, unit length: (T, d), (T,) int -> (C, d) float32."""
    class_of_text = np.asarray(class_of_text)
    means = np.stack([text_features[class_of_text == c].mean(axis=0) for c in range(class_of_text.max() + 1)])
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def zero_shot_accuracy(image_features: np.ndarray, classes: np.ndarray, labels: Sequence[int]) -> float:
    """Share of images (N, d) whose nearest class embedding (C, d) is their label (N,)."""
    return float(np.mean(np.argmax(image_features @ classes.T, axis=1) == np.asarray(labels)))
