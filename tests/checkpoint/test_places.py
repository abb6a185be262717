from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import hubs
import mirrors
import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from safetensors.torch import load_file, save

from beit_pretrain.checkpoint import download, places
from beit_pretrain.checkpoint.places import locate
from beit_pretrain.errors import BeitError, CheckpointError, DownloadError

WEIGHTS = save({"encoder.cls_token": torch.arange(4.0)})
TIMM = "beit_base_patch16_224.in22k_ft_in22k_in1k"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Caches of this test's own, no pauses, and a hub that nobody serves until a test does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(places, "CACHE", tmp_path / "weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _ask(monkeypatch, "http://127.0.0.1:9")
    yield
    close_session()


@pytest.fixture
def mirror() -> Iterator[mirrors.Mirror]:
    with mirrors.serving(mirrors.Mirror(files={"a/x.pth": WEIGHTS, "b/x.pth": WEIGHTS[::-1]})) as mirror:
        yield mirror


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    files = {"config.json": b"{}", "preprocessor_config.json": b"{ }", "README.md": b"", "tf_model.h5": b""}
    both = {**files, "model.safetensors": WEIGHTS, "pytorch_model.bin": b"", "old/model.safetensors": b""}
    with hubs.serving(hubs.Hub(repositories={"o/n": both})) as hub:
        _ask(monkeypatch, hub.endpoint)
        yield hub


def _ask(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refused(source: str, kind: type[BeitError], match: str) -> str:
    """The message for a source, after a look that it is one line that names the option and the value."""
    with pytest.raises(kind, match=match) as caught:
        locate(source, key="init_from")
    message = str(caught.value)
    assert message.startswith(f"init_from={source}: ")
    assert "\n" not in message
    return message


# --- paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "hf:o", "beit_base_patch16_224", "published:x"])
def test_a_path_that_exists_wins_over_any_other_reading(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert locate(name, key="init_from") == (Path(name), {})
    assert locate(tmp_path / name, key="init_from") == (tmp_path / name, {})


def test_a_path_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.pth").touch()
    assert locate("~/x.pth", key="init_from").path == tmp_path / "x.pth"


def test_a_path_that_is_not_there_is_said_and_nothing_else_is_read_into_it(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for source in ("runs/finetune", "./a/b.c", "/a/b", "~/nothing", "~nobody/x", "a/b.pth", "", "x" * 300):
        message = refused(source, CheckpointError, "there is no such file or folder")
        assert message.endswith("; set init_from to a checkpoint or run folder")


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("microsoft/beit-base-patch16-224", r"or to hf:microsoft/beit-base-patch16-224 \(on the Hugging"),
        (TIMM, f"or to timm:{TIMM}$"),
        ("beitv2_base_patch16_224", "timm:beitv2_base_patch16_224$"),
        ("beit_base_patch16_224_pt22k_ft22k", "or to published:beit_base_patch16_224_pt22k_ft22k$"),
        ("w/beit_base_patch16_224_pt22k.pth", "or to published:beit_base_patch16_224_pt22k$"),
    ],
)
def test_a_name_without_its_place_is_completed(source: str, meant: str) -> None:
    refused(source, CheckpointError, f"set init_from to a checkpoint or run folder,.* {meant}")


@pytest.mark.parametrize("source", ["s3://bucket/x.pth", "hf-hub:o/n", "HTTPS://host/x"])
def test_an_unknown_place_lists_the_known_ones(source: str) -> None:
    scheme = source.partition(":")[0]
    refused(
        source,
        CheckpointError,
        f"and {scheme}: is no place for weights; give a path, https://ADDRESS, published:NAME, "
        "hf:OWNER/NAME or timm:NAME",
    )


# --- addresses ----------------------------------------------------------------------------------------------


def test_an_address_is_fetched_once_and_then_needs_no_network(mirror: mirrors.Mirror) -> None:
    urls = [mirror.url(name) for name in ("a/x.pth", "b/x.pth")]
    first, second = [locate(url, key="init_from") for url in urls]
    assert (first.path.read_bytes(), second.path.read_bytes()) == (WEIGHTS, WEIGHTS[::-1])
    assert [found.facts for found in (first, second)] == [{"source": url} for url in urls]
    mirror.status = [404, 404]
    assert [locate(url, key="init_from") for url in urls] == [first, second]
    assert len(mirror.asked) == 2


def test_queries_tell_addresses_apart_and_never_become_names(mirror: mirrors.Mirror) -> None:
    mirror.files |= {"d?id=1/../x": b"PK1", "d?id=2": b"PK2", "": b"PK3"}
    paths = [locate(mirror.url(name), key="init_from").path for name in ("d?id=1/../x", "d?id=2", "")]
    assert [path.read_bytes() for path in paths] == [b"PK1", b"PK2", b"PK3"]
    assert {path.parent for path in paths} == {places.CACHE}
    assert [re.sub("^[0-9a-f]{16}-", "", path.name) for path in paths] == ["d", "d", "weights"]


def test_an_address_may_be_longer_than_the_name_of_a_file(mirror: mirrors.Mirror) -> None:
    long = "x" * 400 + ".pth?sig=" + "s" * 400
    mirror.files[long] = WEIGHTS
    assert locate(mirror.url(long), key="init_from").path.read_bytes() == WEIGHTS


def test_a_broken_download_goes_on_where_it_broke(mirror: mirrors.Mirror) -> None:
    mirror.cut_after = [10] + [0] * download.ATTEMPTS
    refused(mirror.url("a/x.pth"), DownloadError, "the connection ended after 10 of")
    mirror.asked.clear()
    assert locate(mirror.url("a/x.pth"), key="init_from").path.read_bytes() == WEIGHTS
    assert mirror.asked == [("/a/x.pth", "bytes=10-")]


def test_an_address_that_fails_says_why_and_where_a_file_could_be_put(mirror: mirrors.Mirror) -> None:
    put = rf"or put the file at {places.CACHE}/\w+-x.pth"
    refused(mirror.url("c/x.pth"), DownloadError, f"HTTP 404 .*{put}")
    mirror.status = [401]
    refused(mirror.url("a/x.pth"), DownloadError, f"HTTP 401 .*{put}")
    mirror.files["a/x.pth"] = b"<!DOCTYPE html><html>Please log in</html>"
    refused(mirror.url("a/x.pth"), DownloadError, f"sent a web page instead of the file .*{put}")
    refused("http://127.0.0.1:9/x.pth", DownloadError, f"Connection refused.*{put}")


@pytest.mark.parametrize("source", ["https:/host/x.pth", "https://", "https://[host/x.pth", "http:"])
def test_half_an_address_is_refused(source: str) -> None:
    refused(source, CheckpointError, "this is no address; write https://HOST/PATH")


# --- published ----------------------------------------------------------------------------------------------


def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **entry: object) -> None:
    """One release of the name `mine`, in place of the authors'."""
    empty = {"size": None, "sha256": None, "mean": None, "std": None, "image_size": None, "crop_pct": None}
    (tmp_path / "published.yaml").write_text(json.dumps({"mine": {**empty, **entry}}))
    monkeypatch.setattr(places, "RELEASES", tmp_path / "published.yaml")


