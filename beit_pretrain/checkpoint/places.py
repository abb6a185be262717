"""Where weights are: a path, an address, one of the authors' releases, the Hugging Face hub, timm's list of models."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from beit_pretrain.checkpoint.download import fetch
from beit_pretrain.errors import CheckpointError, DownloadError

CACHE = Path("~/.cache/beit_pretrain/weights")  # of addresses and releases; the hub's library has its own
RELEASES = Path(__file__).with_name("published.yaml")
FILES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
FACTS = ("mean", "std", "crop_pct", "image_size")

TIMM_BEITS = ["beit_*", "beitv2_*"]  # beit3_* is another architecture

# What is taken from a repository on the hub: the first of these that is there, with these files beside it.
WEIGHTS = (
    ["model.safetensors"],
    ["model.safetensors.index.json", "model-*.safetensors"],
    ["pytorch_model.bin"],
    ["pytorch_model.bin.index.json", "pytorch_model-*.bin"],
)
BESIDE = ["config.json", "preprocessor_config.json"]


class Found(NamedTuple):
    """A file or folder on this machine, and what the place knows of it that the file may not say."""

    path: Path
    facts: dict[str, Any]  # of mean, std, crop_pct, image_size [h, w] and source those that are known


def locate(source: str | Path, *, key: str) -> Found:
    """The file or folder behind a path, an address, published:NAME, hf:OWNER/NAME or timm:NAME.

    What is not on this machine is fetched, once. A path that exists wins over any other reading and is returned as it
    is. `key` is the option that `source` was given as, for the messages. CheckpointError for a source that is none of
    these, DownloadError for one that cannot be fetched.
    """
    text = str(source)
    path = os.path.expanduser(text)
    if os.path.exists(path):  # unlike Path.exists this takes an address too long for the name of a file
        return Found(Path(path), {})
    place = PLACES.get(text.partition(":")[0])
    if place is None:
        raise CheckpointError(_missing(text, key))
    found = place(text, f"{key}={text}")
    return Found(found.path, {**found.facts, "source": text})


def _address(text: str, given: str) -> Found:
    """A file behind an address, under a name of its own."""
    try:
        parts = urlsplit(text)
    except ValueError:  # such as a bracket that is not closed
        parts = urlsplit("")
    if not parts.hostname:
        raise CheckpointError(f"{given}: this is no address; write https://HOST/PATH")
    last = re.sub(r"[^\w.-]", "_", parts.path.rpartition("/")[2], flags=re.ASCII)[-80:]
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{last or 'weights'}"
    return Found(_fetched(given, name, urls=[text]), {})


def _release(text: str, given: str) -> Found:
    """A file that the authors have published."""
    name = text.removeprefix("published:")
    releases = _releases()
    if name not in releases:
        near = _listed(_near(name, releases, "published:"))
        raise CheckpointError(
            f"{given}: none of the {len(releases)} published files is called so"
            f"{near and f'; did you mean {near}?'} (docs/weights.md lists them)"
        )
    entry = releases[name]
    path = _fetched(given, f"{name}.pth", urls=entry["urls"], size=entry["size"], sha256=entry["sha256"])
    return Found(path, {fact: entry[fact] for fact in FACTS if entry[fact] is not None})


def _hub(text: str, given: str) -> Found:
    """A folder with the weights and the configuration of a repository on the hub."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@(\S+))?", text)
    if not match:
        raise CheckpointError(f"{given}: write hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return Found(_snapshot(match[1], match[2], given), {})


def _timm(text: str, given: str) -> Found:
    """The repository of a model that timm knows by name, and what timm says of it."""
    import timm

    name = text.removeprefix("timm:")
    if not name.startswith(tuple(pattern.rstrip("*") for pattern in TIMM_BEITS)):
        raise CheckpointError(
            f"{given}: this is another architecture; of timm's models those called {_listed(TIMM_BEITS)} are read"
        )
    names = _timm_names()
    says = timm.get_pretrained_cfg(name) if name in names else None
    if says is None or not says.hf_hub_id:
        near = _listed(_near(name, names, "timm:"))
        raise CheckpointError(
            f"{given}: timm knows no weights of this name{near and f'; did you mean {near}?'}"
        )
    facts = {
        "mean": list(says.mean),
        "std": list(says.std),
        "crop_pct": says.crop_pct,
        "image_size": list(says.input_size[1:]),
    }
    return Found(_snapshot(says.hf_hub_id, None, given), facts)


PLACES: dict[str, Callable[[str, str], Found]] = {
    "http": _address,
    "https": _address,
    "published": _release,
    "hf": _hub,
    "timm": _timm,
}


def _releases() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(RELEASES.read_text())


def _timm_names() -> list[str]:
    """Names of timm's BEiT weights; without a tag timm takes its default for that architecture."""
    import timm

    names = timm.list_pretrained(TIMM_BEITS)
    return sorted({*names, *(name.partition(".")[0] for name in names)})


def _fetched(given: str, name: str, **wanted: Any) -> Path:
    try:
        return fetch(name, cache=CACHE, **wanted)
    except DownloadError as error:
        raise DownloadError(f"{given}: {error}") from error


def _snapshot(repository: str, revision: str | None, given: str) -> Path:
    """The folder of a repository in the cache of the hub's library, after a look whether the hub has a newer one.

    Without network, or where the hub refuses, the cache answers alone.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _quiet():
        folder = _cached(repository, revision)
        if folder is not None and folder.name == revision:  # a commit, which never changes
            return folder
        try:
            about = HfApi().model_info(repository, revision=revision)
            if folder is not None and folder.name == about.sha:
                return folder
            folder = None  # older than the hub's: not taken in place of a download that fails
            there = {file.rfilename for file in about.siblings or []}
            weights = next((names for names in WEIGHTS if names[0] in there), None)
            if weights is not None:
                wanted = [*BESIDE, *weights]
                return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
        except Exception as error:  # the library stands on requests, httpx or httpx2, as old as it is
            if folder is not None:
                return folder
            raise DownloadError(f"{given}: {_refusal(error, repository, revision)}") from error
    names = _listed(names[0] for names in WEIGHTS)
    raise DownloadError(f"{given}: the repository holds none of {names}: give one that holds weights")


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a repository that was fetched whole before; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for weights in WEIGHTS:
        with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
            wanted = [*BESIDE, *weights]
            found = snapshot_download(
                repository, revision=revision, allow_patterns=wanted, local_files_only=True
            )
            if all((Path(found) / name).is_file() for name in (BESIDE[0], weights[0])):
                return Path(found)
    return None


def _refusal(error: Exception, repository: str, revision: str | None) -> str:
    """Why a repository was not fetched, and what to do about it."""
    from huggingface_hub import constants, errors

    at = f"{constants.ENDPOINT}/{repository}"
    elsewhere = f"download it where there is network (`hf download {repository}`) and give the folder"
    if isinstance(error, errors.LocalEntryNotFoundError):  # the fault of a single file, wrapped
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    match error:
        case errors.HFValidationError():
            return "this is no name on the hub; write hf:OWNER/NAME"
        case errors.GatedRepoError():
            return f"the repository is gated: ask for access at {at}, then log in with `hf auth login`"
        case errors.RepositoryNotFoundError():
            return f"there is no {at}, or it is private: mend the name, or log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"{at} has no revision {revision}: give a branch, a tag or a commit of it"
        case errors.OfflineModeIsEnabled():
            return (
                f"it is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or {elsewhere}"
            )
        case errors.HfHubHTTPError(response=response) if response is not None:
            mend = "log in with `hf auth login`" if response.status_code in (401, 403) else "try again later"
            return f"{at} answers HTTP {response.status_code}: {mend}, or {elsewhere}"
        case OSError(errno=int(), strerror=str(reason)) if not isinstance(error, ConnectionError):
            return f"{constants.HF_HUB_CACHE} cannot be written: {reason}; free it, or set HF_HOME"
    reason = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"it is not in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached ({reason}):"
        f" {elsewhere}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of the hub's library: what matters in them is said in an error."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _missing(text: str, key: str) -> str:
    """The message for a source that is neither on this machine nor in a place that is known."""
    absent = f"{key}={text}: there is no such file or folder"
    if match := re.match(r"[A-Za-z][\w+.-]*:", text):
        return (
            f"{absent}, and {match[0]} is no place for weights; give a path, https://ADDRESS,"
            " published:NAME, hf:OWNER/NAME or timm:NAME"
        )
    options = []
    is_file = text.endswith(FILES) or Path(text).parent.exists()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) and not is_file:
        options.append(f"hf:{text} (on the Hugging Face hub)")
    name = Path(text).name.removesuffix(".pth")
    if name in (releases := _releases()):
        options.append(f"published:{name}")
    elif re.match(r"beit(v2)?_", name):
        known = _near(name, names := _timm_names(), "timm:")
        options += known if name in names else [*_near(name, releases, "published:"), *known]
    also = f", or to {_listed(options)}" if options else ""
    return f"{absent}; set {key} to a checkpoint or run folder{also}"


def _near(name: str, names: Iterable[str], scheme: str) -> list[str]:
    """The names nearest to a mistyped one, as one would write them."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.8)
    return [f"{scheme}{near}" for near in (close if name not in close else [name])]


def _listed(options: Iterable[str]) -> str:
    """`a, b or c`."""
    words = list(options)
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
