from __future__ import annotations

import errno
import hashlib
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import CheckpointError

KEY = "tokenizer.checkpoint"


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(2, 2, generator=generator).bfloat16(),
        "count": torch.tensor(7),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Payload:
    """Creates a file when an ordinary unpickler meets it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.ckpt"
    content = {"state_dict": state(), "config": {"lr": 1e-3, "names": ["a", None, True]}}
    files.write(path, content)
    back = files.read(path)
    assert same(back["state_dict"], content["state_dict"])
    assert back["config"] == content["config"]
    assert [entry.name for entry in path.parent.iterdir()] == ["a.ckpt"]


def test_a_bit_that_flipped_anywhere_is_noticed_or_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    content = {"state_dict": state(), "step": 1234, "names": ["a", None]}
    files.write(path, content)
    whole, read, refused = path.read_bytes(), 0, 0
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.unlink()
        path.write_bytes(broken)
        try:
            back = files.read(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        read += 1
        assert same(back.pop("state_dict"), content["state_dict"]), place
        assert back == {"step": 1234, "names": ["a", None]}, place
    # Between the parts lie zeros, and headers say twice what they say.
    assert read > 100 and refused > 100


def test_what_is_damaged_says_which_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write(path, {"weight": torch.ones(64)})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\0\0\x80\x3f" * 64, b"\0\0\x80\x3f" * 63 + b"\0\0\x80\xbf"))
    with pytest.raises(CheckpointError, match=rf"^{KEY}=.*a\.ckpt: is damaged: \S+/data/0 is not .*CRC-32"):
        files.read(path, KEY)
    path.write_bytes(whole)
    assert files.read(path, KEY)["weight"].sum() == 64, "another file under the same name"


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(files.read(tmp_path / "a.pth"), state())


@pytest.mark.parametrize("zipped", [True, False])
def test_both_pytorch_formats_are_read_by_content_whatever_they_are_called(
    tmp_path: Path, zipped: bool
) -> None:
    path = tmp_path / "weights.bin"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    assert same(files.read(path), state())


def test_safetensors_are_read_by_content_whatever_they_are_called(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    safetensors.torch.save_file(state(), path)
    assert same(files.read(path), state())


def test_a_run_folder_means_its_best_checkpoint_and_else_its_last(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tok"
    files.write(folder / "checkpoints" / "last.ckpt", {"is": "last"})
    assert files.read(folder, KEY) == {"is": "last"}
    files.write(folder / "checkpoints" / "best.ckpt", {"is": "best"})
    assert files.read(folder, KEY) == {"is": "best"}
    assert files.resolve(folder, KEY) == folder / "checkpoints" / "best.ckpt"


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write(Path("~/a.ckpt"), {"is": "here"})
    assert files.read(Path("~/a.ckpt")) == {"is": "here"}
    assert (tmp_path / "a.ckpt").is_file()


def test_a_folder_without_checkpoints_says_so_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{KEY}=.*a folder without checkpoints/best\.ckpt"):
        files.read(tmp_path, KEY)


def test_a_missing_file_says_so_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{KEY}=.*nowhere: there is no such file .*set {KEY}"):
        files.read(tmp_path / "nowhere", KEY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html><body>Log in</body></html>", "is a web page, not weights"),
        (b"<html>404</html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\xff\xd8\xff\xe0 a JPEG picture", "is not a checkpoint"),
        (b"PK\x03\x04 and then nothing that belongs in a zip", "truncated or damaged"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{", "starts like a safetensors file but .* truncated or damaged"),
        (pickle.dumps([1, 2], protocol=2), "truncated or damaged|holds more than weights"),
    ],
)
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        files.read(path, KEY)
    assert str(caught.value).startswith(f"{KEY}={path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_one_line(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "a.ckpt"
    content = {"weight": torch.randn(100, 100)}
    if kind == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"truncated or damaged|is damaged") as caught:
        files.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path, witness = tmp_path / "a.ckpt", tmp_path / "witness"
    torch.save({"weight": Payload(witness)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir, .*not loaded") as caught:
        files.read(path)
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists(), "the payload is not one, so its absence above proved nothing"


def test_a_file_takes_no_more_memory_than_its_size_lets_one_expect(tmp_path: Path) -> None:
    """Compressed entries, one number that stands for many, one tensor under many names, a list of lists of lists."""
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "zip.pt", "w") as packed:
        for entry in whole.infolist():
            content = whole.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = b"0" * 10_000_000
            packed.writestr(entry.filename, content, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed entries"):
        files.read(tmp_path / "zip.pt")
    shared = torch.zeros(1000)
    nested: list[Any] = []
    for _ in range(20):
        nested = [nested] * 1000
    for content in (
        {"weight": torch.zeros(1).expand(10**9)},
        {"model": {"state": torch.zeros(1).expand(10**6, 10**3)}},
        {f"w{i}": shared for i in range(100_000)},
        {"list": nested},
    ):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(CheckpointError, match="larger than the file"):
            files.read(tmp_path / "weights.pt")
    torch.save({f"w{i}": shared for i in range(3)}, tmp_path / "tied.pt")
    assert len(files.read(tmp_path / "tied.pt")) == 3


def test_a_tensor_alone_is_not_a_dictionary_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dictionary"):
        files.read(path)


def test_tensors_read_are_no_longer_tied_to_a_file_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write(path, {"weight": torch.zeros(1000)})
    old = files.read(path)
    files.write(path, {"weight": torch.ones(1000)})
    assert old["weight"].sum() == 0
    old["weight"] += 5
    assert files.read(path)["weight"].sum() == 1000


def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    files.write(path, {"is": "old"})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"last\.ckpt was not written: no space left on device; what"
        ):
            files.write(path, {"is": "new"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert files.read(path) == {"is": "old"}


def test_a_write_that_breaks_off_in_the_middle_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    files.write(path, {"is": "old"})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"was not written: File too large; what was there .* unchanged"
        ):
            files.write(path, {"weight": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert files.read(path) == {"is": "old"}


def test_a_failure_that_is_not_the_disks_removes_the_temporary_file_and_passes_through(
    tmp_path: Path,
) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises((AttributeError, pickle.PicklingError)):
        files.write(path, {"function": lambda: None})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="was not written: "):
        files.write(tmp_path / "file" / "last.ckpt", {})


def test_a_writer_killed_at_work_leaves_a_file_that_the_next_write_removes(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    files.write(path, {"is": "old"})
    program = f"""
        import os, signal
        from pathlib import Path
        from beit_pretrain.checkpoint import files
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        files.write(Path({str(path)!r}), {{"is": "new"}})
    """
    root = Path(files.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert files.read(path) == {"is": "old"}
    files.write(path, {"is": "newer"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_temporary_files_of_writers_at_work_and_of_other_paths_stay(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    alive = tmp_path / f".last.ckpt.{socket.gethostname()}-{os.getppid()}.tmp"
    elsewhere = tmp_path / ".last.ckpt.another-machine-1.tmp"
    other = tmp_path / f".best.ckpt.{socket.gethostname()}-999999999.tmp"
    abandoned = tmp_path / ".last.ckpt.another-machine-2.tmp"
    for entry in (alive, elsewhere, other, abandoned):
        entry.write_text("")
    long_ago = time.time() - files.STALE_AFTER - 1
    os.utime(abandoned, (long_ago, long_ago))
    files.write(path, {})
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, alive.name, elsewhere.name, other.name}


def test_text_is_written_whole(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "results.json", '{"Größe": 1}')
    assert (tmp_path / "a" / "results.json").read_text(encoding="utf-8") == '{"Größe": 1}'
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_the_hash_of_a_file_is_the_one_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_the_weight_hash_depends_on_names_types_shapes_and_values_and_nothing_else() -> None:
    base = state()
    first = files.weight_hash(base)
    assert files.weight_hash(dict(reversed(base.items()))) == first
    strided = {**base, "weight": base["weight"].t().contiguous().t()}
    assert not strided["weight"].is_contiguous()
    assert files.weight_hash(strided) == first
    assert files.weight_hash({**base, "weight": torch.nn.Parameter(base["weight"])}) == first

    changed = base["weight"].clone()
    changed[2, 4] = torch.nextafter(changed[2, 4], torch.tensor(torch.inf))
    others = [
        {**base, "weight": changed},
        {**base, "weight": base["weight"].reshape(5, 3)},
        {**base, "half": base["half"].view(torch.float16)},  # the same bytes
        {**base, "more": torch.zeros(0)},
        {"other" if name == "half" else name: value for name, value in base.items()},
    ]
    hashes = [files.weight_hash(other) for other in others]
    assert len({first, *hashes}) == 1 + len(others)
