"""Ids on disk: what is read is what was written for that image and view, or nothing; and the views that go with it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import shutil
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from data.shades import Shades, make_module

from beit_pretrain.data import tokens
from beit_pretrain.data.dataset import ViewDataset
from beit_pretrain.data.sampler import Failure, Key
from beit_pretrain.data.tokens import HELD_OUT, TokenCache, TokenDataset
from beit_pretrain.data.transforms import Item, TwoViews
from beit_pretrain.errors import ConfigError, DataError
from beit_pretrain.masking import RandomMask

TOKENS = 4
RECORD = 2 * TOKENS + 4


def make_cache(root: Path, **changes: Any) -> TokenCache:
    settings: dict[str, Any] = {"made_of": {"seed": 1}, "samples": 200, "tokens": TOKENS, "vocabulary": 2**16}
    return TokenCache(root=root, views=3, **(settings | changes))


ALL = np.arange(200)


def truth(samples: np.ndarray, view: int = 0) -> np.ndarray:
    """Ids (B, N) that are another function of sample and view in each place, over the whole range of 16 bits."""
    place = np.arange(TOKENS)
    return (samples[:, None] * 7919 + place * 104_729 + (view + 2) * 15_485_863) % 2**16


def write(cache: TokenCache, samples: np.ndarray, view: int = 0) -> None:
    cache.write(samples, np.full(len(samples), view), truth(samples, view))


def read(cache: TokenCache, samples: np.ndarray, view: int = 0) -> np.ndarray:
    """The samples whose ids are there; those ids must be the right ones."""
    ids, known = cache.read(samples, np.full(len(samples), view))
    assert ids.dtype == np.uint16 and ids.shape == (len(samples), TOKENS)
    assert (ids[known] == truth(samples[known], view)).all()
    return samples[known]


def part(cache: TokenCache, view: int = 0) -> tuple[Path, Path]:
    """The only files of a view."""
    ((ids,), (numbers,)) = (list(cache.place(view).glob(f"*.{end}")) for end in ("ids", "samples"))
    return ids, numbers


def test_what_was_written_is_read_by_another_process_and_nothing_else(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    some = np.array([5, 199, 0, 17])
    for view in (0, 2, HELD_OUT):
        write(cache, some, view)
        assert read(cache, ALL, view).tolist() == [0, 5, 17, 199]
    other = make_cache(tmp_path)
    views = np.array([0, 2, 1, HELD_OUT])  # several views in one batch
    ids, known = other.read(np.array([5, 5, 5, 17]), views)
    assert known.tolist() == [True, True, False, True]
    for row, (sample, view) in enumerate(zip([5, 5, 5, 17], views.tolist(), strict=True)):
        assert (ids[row] == (truth(np.array([sample]), view) if known[row] else 0)).all()
    assert part(cache)[0].stat().st_size == 4 * RECORD
    assert sorted(path.name for path in cache.folder.iterdir()) == [
        "cache.json",
        "held-out",
        "view-0000",
        "view-0002",
    ]


def test_ids_that_are_there_are_not_stored_again(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    write(cache, ALL[:5])
    write(cache, ALL[:9])
    write(make_cache(tmp_path), ALL[:9])
    assert part(cache)[0].stat().st_size == 9 * RECORD  # and no other file
    assert len(cache.missing(ALL, 0)) == 191


def spoilt(cache: TokenCache, which: int, content: bytes) -> Iterator[None]:
    """The files of the only writer of view 0, one of them changed; afterwards as before and alone."""
    path = part(cache)[which]
    before, files = path.read_bytes(), set(path.parent.iterdir())
    path.write_bytes(content)
    yield
    path.write_bytes(before)
    for other in set(path.parent.iterdir()) - files:
        other.unlink()


def test_a_file_cut_at_any_byte_gives_whole_records_only_and_is_made_whole(tmp_path: Path) -> None:
    made = make_cache(tmp_path)
    write(made, ALL[:3])
    for which, content in enumerate(path.read_bytes() for path in part(made)):
        for cut in range(len(content)):
            for _ in spoilt(made, which, content[:cut]):
                cache = make_cache(tmp_path)
                assert read(cache, ALL[:5]).tolist() == list(range(cut // (len(content) // 3)))
                write(cache, ALL[:4])
                assert read(make_cache(tmp_path), ALL[:5]).tolist() == list(range(4))


def test_a_flipped_bit_is_a_miss_and_never_other_ids(tmp_path: Path) -> None:
    made = make_cache(tmp_path)
    write(made, ALL[:3])
    for which, content in enumerate(path.read_bytes() for path in part(made)):
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            for _ in spoilt(made, which, bytes(flipped)):
                cache = make_cache(tmp_path)
                known = read(cache, ALL).tolist()
                # A number that was flipped can point another image's place to this record too.
                assert set(known) < {0, 1, 2} and len(known) == 2 if which == 0 else len(known) in (1, 2)
                write(cache, ALL[:3])
                assert read(make_cache(tmp_path), ALL).tolist() == [0, 1, 2]


def test_records_of_another_image_view_or_cache_are_not_taken(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    write(cache, ALL[:5])
    ids, numbers = part(cache)
    other = make_cache(tmp_path, made_of={"seed": 2})
    for place in (cache.place(1), cache.place(HELD_OUT), other.place(0)):
        shutil.copytree(ids.parent, place)
    assert not len(read(make_cache(tmp_path), ALL, 1)) and not len(read(make_cache(tmp_path), ALL, HELD_OUT))
    assert not len(read(other, ALL))
    numbers.write_bytes(np.array([0, 2, 1, 3, 150], "<i8").tobytes())
    assert read(make_cache(tmp_path), ALL).tolist() == [0, 3]


def test_a_file_of_zeros_as_a_power_cut_leaves_it_holds_nothing(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    write(cache, ALL[:5])
    ids, _ = part(cache)
    ids.write_bytes(bytes(ids.stat().st_size))
    assert not len(read(make_cache(tmp_path), ALL))


def _write_views(root: Path, seed: int, views: int, begin: Barrier, done: Event) -> None:
    cache = make_cache(root)
    rows = np.random.default_rng(seed).permutation(ALL)
    begin.wait()
    for view in range(views):
        for first in range(0, len(rows), 7):
            write(cache, rows[first : first + 7], view)
        done.set()


def test_processes_write_at_once_and_one_that_is_killed_leaves_no_wrong_ids(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    begin, done = fork.Barrier(3), [fork.Event() for _ in range(3)]
    many = (2, 2, 10**6)
    given = [(tmp_path, seed, views, begin, done[seed]) for seed, views in enumerate(many)]
    *two, endless = [fork.Process(target=_write_views, args=args) for args in given]
    for process in (*two, endless):
        process.start()
    assert done[2].wait(30)
    time.sleep(random.uniform(0, 0.1))
    endless.kill()
    for process in (*two, endless):
        process.join(30)
    assert [process.exitcode for process in two] == [0, 0]
    cache = make_cache(tmp_path)
    assert len({path.name.split("-")[-2] for path in cache.place(0).glob("*.ids")}) > 1
    views = sorted(int(path.name[5:]) for path in cache.folder.glob("view-*"))
    there = [len(read(cache, ALL, view)) for view in views]
    assert there[:-1] == [200] * (len(views) - 1) and there[0] == there[1] == 200
    write(cache, ALL, views[-1])
    assert len(read(make_cache(tmp_path), ALL, views[-1])) == 200


def test_what_others_store_is_seen_at_the_next_look_or_after_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = make_cache(tmp_path), make_cache(tmp_path)
    assert not len(read(cache, ALL))
    write(other, ALL[:3])
    assert not len(read(cache, ALL))
    cache.look()
    assert len(read(cache, ALL)) == 3
    write(other, ALL[3:6])
    now = time.monotonic()
    monkeypatch.setattr(tokens.time, "monotonic", lambda: now + 61)
    assert len(read(cache, ALL)) == 6


def test_a_record_counts_from_the_moment_that_its_number_is_there(tmp_path: Path) -> None:
    made = make_cache(tmp_path)
    write(made, ALL[:5])
    _, numbers = part(made)
    content = numbers.read_bytes()
    numbers.write_bytes(content[:20])
    cache = make_cache(tmp_path)
    assert read(cache, ALL).tolist() == [0, 1]
    numbers.write_bytes(content)
    cache.look()
    assert read(cache, ALL).tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_ends_the_storing_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(tmp_path)
    write(cache, ALL[:5])
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: len(data) // 2]))
    with caplog.at_level(logging.WARNING):
        write(cache, ALL[5:10])
        write(cache, ALL[10:15])
    assert [record.getMessage() for record in caplog.records] == [
        f"token cache: {cache.place(0)} cannot be written (No space left on device); the tokenizer runs on, and no "
        "more is stored"
    ]
    monkeypatch.undo()
    assert read(make_cache(tmp_path), ALL).tolist() == list(range(5))


def test_a_cache_is_named_by_all_that_its_ids_depend_on(tmp_path: Path) -> None:
    one = make_cache(tmp_path)
    assert make_cache(tmp_path).folder == one.folder
    others = [{"made_of": {"seed": 2}}, {"samples": 201}, {"tokens": 5}, {"vocabulary": 10}]
    assert len({make_cache(tmp_path, **change).folder for change in others} | {one.folder}) == 5


def test_what_cannot_be_a_cache_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^tokenizer.cache=.* holds ids below 65536, .* has 65537: set .*null$"
    ):
        make_cache(tmp_path, vocabulary=65537)
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"^tokenizer.cache=.*file cannot be written \(.*\): set it to another"
    ):
        make_cache(tmp_path / "file")
    cache = make_cache(tmp_path)
    for content in ("", "{}", (cache.folder / "cache.json").read_text()[:-5]):
        (cache.folder / "cache.json").write_text(content)
        with pytest.raises(
            DataError, match=r"^.*cache.json is damaged: remove .*, whose ids will be made anew$"
        ):
            make_cache(tmp_path)


class _Disk(NamedTuple):
    free: int


def test_what_is_there_is_told_and_a_disk_that_cannot_take_the_rest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": ALL[:150], "val": ALL[150:180]}
    cache = make_cache(tmp_path)
    write(cache, ALL[:150])
    write(cache, ALL[:70], 1)
    rest = (80 + 150 + 30) * (RECORD + 8)
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda _: _Disk(rest))
    assert cache.story(splits).endswith(
        "1 of 3 views complete, 220 of 480 images are there (4.4e-06 GB); the tokenizer runs for the rest"
    )
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda _: _Disk(rest - 1))
    with pytest.raises(
        ConfigError,
        match=r"^tokenizer.cache=.*tokenizer.views=3 views take 5.2e-06 GB more, and .* set fewer",
    ):
        cache.story(splits)
    for view in (1, 2):
        write(cache, ALL[:150], view)
    write(cache, ALL[150:180], HELD_OUT)
    assert cache.story(splits).endswith("the tokenizer does not run")


def test_a_worker_that_is_not_forked_gets_no_copy_of_what_is_mapped(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    write(cache, ALL)
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 2000
    assert read(copy, ALL).tolist() == ALL.tolist()


# --- the views that go with it ------------------------------------------------------------------------------

SAMPLES = 24


class Spotted(Shades):
    """Noise, of which some pictures cannot be read."""

    bad = (3, 4)

    def read(self, index: int) -> torch.Tensor:
        if index in self.bad:
            raise DataError("broken")
        return super().read(index)


def two_views() -> TwoViews:
    return TwoViews(image_size=(8, 8), token_image_size=(4, 4), mask=RandomMask(grid=(2, 2), count=2))


def datasets(root: Path, views: int, **changes: Any) -> tuple[TokenDataset, ViewDataset]:
    """With a cache, and without one."""
    cache = TokenCache(root=root, made_of={}, samples=SAMPLES, tokens=TOKENS, vocabulary=2**16, views=views)
    settings: dict[str, Any] = {
        "source": Shades(SAMPLES),
        "indices": np.arange(SAMPLES),
        "view": two_views(),
        "seed": 5,
        "held_out": False,
        "max_bad": 0.5,
        "bad_log": None,
    } | changes
    return TokenDataset(cache=cache, **settings), ViewDataset(**settings)


def batch(dataset: TokenDataset, epoch: int, samples: Any) -> Any:
    return dataset.collate(dataset.__getitems__([Key(int(sample), epoch) for sample in samples]))


@pytest.mark.parametrize("views", [1, 3])
def test_crops_come_round_again_and_masks_do_not(tmp_path: Path, views: int) -> None:
    cached, plain = datasets(tmp_path, views)
    masks = []
    for epoch in range(7):
        # Without ids, then, from the second round on, with them.
        if epoch >= views:
            write(cached.cache, np.arange(SAMPLES), epoch % views)
            cached.cache.look()
        now = batch(cached, epoch, range(SAMPLES))
        same = [plain[Key(sample, epoch % views)] for sample in range(SAMPLES)]  # the crops
        fresh = [plain[Key(sample, epoch)] for sample in range(SAMPLES)]  # the masks
        for row, (crop, mask) in enumerate(zip(same, fresh, strict=True)):
            assert isinstance(crop, Item) and isinstance(mask, Item) and mask.crops.mask is not None
            assert torch.equal(now.image[row], crop.crops.image)
            assert torch.equal(now.mask[row], mask.crops.mask)
            if epoch < views:
                assert crop.crops.token_image is not None
                assert torch.equal(now.token_image[row], crop.crops.token_image)
        assert now.sample.tolist() == list(range(SAMPLES)) and set(now.view.tolist()) == {epoch % views}
        assert (now.token_image is None) == (now.ids is not None) == (epoch >= views)
        if epoch >= views:
            assert (now.ids.numpy() == truth(np.arange(SAMPLES), epoch % views)).all()
        masks.append(now.mask)
    assert not any(torch.equal(masks[0], later) for later in masks[1:])


def test_held_out_images_have_one_view_of_their_own(tmp_path: Path) -> None:
    cached, plain = datasets(tmp_path, 3, held_out=True)
    write(cached.cache, np.arange(SAMPLES), 0)  # a training view's: not theirs
    first = batch(cached, 0, range(8))
    assert first.ids is None
    for row in range(8):
        item = plain[Key(row, 0)]
        assert isinstance(item, Item) and item.crops.mask is not None and item.crops.token_image is not None
        assert torch.equal(first.mask[row], item.crops.mask)
        assert torch.equal(first.token_image[row], item.crops.token_image)
    cached.cache.keep(first.sample, None, torch.from_numpy(truth(np.arange(8), HELD_OUT)))
    again = batch(cached, 0, range(8))
    assert again.token_image is None and torch.equal(again.mask, first.mask)
    assert (again.ids.numpy() == truth(np.arange(8), HELD_OUT)).all()


def test_a_batch_has_all_its_ids_or_all_its_pictures(tmp_path: Path) -> None:
    cached, _ = datasets(tmp_path, 2)
    write(cached.cache, np.arange(7))
    assert batch(cached, 0, range(7)).token_image is None
    part = batch(cached, 0, range(8))
    assert part.ids is None and len(part.token_image) == 8


def test_an_image_that_cannot_be_read_gives_way_to_another_with_its_own_ids(tmp_path: Path) -> None:
    cached, _ = datasets(tmp_path, 1, source=Spotted(SAMPLES))
    assert batch(cached, 0, [2, 3, 9]).sample.tolist() == [2, 5, 9]  # from now on it is known
    write(cached.cache, np.array([2, 9]))
    assert batch(cached, 0, [2, 3, 9]).ids is None
    write(cached.cache, np.array([5]))
    now = batch(cached, 1, [2, 3, 9])
    assert now.sample.tolist() == [2, 5, 9] and now.token_image is None
    assert (now.ids.numpy() == truth(np.array([2, 5, 9]))).all()
    none, _ = datasets(tmp_path, 1, source=Spotted(SAMPLES), max_bad=0.0)
    assert isinstance(batch(none, 0, [3, 9]), Failure)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_find_in_the_next_epoch_what_was_stored_in_this_one(tmp_path: Path, workers: int) -> None:
    module = make_module(Shades(SAMPLES), workers=workers, views=two_views(), val_share=0.0, timeout=60)
    cache = TokenCache(root=tmp_path, made_of={}, samples=SAMPLES, tokens=TOKENS, vocabulary=2**16, views=1)
    module.token_cache = cache
    loader: Any = module.train_dataloader()
    seen, right = [], []
    for epoch in range(2):
        loader.batch_sampler.position = lambda: epoch * 3  # noqa: B023
        for now in loader:
            wanted = torch.from_numpy(truth(now.sample.numpy()))
            if now.ids is None:
                cache.keep(now.sample, now.view, wanted)
            else:
                right.append(torch.equal(now.ids, wanted.int()))
            seen.append(now.ids is None)
    del loader  # the workers wait for it
    assert all(right)
    assert seen == [True] * 3 + [False] * 3
