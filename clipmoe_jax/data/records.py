"""Random access over a prepared data set: encoded images and captions by index."""

import hashlib

from etils import epath

NAME = "pairs"
VERSION = "1.0.0"


class Records:
    """The pairs of a data set made by `clipmoe_jax.prepare`, in the order of their source.

    Index i is the same pair for ever: cluster labels and samplers refer to it. Pickles, so that
    worker processes can read too.

    Attributes:
        path: the data set's folder, what prepare was given as --out.
        split: its split, or a part of one in TFDS's notation ("train[:1000]").
        fingerprint: changes when another data set is prepared there.
    """

    def __init__(self, path: str, split: str = "train"):
        """Raises FileNotFoundError for a wrong path and ValueError for an unknown split."""
        import tensorflow_datasets as tfds  # here because it takes longest to import

        folder = epath.Path(path) / NAME / VERSION
        if not folder.exists():
            raise FileNotFoundError(
                f"{path} is not a prepared data set: make one with "
                f"python -m clipmoe_jax.prepare --source=KIND:PATH --out={path}"
            )
        builder = tfds.builder_from_directory(folder)
        if split.partition("[")[0] not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"{path} has no split {split!r}: it has {splits}.")
        self.path = str(path)
        self.split = split
        # What prepare wrote about the data tells one data set from another at the same path.
        report = (epath.Path(path) / "report.json").read_text()
        self.fingerprint = hashlib.sha256(f"{split} {report}".encode()).hexdigest()[:16]
        try:
            self._source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{path} has no split {split!r}: {error}") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        """Reads one pair.

        Returns:
            {"id": str, "image": bytes (the contents of an image file), "captions": list[str]}

        Raises:
            IndexError: index is not in 0 … len - 1.
            ValueError: the data set's files are damaged or gone.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is outside {self.path}'s {len(self)} records.")
        try:
            record = self._source[index]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"Record {index} of {self.path} cannot be read, its files have changed: prepare "
                f"the data set again. ({error})"
            ) from error
        return {
            "id": record["id"].decode("utf-8"),
            "image": record["image"],
            "captions": [caption.decode("utf-8") for caption in record["captions"]],
        }
