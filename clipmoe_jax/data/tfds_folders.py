"""Opening a data set that TFDS has prepared, without running code that it names."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from clipmoe_jax.core.errors import first_line

FEATURES = "tensorflow_datasets.core.features."


@contextlib.contextmanager
def tfds_features_alone() -> Iterator[None]:
    """Lets a data set that TFDS opens meanwhile have no features but TFDS's own.

    TFDS imports the module of each class that the data set's `features.json` names, wherever it lies: also
    one in the working directory, which `python -m` has on its path. Raises ValueError naming the class
    before anything of it is imported, and for files about the data set that are damaged.
    """
    from tensorflow_datasets.core.features import feature  # slow to import

    connector: Any = feature.FeatureConnector
    original = connector.__dict__["cls_from_name"]

    def cls_from_name(cls: Any, python_class_name: str) -> Any:
        if not python_class_name.startswith(FEATURES):
            raise ValueError(
                f"its features.json names the class {python_class_name!r}, which is none of TFDS's: reading "
                "the data set would run code that came with it, so it is not opened"
            )
        return original.__get__(None, cls)(python_class_name)

    connector.cls_from_name = classmethod(cls_from_name)
    try:
        yield
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # of protobuf, TFDS, …
        reason = first_line(error)[:200]
        raise ValueError(f"its dataset_info.json or features.json is damaged ({reason})") from error
    finally:
        connector.cls_from_name = original


def check_splits(builder: Any) -> None:
    """Raises ValueError if the files of a data set, as its dataset_info.json names them, lie elsewhere, if it
    names none, or gives one fewer records than none."""
    for split in builder.info.splits.values():
        if any(length < 0 for length in split.shard_lengths):
            raise ValueError(f"its dataset_info.json has a file of {min(split.shard_lengths):,} records")
        template = split.filename_template
        pattern, *names = (template.template or "", template.dataset_name or "", template.split or "")
        if not re.fullmatch(r"([\w.\-]|\{[A-Z_]+\})*", pattern) or any("/" in name for name in names):
            raise ValueError("its dataset_info.json names files outside of its folder, or none")
        try:
            template.relative_filepath(shard_index=0, num_shards=1)
        except ValueError as error:
            raise ValueError(f"its dataset_info.json does not say where its files are ({error})") from error
