"""Image-caption retrieval: recall at 1, 5 and 10 in both directions.

Letters: I images, T captions, d embedding.
"""

import numpy as np

RANKS = (1, 5, 10)


def retrieval_recall(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_of_text: np.ndarray,
    *,
    ranks: tuple[int, ...] = RANKS,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Share of queries whose correct answer is among the first k, as `image_to_text_r1`, `text_to_image_r5`,
    ….

    image_features (I, d), text_features (T, d) float32, compared by inner product; image_of_text (T,) int,
    the image that each caption belongs to. An image's rank is that of its best caption. Ties count against: a
    wrong answer that scores as high as the right one stands before it. Memory is a few
    arrays of chunk_size x max(I, T).
    Raises ValueError for features that are not finite, and for an image without caption.
    """
    num_images, image_of_text = len(image_features), np.asarray(image_of_text)
    if not (np.isfinite(image_features).all() and np.isfinite(text_features).all()):
        raise ValueError("retrieval: some features are not finite")
    if without := sorted(set(range(num_images)) - set(image_of_text.tolist())):
        raise ValueError(f"retrieval: images {without[:10]} have no caption")

    image_ranks, text_ranks = [], []
    for start in range(0, num_images, chunk_size):
        scores = image_features[start : start + chunk_size] @ text_features.T
        own = np.arange(start, start + len(scores))[:, None] == image_of_text[None, :]
        best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
        image_ranks.append(np.sum((scores >= best) & ~own, axis=1))
    for start in range(0, len(text_features), chunk_size):
        scores = text_features[start : start + chunk_size] @ image_features.T
        own = image_of_text[start : start + chunk_size]
        right = scores[np.arange(len(scores)), own][:, None]
        text_ranks.append(np.sum(scores >= right, axis=1) - 1)

    recall = {}
    for name, found in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        position = np.concatenate(found)
        recall |= {f"{name}_r{k}": float(np.mean(position < k)) for k in ranks}
    return recall