def test_a_release_comes_from_the_first_address_that_has_it_with_what_is_known_of_it(
    mirror: mirrors.Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [mirror.url("gone.pth"), mirror.url("a/x.pth")]
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    known = {"mean": [0.5, 0.4, 0.3], "image_size": [224, 224]}
    release(tmp_path, monkeypatch, urls=urls, size=len(WEIGHTS), sha256=sha256, **known)
    found = locate("published:mine", key="init_from")
    assert found == (places.CACHE / "mine.pth", {**known, "source": "published:mine"})
    assert found.path.read_bytes() == WEIGHTS
    mirror.asked.clear()
    assert locate("published:mine", key="init_from") == found
    assert mirror.asked == []


def test_a_release_that_is_not_what_was_published_is_refused(
    mirror: mirrors.Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(tmp_path, monkeypatch, urls=[mirror.url("a/x.pth")], sha256="0" * 64)
    refused(
        "published:mine", DownloadError, f"SHA-256 {hashlib.sha256(WEIGHTS).hexdigest()} instead of 0{{64}}"
    )
    assert not (places.CACHE / "mine.pth").exists()


def test_an_unknown_release_names_the_nearest() -> None:
    count = len(yaml.safe_load(places.RELEASES.read_text()))
    said = rf"none of the {count} published files is called so; did you mean published:beit_large_patch16_224_pt22k"
    refused("published:beit_large_patch16_224_pt21k", CheckpointError, said)
    message = refused("published:resnet50", CheckpointError, rf"none of the {count} published files")
    assert "did you mean" not in message


def test_the_list_of_releases_is_sound() -> None:
    text = places.RELEASES.read_text()
    names = re.findall(r"^(\w+):$", text, re.MULTILINE)
    releases = yaml.safe_load(text)
    assert names == sorted(set(names)) == list(releases)  # a name given twice would hide the first
    for name, entry in releases.items():
        assert list(entry) == ["urls", "size", "sha256", "mean", "std", "image_size", "crop_pct"], name
        assert entry["urls"] and len(set(entry["urls"])) == len(entry["urls"])
        assert all(re.fullmatch(rf"https://[\w./-]+/{name}\.pth", url) for url in entry["urls"]), name
        assert entry["size"] is None or isinstance(entry["size"], int)
        assert entry["sha256"] is None or re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        assert [len(entry[key]) for key in ("mean", "std", "image_size")] == [3, 3, 2]
        assert all(side % 16 == 0 for side in entry["image_size"])
        assert entry["crop_pct"] in ((None, 0.875) if entry["image_size"] == [224, 224] else (None, 1.0))
        tuned = re.search(r"_ft\w*(1k|2[12]k)$", name)  # only classifiers are evaluated on a crop
        assert (entry["crop_pct"] is None) == (tuned is None), name


def test_the_releases_are_normalised_as_timm_says() -> None:
    """timm's models are the same weights; its tags and its sizes against ours."""
    import timm

    tags = {
        "in22k_ft_in22k": "pt22k_ft22k",
        "in22k_ft_in22k_in1k": "pt22k_ft22kto1k",
        "in1k_ft_in1k": "pt1k_ft1k",
    }
    tags |= {"in1k_ft_in22k": "pt1k_ft21k", "in1k_ft_in22k_in1k": "pt1k_ft21kto1k"}
    releases = yaml.safe_load(places.RELEASES.read_text())
    names = timm.list_pretrained(places.TIMM_BEITS)
    assert len(names) >= 13
    for full in names:
        architecture, tag = full.split(".")
        entry, theirs = releases[f"{architecture}_{tags[tag]}"], timm.get_pretrained_cfg(full)
        assert (tuple(entry["mean"]), tuple(entry["std"])) == (theirs.mean, theirs.std), full
        assert (3, *entry["image_size"]) == theirs.input_size, full


# --- the hub ------------------------------------------------------------------------------------------------


def test_a_repository_is_fetched_without_what_is_not_needed(hub: hubs.Hub) -> None:
    path, facts = locate("hf:o/n", key="init_from")
    assert hub.fetched == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert {entry.name for entry in path.iterdir()} == hub.fetched
    assert torch.equal(load_file(path / "model.safetensors")["encoder.cls_token"], torch.arange(4.0))
    assert facts == {"source": "hf:o/n"}


@pytest.mark.parametrize(
    "names",
    [
        {"pytorch_model.bin"},
        {
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        },
        {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"},
    ],
    ids=["pickle", "parts", "parts of a pickle"],
)
def test_other_forms_of_weights_are_taken_where_there_is_nothing_better(
    hub: hubs.Hub, names: set[str]
) -> None:
    hub.repositories["o/n"] = {
        name: name.encode() for name in (*names, "config.json", "README.md", "flax_model.msgpack")
    }
    found = locate("hf:o/n", key="init_from")
    assert hub.fetched == {*names, "config.json"}
    hub.refusal = (500, {})
    assert locate("hf:o/n", key="init_from") == found


def test_a_repository_that_is_there_needs_no_network(hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate("hf:o/n", key="init_from")
    hub.asked.clear()
    assert locate("hf:o/n", key="init_from") == found
    assert hub.asked == ["GET /api/models/o/n"]  # whether it has changed
    _ask(monkeypatch, "http://127.0.0.1:9")
    assert locate("hf:o/n", key="init_from") == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert locate("hf:o/n", key="init_from") == found


def test_a_commit_that_is_there_is_not_asked_for_again(hub: hubs.Hub) -> None:
    path, _ = locate(f"hf:o/n@{hubs.COMMIT}", key="init_from")
    assert path.name == hubs.COMMIT
    hub.asked.clear()
    assert locate(f"hf:o/n@{hubs.COMMIT}", key="init_from").path == path
    assert hub.asked == []


def test_a_half_fetched_repository_is_not_taken_for_a_whole_one(hub: hubs.Hub) -> None:
    (locate("hf:o/n", key="init_from").path / "model.safetensors").unlink()
    hub.refusal = (401, {})
    refused("hf:o/n", DownloadError, "answers HTTP 401: log in with `hf auth login`")
    hub.refusal = None
    assert (locate("hf:o/n", key="init_from").path / "model.safetensors").read_bytes() == WEIGHTS


def test_an_older_commit_does_not_stand_in_for_a_newer_that_cannot_be_fetched(
    hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate("hf:o/n", key="init_from")
    newer = hubs.COMMIT[::-1]
    monkeypatch.setattr(hubs, "COMMIT", newer)
    hub.revisions += (newer,)
    hub.refusal, hub.refuses_files = (403, {"X-Error-Code": "GatedRepo"}), True
    refused("hf:o/n", DownloadError, "the repository is gated: ask for access at")


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {"X-Error-Code": "RepoNotFound"}, "there is no .*/o/m, or it is private: .*`hf auth login`"),
        (
            403,
            {"X-Error-Code": "GatedRepo"},
            "gated: ask for access at .*/o/m, then log in with `hf auth login`",
        ),
        (401, {}, "HTTP 401: log in with `hf auth login`"),
        (429, {}, "HTTP 429: try again later, or download it where there is network .*and give the folder"),
    ],
)
def test_a_refusal_says_what_to_do(hub: hubs.Hub, status: int, headers: dict[str, str], said: str) -> None:
    hub.refusal = (status, headers)
    refused("hf:o/m", DownloadError, said)


def test_a_refusal_of_the_files_alone_is_said_too(hub: hubs.Hub) -> None:
    hub.refusal, hub.refuses_files = (403, {}), True
    refused("hf:o/n", DownloadError, "/o/n answers HTTP 403: log in with `hf auth login`, or download it")


def test_faults_of_a_repository_are_one_line(hub: hubs.Hub) -> None:
    hub.repositories["o/empty"] = {"README.md": b""}
    refused("hf:o/m", DownloadError, f"there is no {hub.endpoint}/o/m, or it is private")
    refused("hf:o/n@v2", DownloadError, "/o/n has no revision v2: give a branch, a tag or a commit")
    refused("hf:o/empty", DownloadError, r"holds none of model\.safetensors, .*: give one that holds weights")
    refused("hf:o--n/x", DownloadError, "this is no name on the hub; write hf:OWNER/NAME")
    for name in ("hf:", "hf:n", "hf:o/n/config.json", "hf:o/n@"):
        refused(name, CheckpointError, "write hf:OWNER/NAME or hf:OWNER/NAME@REVISION")


def test_without_network_and_cache_it_says_how_to_come_by_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    mend = r"download it where there is network \(`hf download o/n`\) and give the folder"
    refused("hf:o/n", DownloadError, f"not in .*hub, and .* cannot be reached .*refused.*: {mend}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    refused("hf:o/n", DownloadError, f"not in .*hub, and HF_HUB_OFFLINE is set: unset it, or {mend}")


def test_a_cache_that_cannot_be_written_is_one_line(hub: hubs.Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").touch()
    refused("hf:o/n", DownloadError, f"{tmp_path}/hub cannot be written: .*; free it, or set HF_HOME")


def test_the_hubs_warnings_stay_inside(hub: hubs.Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.headers = {"X-HF-Warning": "login; you are a stranger here"}
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(caplog.handler)
    try:
        level = logger.level
        locate("hf:o/n", key="init_from")
        assert (logger.level, caplog.text) == (level, "")
    finally:
        logger.removeHandler(caplog.handler)


# --- timm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TIMM, "beit_base_patch16_224"], ids=["with its tag", "by default"])
def test_a_model_of_timm_comes_from_its_repository_with_what_timm_knows(hub: hubs.Hub, name: str) -> None:
    hub.repositories[f"timm/{TIMM}"] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    path, facts = locate(f"timm:{name}", key="init_from")
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    half = [0.5, 0.5, 0.5]
    assert facts == {
        "mean": half,
        "std": half,
        "crop_pct": 0.9,
        "image_size": [224, 224],
        "source": f"timm:{name}",
    }


def test_another_model_of_timm_is_refused() -> None:
    for name in ("vit_base_patch16_224", "beit3_base_patch16_224.pt"):
        said = r"this is another architecture; of timm's models those called beit_\* or beitv2_\* are read"
        refused(f"timm:{name}", CheckpointError, said)
    said = f"timm knows no weights of this name; did you mean timm:{TIMM}"
    refused(f"timm:{TIMM}0", CheckpointError, said)
    refused("timm:beit_tiny", CheckpointError, "timm knows no weights of this name$")


# --- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "hf:microsoft/beit-base-patch16-224",
        "hf:me/mine@v1.0",
        "hf:me/mine@refs/pr/1",
        f"timm:{TIMM}",
        "published:beit_base_patch16_224_pt22k",
        "https://host/x.pth",
        "http://127.0.0.1:8000/a%20b+c.pth?download",
    ],
)
def test_hydra_takes_a_source_as_it_is(source: str) -> None:
    assert OverridesParser.create().parse_override(f"init_from={source}").value() == source


@pytest.mark.parametrize("tail", ["?a=1", "?a&b", "#part", "a,b", "~me/x", "a(1)"])
def test_hydra_needs_quotes_around_some_addresses(tail: str) -> None:
    parser, source = OverridesParser.create(), f"https://host/x{tail}"
    assert parser.parse_override(f"init_from='{source}'").value() == source
    try:
        bare = parser.parse_override(f"init_from={source}").value()
    except HydraException:
        return
    assert isinstance(bare, ChoiceSweep)  # of two addresses
