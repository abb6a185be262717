"""What a supervised stage asks of the data module: labels, few of them, repeats, a test part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data.shades import Shades, Strategy, flat, make_module

from beit_pretrain.data.sources import Digits
from beit_pretrain.data.transforms import EvalView, OneView
from beit_pretrain.errors import ConfigError, DataError


def test_a_supervised_stage_meets_labelled_images_only() -> None:
    labels = np.tile([0, 1, -1, 2, -1], 40)
    source = Shades(200, labels, {"train": range(120), "val": range(120, 160), "test": range(160, 200)})
    everything, module = make_module(source), make_module(source, labelled=True)
    for split, whole in everything.splits.items():
        assert module.splits[split].tolist() == [i for i in whole.tolist() if labels[i] >= 0]
    # What an unsupervised stage holds out of the same images is held out here too.
    mixed = Shades(200, labels)
    held_out = make_module(mixed, val_share=0.2).splits["val"]
    kept = make_module(mixed, val_share=0.2, labelled=True).splits["val"]
    assert kept.tolist() == [i for i in held_out.tolist() if labels[i] >= 0]


def test_a_part_without_any_label_is_left_out() -> None:
    labels = np.repeat([0, 1, -1], [30, 30, 20])
    source = Shades(80, labels, {"train": range(60), "test": range(60, 80)})
    module = make_module(source, labelled=True, val_share=0.1)
    assert {name: len(part) for name, part in module.splits.items()} == {"train": 54, "val": 6}
    assert module.test_dataloader() == []


@pytest.mark.parametrize("labels", [None, [-1] * 20])
def test_a_supervised_stage_without_labels_says_how_to_give_them(labels: Any) -> None:
    message = r"the training images have no labels, .* set data=class_folders data\.root=<the folder above>$"
    with pytest.raises(DataError, match=message):
        make_module(Shades(20, labels), labelled=True)


def test_classes_have_names_or_a_line_that_says_where_to_get_them() -> None:
    source = Shades(6, [0, 1, 2, 0, 1, 2])
    assert make_module(source, labelled=True).class_names == ["class 0", "class 1", "class 2"]
    assert make_module(Digits()).class_names == [str(digit) for digit in range(10)]
    source.class_names = None
    message = r"have no names: set data\.source\.label to a column of class labels .* data\.root above"
    with pytest.raises(DataError, match=message):
        _ = make_module(source, labelled=True).class_names
    with pytest.raises(DataError, match="have no names"):
        _ = make_module(Shades(6)).class_names


def test_a_few_labels_are_chosen_by_class_and_anew_with_every_seed() -> None:
    labels = np.repeat([0, 1, 2, 3], [300, 80, 19, 1])
    source = Shades(400, labels)
    for limit, expected in [
        (20, [14, 4, 1, 1]),
        (4, [1, 1, 1, 1]),
        (2, [2, 0, 0, 0]),
        (400, [300, 80, 19, 1]),
    ]:
        parts = [
            make_module(source, val_share=0.0, train_limit=limit, seed=seed).splits["train"]
            for seed in (0, 1)
        ]
        assert [np.bincount(labels[part], minlength=4).tolist() for part in parts] == [expected] * 2
        assert (parts[0].tolist() == parts[1].tolist()) == (limit == 400)
        again = make_module(source, val_share=0.0, train_limit=limit, seed=1, batch_size=2).splits["train"]
        assert np.array_equal(again, parts[1])


def test_a_limit_is_on_training_images_and_not_on_held_out_ones() -> None:
    source = Shades(200, np.arange(200) % 4, {"train": range(150), "test": range(150, 200)})
    whole, few = (
        make_module(source, val_share=0.1),
        make_module(source, val_share=0.1, train_limit=16, labelled=True),
    )
    assert {name: len(part) for name, part in few.splits.items()} == {"train": 16, "val": 15, "test": 50}
    assert np.array_equal(few.splits["val"], whole.splits["val"])
    assert set(few.splits["train"].tolist()) < set(whole.splits["train"].tolist())
    assert few.steps_per_epoch == 2
    assert len(make_module(Shades(50), val_share=0.0, train_limit=9).splits["train"]) == 9


def test_a_limit_above_the_number_of_images_is_refused() -> None:
    message = (
        "data.train_limit=49 is more than the 48 training images; set it to 48 or less, or to null for all"
    )
    with pytest.raises(ConfigError, match=message):
        make_module(Shades(50), val_share=0.04, train_limit=49)
    labels = np.repeat([0, -1], 25)
    with pytest.raises(ConfigError, match=r"data\.train_limit=26 is more than the 25 training images"):
        make_module(Shades(50, labels), val_share=0.0, train_limit=26, labelled=True)


def test_repeats_give_each_image_several_views_in_as_many_steps() -> None:
    once, thrice = (make_module(Shades(60), batch_size=12, val_share=0.0, repeats=r) for r in (1, 3))
    assert once.steps_per_epoch == thrice.steps_per_epoch == 5
    plain, batches = list(once.train_dataloader()), list(thrice.train_dataloader())
    samples = torch.cat([batch.sample for batch in batches]).unflatten(0, (20, 3))
    assert torch.equal(samples[:, 0], torch.cat([batch.sample for batch in plain])[:20])
    assert (samples == samples[:, :1]).all() and len(samples.unique()) == 20
    assert torch.cat([batch.view for batch in batches]).unflatten(0, (20, 3)).tolist() == [[0, 1, 2]] * 20
    pictures = torch.cat([batch.image for batch in batches])
    assert len({picture.numpy().tobytes() for picture in pictures}) == 60
    assert torch.equal(batches[0].image[0], plain[0].image[0])  # the first view is that of a plain run


def test_ranks_share_the_test_samples_with_fixed_views() -> None:
    module = make_module(Shades(60, splits={"test": range(40, 57)}), val_share=0.1, batch_size=12)
    seen: list[int] = []
    for rank in range(3):
        module.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
            global_step=0, global_rank=rank, world_size=3, strategy=Strategy()
        )
        batches = flat(module.test_dataloader())
        assert batches == flat(module.test_dataloader())
        seen += [sample for batch in batches for sample in batch[4]]
    assert sorted(seen) == list(range(40, 57))
    assert make_module(Shades(60)).test_dataloader() == []


def test_views_may_be_set_once_the_classes_are_known() -> None:
    module = make_module(
        Shades(30, np.arange(30) % 2), views=None, eval_views=None, val_share=0.2, labelled=True
    )
    module.views = OneView(image_size=(6, 8))
    module.eval_views = EvalView(image_size=(4, 10))
    assert next(iter(module.train_dataloader())).image.shape == (8, 3, 6, 8)
    loader: Any = module.val_dataloader()
    assert next(iter(loader)).image.shape[1:] == (3, 4, 10)


def test_a_last_run_trains_on_what_was_held_out() -> None:
    chosen, last = (
        make_module(Digits(), labelled=True),
        make_module(Digits(), labelled=True, train_on_val=True),
    )
    assert "val" not in last.splits and last.val_dataloader() == []
    both = np.union1d(chosen.splits["train"], chosen.splits["val"])
    assert len(both) == 1400 and np.array_equal(last.splits["train"], both)
    assert np.array_equal(last.splits["test"], chosen.splits["test"])
