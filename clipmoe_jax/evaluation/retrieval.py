"""Image-caption retrieval: recall at 1, 5 and 10 in both directions, and ranks.

Letters: I images, T captions, B queries of a chunk, d embedding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipmoe_jax.data.records import Records
from clipmoe_jax.evaluation.captions import Captions, read_captions
from clipmoe_jax.evaluation.subject import Subject
from clipmoe_jax.evaluation.ties import first_equal_rows

DIRECTIONS = ("image_to_text", "text_to_image")
RECALL_AT_1 = tuple(f"{direction}_r1" for direction in DIRECTIONS)
RANKS = (1, 5, 10)
RANDOM_TIES = "_random_ties"  # ends the names of recalls with equal scores in random order
ERROR = "_error"  # ends the names of halves of 95 % intervals
DRAWS = 1000  # of a bootstrap
NO_QUERY = -1  # rows that fill up the last chunk


class _Places(NamedTuple):
    """The place of each query's best right answer among all, int32 (B,) each.

    Attributes:
        above: wrong answers that score higher.
        tied: wrong answers that score the same.
        own: right answers that score the same, the best itself among them.
    """

    above: np.ndarray
    tied: np.ndarray
    own: np.ndarray


class RetrievalFeatures(NamedTuple):
    """A data set as a model sees it.

    Attributes:
        images: (I, d) float32 unit vectors.
        texts: (T, d) float32 unit vectors, of every caption.
        image_of_text: (T,) int, the image that each caption belongs to.
    """

    images: np.ndarray
    texts: np.ndarray
    image_of_text: np.ndarray


def retrieval_features(
    subject: Subject, records: Records, captions: Captions | None = None
) -> RetrievalFeatures:
    """Encodes every image and every caption of a data set. captions: of the data set; None reads them."""
    captions = captions or read_captions(records)
    return RetrievalFeatures(subject.images(records), subject.texts(captions.texts), captions.image_of_text)


def retrieval_recall(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_of_text: np.ndarray,
    *,
    ranks: tuple[int, ...] = RANKS,
    chunk_size: int = 256,
    with_errors: bool = False,
) -> dict[str, float]:
    """Returns recall and ranks in both directions.

    `image_to_text_r1`, `text_to_image_r5`, …: share of queries whose correct answer is among the first k;
    `image_to_text_mean_rank`, `…_median_rank`: of the answers, 1 if it comes first.
    `image_to_text_r1_random_ties`, …: the share to expect if equal scores stood in random order. Tools that
    sort, such as clip-benchmark, report some number near it; where captions occur twice it is higher.
    with_errors: `image_to_text_r1_error`, … too: half of the 95 % interval by a bootstrap over images,
    each with its captions.

    image_features (I, d), text_features (T, d) float32, compared by inner product; image_of_text (T,) int,
    the image that each caption belongs to. An image's rank is that of its best caption. Elsewhere ties count
    against: a wrong answer that scores as high as the right one stands before it. Runs on the default device;
    memory is the features and a few arrays of chunk_size x max(I, T).
    Raises ValueError for features that are not finite, an image without caption, and captions of an image
    that is not there.
    """
    num_images, image_of_text = len(image_features), np.asarray(image_of_text)
    if not (np.isfinite(image_features).all() and np.isfinite(text_features).all()):
        raise ValueError("retrieval: some features are not finite")
    if without := sorted(set(range(num_images)) - set(image_of_text.tolist())):
        raise ValueError(f"retrieval: images {without[:10]} have no caption")
    if beyond := sorted(set(image_of_text.tolist()) - set(range(num_images))):
        raise ValueError(f"retrieval: captions are of images {beyond[:10]}, of {num_images} images")

    image_ids = np.arange(num_images)
    recall = {}
    images, texts = (image_features, image_ids), (text_features, image_of_text)
    for name, queries, answers in zip(DIRECTIONS, (images, texts), (texts, images), strict=True):
        places = _places(*queries, *answers, chunk_size)
        position = places.above + places.tied
        recall |= {f"{name}_r{k}": float(np.mean(position < k)) for k in ranks}
        if with_errors:
            found = np.stack([position < k for k in ranks], axis=1)
            errors = _errors(found, queries[1], num_images)
            recall |= {f"{name}_r{k}{ERROR}": error for k, error in zip(ranks, errors, strict=True)}
        recall |= {f"{name}_r{k}{RANDOM_TIES}": float(np.mean(_chance_of_hit(places, k))) for k in ranks}
        recall[f"{name}_mean_rank"] = float(np.mean(position + 1))
        recall[f"{name}_median_rank"] = float(np.median(position + 1))
    return recall


def _errors(found: np.ndarray, image_of_query: np.ndarray, num_images: int) -> list[float]:
    """Halves of the 95 % intervals of the means of `found` (B, ranks), by drawing images anew."""
    of_image = np.zeros((num_images, found.shape[1] + 1))  # what is found, and how many queries
    np.add.at(of_image, image_of_query, np.column_stack([found, np.ones(len(found))]))
    rng, even = np.random.default_rng(0), np.full(num_images, 1 / num_images)
    sums = np.stack([rng.multinomial(num_images, even) @ of_image for _ in range(DRAWS)])
    low, high = np.percentile(sums[:, :-1] / sums[:, -1:], (2.5, 97.5), axis=0)
    return ((high - low) / 2).tolist()


def _chance_of_hit(places: _Places, k: int) -> np.ndarray:
    """Returns the probability (B,) that a right answer is among the first k if ties are in random order.

    Of `tied` wrong and `own` right answers of one score, the first k - above are drawn without replacement.
    """
    drawn, missed = k - places.above, np.where(places.above < k, 1.0, 0.0)
    for j in range(k):
        left = np.maximum(places.tied + places.own - j, 1)
        missed *= np.where(j < drawn, np.maximum(places.tied - j, 0) / left, 1)
    return np.where(places.above < k, 1 - missed, 0)


def _places(
    queries: np.ndarray,
    image_of_query: np.ndarray,
    answers: np.ndarray,
    image_of_answer: np.ndarray,
    chunk_size: int,
) -> _Places:
    """Finds each query's best right answer among all, a chunk of queries at a time."""
    chunk_size = min(chunk_size, len(queries))
    on_device = jnp.asarray(answers), jnp.asarray(image_of_answer), first_equal_rows(answers)
    chunks = []
    for start in range(0, len(queries), chunk_size):
        chunk, images = queries[start : start + chunk_size], image_of_query[start : start + chunk_size]
        missing = chunk_size - len(chunk)
        chunk = np.pad(chunk, ((0, missing), (0, 0)))
        images = np.pad(images, (0, missing), constant_values=NO_QUERY)
        chunks.append(_places_of_chunk(chunk, images, *on_device))
    return _Places(*(np.concatenate(counts)[: len(queries)] for counts in zip(*chunks, strict=True)))


@jax.jit
def _places_of_chunk(
    queries: jax.Array,
    image_of_query: jax.Array,
    answers: jax.Array,
    image_of_answer: jax.Array,
    first: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """queries (B, d), image_of_query (B,), answers (A, d), image_of_answer (A,) -> fields of `_Places`.

    first: `first_equal_rows` of the answers.
    """
    scores = jnp.einsum("bd,ad->ba", queries, answers, precision=jax.lax.Precision.HIGHEST)
    if first is not None:
        scores = scores[:, first]
    own = image_of_query[:, None] == image_of_answer[None, :]
    best = jnp.max(scores, axis=1, where=own, initial=-jnp.inf, keepdims=True)
    tied = scores == best
    above = (scores > best) & ~own
    return jnp.sum(above, axis=1), jnp.sum(tied & ~own, axis=1), jnp.sum(tied & own, axis=1)
