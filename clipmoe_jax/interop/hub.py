"""Models on the Hugging Face hub: `hf-hub:OWNER/NAME`, or `open_clip:MODEL/TAG` by open_clip's names.

huggingface_hub keeps what is downloaded in its cache, from which models are read without network, too. Its
own variables say where that is and whom to ask: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

import functools
import os
import pathlib
import re

import huggingface_hub
from etils import epath
from huggingface_hub import errors

from clipmoe_jax.core.errors import first_line
from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.interop import huggingface, openclip, released, tensor_files

HUB, OPEN_CLIP = "hf-hub:", "open_clip:"
NAME = re.compile(r"(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")

# Files that say what weights are.
CONFIG_FILES = ("config.json", openclip.CONFIG_FILE)
DESCRIPTIONS = (
    *CONFIG_FILES,
    huggingface.IMAGE_PROCESSOR_FILE,
    huggingface.PROCESSOR_FILE,
    released.CONFIG_FILE,
)

# open_clip's names of pretrained models, MODEL/TAG, and where these lie: OpenAI's where OpenAI put them, the
# others where open_clip finds them.
_OPENAI = {
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}
REPOSITORIES = {
    **{f"{model}/openai": repository for model, repository in _OPENAI.items()},
    **{f"{model}-quickgelu/openai": repository for model, repository in _OPENAI.items()},
    "ViT-B-32/laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "ViT-B-32/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "ViT-B-32-256/datacomp_s34b_b86k": "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
    "ViT-B-16/laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "ViT-B-16/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
    "ViT-L-14/laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "ViT-L-14/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
    "ViT-H-14/laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g-14/laion2b_s12b_b42k": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "ViT-g-14/laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "ViT-bigG-14/laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}


def is_name(text: str) -> bool:
    """Returns whether a text names a model on the hub."""
    return text.startswith((HUB, OPEN_CLIP))


@functools.cache
def local_path(name: str) -> str:
    """Returns where a model lies: a path as it is, for a name of the hub a folder or file in the cache.

    name: also `hf-hub:OWNER/NAME@REVISION`, and `hf-hub:OWNER/NAME/FILE` for a file that no config describes.
    What the cache lacks is downloaded: the configs, and the weights in one format.
    Raises FileNotFoundError for what is neither there nor in the cache, ValueError for a name that is none.
    """
    if name.startswith(OPEN_CLIP):
        return local_path(HUB + _repository(name.removeprefix(OPEN_CLIP)))
    if not name.startswith(HUB):
        return name
    match = NAME.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise ValueError(f"{name} names no model: give {HUB}OWNER/NAME, then @REVISION and /FILE if need be")
    repository, revision, file = match["repository"], match["revision"], match["file"]
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision)
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the hub has no repository {repository} that you may read: mend the name, or log in "
            "(hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: {repository} has no revision {revision}") from error
    except ValueError:  # a name of characters that no repository has
        raise
    except Exception as error:  # offline, or whatever the library's HTTP client raises
        for wanted in (file,) if file else CONFIG_FILES:
            found = huggingface_hub.try_to_load_from_cache(repository, wanted, revision=revision)
            if isinstance(found, str):
                return found if file else os.path.dirname(found)
        raise FileNotFoundError(
            f"{name} is not in {huggingface_hub.constants.HF_HUB_CACHE}, and the hub cannot be asked "
            f"({first_line(error)}): download it where there is network (hf download {repository})"
        ) from error
    return _download(name, repository, revision, file, {sibling.rfilename for sibling in info.siblings or ()})


def _repository(name: str) -> str:
    """Returns the repository of open_clip's MODEL/TAG."""
    model, _, tag = name.rpartition("/")
    known = f"{model.replace('/', '-')}/{tag}"
    if known not in REPOSITORIES:
        raise ValueError(
            f"{OPEN_CLIP}{name} is not known: give the repository itself, {HUB}OWNER/NAME, or one of "
            f"{', '.join(REPOSITORIES)}"
        )
    return REPOSITORIES[known]


def _download(name: str, repository: str, revision: str | None, file: str | None, files: set[str]) -> str:
    """Returns the local path of a model whose repository has these files."""

    def fetch(wanted: str, revision: str | None) -> epath.Path:
        return epath.Path(huggingface_hub.hf_hub_download(repository, wanted, revision=revision))

    if file and file not in files:
        raise FileNotFoundError(f"{name}: {repository} has no such file, but {', '.join(sorted(files)[:10])}")
    # By the revision's own name, under which the cache then knows the commit.
    found = {wanted: fetch(wanted, revision) for wanted in DESCRIPTIONS if wanted in files}
    if file:
        return str(fetch(file, revision))
    weights = []
    if "config.json" in found and "model_type" in read_json(found["config.json"]):
        weights += huggingface.WEIGHT_FILES
    if openclip.CONFIG_FILE in found:
        weights += openclip.WEIGHT_FILES
    wanted = next((weight for weight in weights if weight in files), None)
    if wanted is None:
        raise FileNotFoundError(
            f"{name}: {repository} has no weights beside a config of transformers or open_clip: name the "
            f"file to read, {HUB}{repository}/FILE"
        )
    folder = pathlib.Path(next(iter(found.values()))).parent
    path = fetch(wanted, folder.name)
    if tensor_files.is_index(path):
        for shard in sorted(set(tensor_files.weight_map(path).values())):
            fetch(shard, folder.name)
    return str(folder)
