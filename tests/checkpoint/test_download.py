from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mirrors import Mirror, serving

from beit_pretrain.checkpoint import download
from beit_pretrain.checkpoint.download import fetch
from beit_pretrain.errors import DownloadError

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with serving(Mirror(files={"a.pkl": CONTENT})) as mirror:
        yield mirror


@pytest.fixture
def second() -> Iterator[Mirror]:
    with serving(Mirror(files={"a.pkl": CONTENT})) as mirror:
        yield mirror


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {".a.pkl.lock"}


def test_a_file_is_fetched_once_and_then_read_from_the_cache(mirror: Mirror, tmp_path: Path) -> None:
    for _ in range(2):
        path = fetch(
            "a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path / "c", size=300_000, sha256=SHA256.upper()
        )
        assert path == tmp_path / "c" / "a.pkl"
        assert path.read_bytes() == CONTENT
    assert mirror.asked == [("/a.pkl", None)]
    assert names(tmp_path / "c") == {"a.pkl"}


def test_a_cut_connection_is_resumed_where_it_broke(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [100_000, 50_000]
    path = fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in mirror.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_resumes_what_an_earlier_one_left(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [100_000] + [0] * download.ATTEMPTS
    with pytest.raises(DownloadError, match="the connection ended after 100,000 of 300,000 bytes"):
        fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path)
    assert names(tmp_path) == {"a.pkl.part", "a.pkl.part.json"}
    mirror.asked.clear()
    assert fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path).read_bytes() == CONTENT
    assert mirror.asked == [("/a.pkl", "bytes=100000-")]
    assert names(tmp_path) == {"a.pkl"}


def test_a_server_that_ignores_ranges_is_read_from_the_start(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges, mirror.cut_after = False, [100_000]
    assert fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in mirror.asked] == [None, "bytes=100000-"]


def test_a_file_that_changed_since_is_read_from_the_start(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [100_000] + [0] * download.ATTEMPTS
    with pytest.raises(DownloadError):
        fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path)
    mirror.files["a.pkl"], mirror.version = CONTENT[::-1], '"2"'
    assert fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path).read_bytes() == CONTENT[::-1]


def test_a_part_that_is_already_whole_is_kept(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "a.pkl.part").write_bytes(CONTENT)
    assert fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert mirror.asked == [("/a.pkl", "bytes=300000-")]


@pytest.mark.parametrize("length", [1000, 400_000])
def test_a_part_of_something_else_is_thrown_away_and_read_from_the_start(
    mirror: Mirror, tmp_path: Path, length: int
) -> None:
    (tmp_path / "a.pkl.part").write_bytes(b"x" * length)
    assert fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert [asked for _, asked in mirror.asked] == [f"bytes={length}-", None]


def test_another_mirror_continues_a_part_only_if_a_hash_will_tell(
    mirror: Mirror, second: Mirror, tmp_path: Path
) -> None:
    for folder, sha256, asked in (("sure", SHA256, "bytes=100000-"), ("unsure", None, None)):
        mirror.cut_after = [100_000] + [0] * download.ATTEMPTS
        second.asked.clear()
        urls = [mirror.url("a.pkl"), second.url("a.pkl")]
        assert fetch("a.pkl", urls=urls, cache=tmp_path / folder, sha256=sha256).read_bytes() == CONTENT
        assert second.asked == [("/a.pkl", asked)]


def test_a_wrong_hash_is_said_and_the_file_not_kept(mirror: Mirror, tmp_path: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(
        DownloadError, match=rf"a\.pkl could not be fetched .*SHA-256 {SHA256} instead of {wrong}"
    ):
        fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path, sha256=wrong)
    assert names(tmp_path) == set()


def test_a_wrong_size_is_said_before_it_is_fetched(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="offers 300,000 bytes instead of 299,999"):
        fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path, size=299_999)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_recognised_and_not_kept(mirror: Mirror, tmp_path: Path, content_type: str) -> None:
    mirror.files["a.pkl"], mirror.content_type = PAGE, content_type
    with pytest.raises(
        DownloadError, match=r"a\.pkl: sent a web page instead of the file .*put the file at .*a\.pkl"
    ):
        fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path)
    assert names(tmp_path) == set()


def test_the_second_mirror_is_asked_when_the_first_has_nothing(
    mirror: Mirror, second: Mirror, tmp_path: Path
) -> None:
    urls = [mirror.url("gone.pkl"), second.url("a.pkl")]
    assert fetch("a.pkl", urls=urls, cache=tmp_path).read_bytes() == CONTENT
    assert (len(mirror.asked), len(second.asked)) == (1, 1)


def test_the_second_mirror_is_asked_when_the_first_does_not_answer(second: Mirror, tmp_path: Path) -> None:
    urls = ["http://127.0.0.1:9/a.pkl", second.url("a.pkl")]
    assert fetch("a.pkl", urls=urls, cache=tmp_path).read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.status = [503, 429]
    assert fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path).read_bytes() == CONTENT
    assert len(mirror.asked) == 3


def test_the_error_names_every_address_and_its_fault_in_one_line(
    mirror: Mirror, second: Mirror, tmp_path: Path
) -> None:
    second.status = [403]
    urls = [mirror.url("gone.pkl"), second.url("a.pkl"), "file:///etc/passwd"]
    with pytest.raises(DownloadError) as caught:
        fetch("a.pkl", urls=urls, cache=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{urls[0]}: HTTP 404", f"{urls[1]}: HTTP 403", f"{urls[2]}: not an http"):
        assert part in message


def test_no_address_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no address is given"):
        fetch("a.pkl", urls=[], cache=tmp_path)


def test_offline_names_the_place_and_the_key_and_asks_nobody(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"a\.pkl is not there and tokenizer\.offline=true .*or set tokenizer"
    ) as e:
        fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path, offline=True, key="tokenizer.offline")
    assert str(tmp_path / "a.pkl") in str(e.value)
    assert mirror.asked == []


def test_offline_takes_a_file_put_there_by_hand_and_keeps_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(CONTENT)
    assert fetch("a.pkl", urls=[], cache=tmp_path, sha256=SHA256, offline=True) == tmp_path / "a.pkl"
    with pytest.raises(DownloadError, match="is damaged and offline=true"):
        fetch("a.pkl", urls=[], cache=tmp_path, size=5, offline=True)
    assert (tmp_path / "a.pkl").is_file()


def test_a_damaged_file_in_the_cache_is_replaced(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"rubbish")
    assert fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path, sha256=SHA256).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_is_one_line(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"a\.pkl cannot be written: "):
        fetch("a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path / "file")


def test_those_who_want_the_same_file_at_once_fetch_it_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.delay = 0.3  # seconds: the others come while the first one is at it
    with ThreadPoolExecutor(3) as pool:  # a lock on a file keeps threads apart as it does processes
        jobs = [pool.submit(fetch, "a.pkl", urls=[mirror.url("a.pkl")], cache=tmp_path) for _ in range(3)]
    assert [job.result().read_bytes() == CONTENT for job in jobs] == [True] * 3
    assert mirror.asked == [("/a.pkl", None)]
