"""Models by their names on the hub: a server that answers as the hub does, and the library's own cache.

Names are asked for in processes of their own, as the library reads its variables when it is imported.
"""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import open_clip
import pytest
from hub_cache import COMMIT, fill_cache
from test_convert import save_random_model

from clipmoe_jax.convert import convert
from clipmoe_jax.interop import hub
from clipmoe_jax.interop.load import read_model

REPOSITORY = pathlib.Path(__file__).parents[2]
ASK = """
import json, sys
from clipmoe_jax.interop import hub
def answer(name):
    try:
        return hub.local_path(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(json.dumps({name: answer(name) for name in sys.argv[1:]}))
"""
CLIP, BY_TAG = "hf-hub:openai/clip-vit-base-patch32", "open_clip:ViT-B-32-quickgelu/openai"
TIMM, FILE, LARGE = "hf-hub:timm/clip@v1", "hf-hub:somebody/clip-moe/models/model.pt", "hf-hub:somebody/large"
GOOD = (CLIP, f"{CLIP}@main", BY_TAG, TIMM, FILE, LARGE)
LAION = "open_clip:ViT-B-32/laion2b_s34b_b79k"
WRONG = {
    "hf-hub:nobody/nothing": "FileNotFoundError: .*: the hub has no repository nobody/nothing that you may",
    "hf-hub:timm/clip@v9": "FileNotFoundError: hf-hub:timm/clip@v9: timm/clip has no revision v9$",
    "hf-hub:timm/clip/model.pt": "FileNotFoundError: .*: timm/clip has no such file, but README.md, config",
    "hf-hub:somebody/words": "FileNotFoundError: .* has no weights beside a config .*: name the file to re",
    "hf-hub:clip": "ValueError: hf-hub:clip names no model: give hf-hub:OWNER/NAME, then @REVISION and /FILE",
    "open_clip:ViT-B-32/laion2b": "ValueError: open_clip:ViT-B-32/laion2b is not known: give the repository",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's interface as far as downloads use it: model_info, resolve, and weights on another address."""

    repositories: dict[str, dict[str, bytes]] = {}  # {repository: {file: content}}, of one revision each
    sent: list[tuple[str, str]] = []  # (repository, file) whose contents were sent

    def do_HEAD(self):
        self.do_GET(with_content=False)

    def do_GET(self, with_content=True):
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.path)
        file = re.fullmatch(r"/(cdn/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repository = (api[1] if api else file[2]) if api or file else ""
        if repository not in self.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        files, revision = self.repositories[repository], api[2] if api else file[3]
        if revision not in (None, "main", "v1", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if api:
            siblings = [{"rfilename": name} for name in files]
            described = {"id": repository, "sha": COMMIT, "siblings": siblings}
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(described).encode())
        headers = {"X-Repo-Commit": COMMIT}
        if (content := files.get(file[4])) is None:
            return self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if file[4].endswith((".safetensors", ".bin")) and not file[1]:  # large files lie elsewhere
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
            return self.answer(302, headers | {"Location": f"http://{self.headers['Host']}/cdn{self.path}"})
        if with_content:
            self.sent.append((repository, file[4]))
        return self.answer(200, headers | {"ETag": etag}, content, with_content)

    def answer(self, status, headers, content=b"", with_content=True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *arguments):
        """Writes nothing."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model as transformers and as open_clip have it, and another in shards."""
    root = tmp_path_factory.mktemp("models")
    save_random_model(root / "params")
    for to in ("huggingface", "openclip", "clipmoe"):
        convert(str(root / "params"), to, str(root / to), context_length=248 if to == "clipmoe" else None)
    return root


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_shards(files):
    """The files of a folder of transformers as if its weights were large."""
    weights, shard = files.pop("model.safetensors"), "model-00001-of-00001.safetensors"
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    index = {"weight_map": {name: shard for name in header if name != "__metadata__"}}
    return files | {shard: weights, "model.safetensors.index.json": json.dumps(index).encode()}


@contextlib.contextmanager
def serving(folders):
    """A hub of a few repositories. Yields its address."""
    others = {"pytorch_model.bin": b"torch's", "tf_model.h5": b"TensorFlow's", "tokenizer.json": b"{}"}
    of_timm = {"config.json": b'{"architecture": "vit"}', "model.safetensors": b"a tower"}
    Hub.repositories = {
        "openai/clip-vit-base-patch32": files_of(folders / "huggingface") | others,
        "timm/clip": files_of(folders / "openclip") | of_timm,
        "somebody/clip-moe": {"models/model.pt": (folders / "clipmoe" / "model.pt").read_bytes()},
        "somebody/large": in_shards(files_of(folders / "huggingface")),
        "somebody/words": {"README.md": b"words"},
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(names, home, endpoint, **environment):
    """Returns {name: path or error} of names that a new process asks for."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env={**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", **environment},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    """Of the hub; then, from its cache, where nobody listens any more, and in the library's offline mode."""
    home = tmp_path_factory.mktemp("home")
    with serving(folders) as endpoint:
        online = ask([*GOOD, *WRONG], home, endpoint)
    files = [folders / "openclip" / name for name in ("open_clip_config.json", "open_clip_model.safetensors")]
    fill_cache(home / "hub", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", *files)  # by another program
    unreachable = ask([*GOOD, LAION, "hf-hub:timm/clip"], home, endpoint)
    return online, unreachable, ask([*GOOD, LAION], home, endpoint, HF_HUB_OFFLINE="1")


def test_files_that_are_read_are_downloaded_once(answers):
    """Those of one format: timm's repositories have a tower under transformers' names without its config."""
    assert sorted(Hub.sent) == [
        ("openai/clip-vit-base-patch32", "config.json"),
        ("openai/clip-vit-base-patch32", "model.safetensors"),
        ("openai/clip-vit-base-patch32", "preprocessor_config.json"),
        ("somebody/clip-moe", "models/model.pt"),
        ("somebody/large", "config.json"),
        ("somebody/large", "model-00001-of-00001.safetensors"),
        ("somebody/large", "model.safetensors.index.json"),
        ("somebody/large", "preprocessor_config.json"),
        ("timm/clip", "config.json"),
        ("timm/clip", "open_clip_config.json"),
        ("timm/clip", "open_clip_model.safetensors"),
    ]


FORMATS = {
    CLIP: ("params", "transformers' format"),
    f"{CLIP}@main": ("params", "transformers' format"),
    BY_TAG: ("params", "transformers' format"),
    LARGE: ("params", "transformers' format"),
    TIMM: ("params", "open_clip's format"),
    FILE: ("clipmoe", "the released code's format"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_is_read_under_its_name(answers, folders, name):
    folder, format_name = FORMATS[name]
    found, expected = read_model(answers[0][name]), read_model(str(folders / folder))
    assert format_name in found.source and found.config == expected.config
    np.testing.assert_array_equal(found.params["visual"]["proj"], expected.params["visual"]["proj"])


def test_what_is_in_the_cache_needs_no_network(answers, folders):
    online, unreachable, offline = answers
    for name in GOOD:
        assert online[name] == unreachable[name] == offline[name]
    assert unreachable[LAION] == offline[LAION]
    assert read_model(offline[LAION]).config == read_model(str(folders / "params")).config


@pytest.mark.parametrize(("name", "message"), WRONG.items(), ids=WRONG)
def test_a_name_that_is_none_is_told_in_a_line(answers, name, message):
    assert re.match(message, answers[0][name])


def test_without_network_a_name_that_is_not_in_the_cache_says_what_to_do(answers):
    """Of timm's the revision v1 is there alone."""
    message = answers[1]["hf-hub:timm/clip"]
    assert re.match("FileNotFoundError: hf-hub:timm/clip is not in .*, and the hub cannot be asked", message)
    assert message.endswith("download it where there is network (hf download timm/clip)")


@pytest.mark.parametrize("name", hub.REPOSITORIES)
def test_repositories_are_those_of_open_clip(name):
    """But OpenAI's, which open_clip has from copies of timm's."""
    model, tag = name.split("/")
    of_open_clip = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].strip("/")
    if tag == "openai":
        assert hub.REPOSITORIES[name].startswith("openai/clip-vit-") and of_open_clip.startswith("timm/")
    else:
        assert of_open_clip == hub.REPOSITORIES[name]
