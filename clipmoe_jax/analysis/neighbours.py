"""Images for which one of two models ranks an own caption first and the other does not.

Letters: I images, T captions, d embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Features = tuple[np.ndarray, np.ndarray]


def neighbours(
    base_features: Features,
    moe_features: Features,
    captions: Sequence[str],
    image_of_text: np.ndarray,
    count: int = 8,
) -> dict[str, list[dict[str, Any]]]:
    """Returns {"clip_moe_right": examples, "base_right": examples}: at most `count` images each for which the
    CLIP-MoE ranks an own caption first and the base does not, and the reverse.

    Features: (I, d) and (T, d) float32, compared by inner product; image_of_text (T,) int. A model's margin
    on an image is the score of its best own caption less that of the best other one; the model is right where
    that is above 0 (a tie is not). First come the images on which the two margins are furthest apart; those
    for which the wrong model's first caption is an own one's text, word for word, are left out. An example is
    {"image": number, "caption": the own caption that the right model ranks first, "base", "clip_moe": [the
    caption that the model ranks first, its score]}.
    """
    image_of_text = np.asarray(image_of_text)
    ranked = {
        "base": _rank_captions(*base_features, image_of_text),
        "clip_moe": _rank_captions(*moe_features, image_of_text),
    }
    own_words, examples = set(zip(image_of_text.tolist(), captions, strict=True)), {}
    for right, wrong in (("clip_moe", "base"), ("base", "clip_moe")):
        (margin, best_own, *_), (other_margin, _, taken, _) = ranked[right], ranked[wrong]
        same_words = [(i, captions[caption]) in own_words for i, caption in enumerate(taken)]
        differ = (margin > 0) & (other_margin <= 0) & ~np.array(same_words)
        apart = np.where(differ, margin - other_margin, 0)
        images = [int(i) for i in np.argsort(-apart, kind="stable")[:count] if apart[i] > 0]
        examples[f"{right}_right"] = [
            {"image": i, "caption": captions[best_own[i]]}
            | {name: [captions[first[i]], float(score[i])] for name, (*_, first, score) in ranked.items()}
            for i in images
        ]
    return examples


def _rank_captions(
    image_features: np.ndarray, text_features: np.ndarray, image_of_text: np.ndarray, chunk_size: int = 1024
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each image, (I,): margin, best own caption, first caption of all, and that one's score."""
    parts = []
    for start in range(0, len(image_features), chunk_size):
        scores = image_features[start : start + chunk_size] @ text_features.T
        own = np.arange(start, start + len(scores))[:, None] == image_of_text[None]
        own_scores = np.where(own, scores, -np.inf)
        other_best = np.where(own, -np.inf, scores).max(axis=1)
        first = scores.argmax(axis=1)
        score = scores[np.arange(len(scores)), first]
        parts.append((own_scores.max(axis=1) - other_best, own_scores.argmax(axis=1), first, score))
    margin, best_own, first, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    return margin, best_own, first, score
