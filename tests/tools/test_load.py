"""`beit_pretrain.load`: the model of a run as it was trained, its preprocessing and its names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bare_models import SMALL, masked
from classifiers import save_classifier
from PIL import Image
from pretrained import save_pretrained, save_tokenizer
from segmenters import PARTS, save_segmenter
from torch import Tensor

import beit_pretrain
from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, formats
from beit_pretrain.compose import compose
from beit_pretrain.data.transforms import EvalView
from beit_pretrain.errors import CheckpointError, ConfigError, DataError
from beit_pretrain.models.rel_pos import resize_table

SIZE = "image_size=[32,48]"


def pixels(height: int, width: int) -> Tensor:
    return torch.randint(
        256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_a_classifier_gives_what_its_stage_gives(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "run", SIZE, "data.normalize.mean=[0.1,0.2,0.3]")
    found = beit_pretrain.load(folder)
    cfg = compose(["stage=classify", "data=digits", "mode=evaluate", f"init_from={folder}"])
    stage = build_stage(cfg, [str(i) for i in range(10)])
    stage.load_state_dict(files.read(folder)["state_dict"])
    stage.eval()
    image = EvalView(image_size=(32, 48), crop_pct=cfg.stage.eval_views.crop_pct)(pixels(70, 91), 0).image
    expected = stage.head(stage.encoder(stage.normalize(image[None])))  # pyright: ignore[reportCallIssue]
    assert torch.equal(found.model(found.preprocess(pixels(70, 91))[None]), expected)
    assert found.labels == [str(i) for i in range(10)] and found.stage == "classify"
    assert found.preprocess.mean == (0.1, 0.2, 0.3) and not found.model.training
    assert all(parameter.requires_grad for parameter in found.model.parameters())


@pytest.mark.parametrize("distributed", [False, True], ids=["alone", "ddp"])
def test_the_weights_can_be_trained(tmp_path: Path, distributed: bool) -> None:
    encoder = beit_pretrain.load(save_pretrained(tmp_path / "run")).encoder
    if distributed:  # as docs/weights.md says: every weight must have a part in the loss
        encoder.mask_token = None
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    head = torch.nn.Linear(encoder.width, 3)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-2)
    for step in range(3):
        image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(head(encoder(image).mean(1)), torch.arange(4) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same = {name for name, value in encoder.state_dict().items() if torch.equal(value, before[name])}
    assert same == (set() if distributed else {"mask_token"}) and not encoder.training


def test_the_average_of_the_weights_is_another_model(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "run", "stage.ema=0.9")
    raw, ema = (beit_pretrain.load(folder, weights=which).model for which in ("raw", "ema"))
    image = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(raw(image), ema(image))
    plain = save_classifier(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="keeps no running average"):
        beit_pretrain.load(plain, weights="ema")


def test_a_pre_trained_model_gives_logits_of_every_patch_and_hides_what_is_masked(tmp_path: Path) -> None:
    found = beit_pretrain.load(save_pretrained(tmp_path / "run", SIZE))
    image, mask = torch.randn(2, 3, 32, 48), torch.zeros(2, 96, dtype=torch.bool)
    mask[0, :40] = mask[1, 50:] = True
    logits = found.model(image, mask)
    assert logits.shape == (2, 96, 32) and found.labels is None
    model = found.model
    assert torch.allclose(logits[mask], model.head(model.encoder(image, mask), mask), atol=1e-6)  # pyright: ignore
    assert not torch.allclose(logits, found.model(image))


def test_a_segmentation_keeps_its_blocks_and_names(tmp_path: Path) -> None:
    folder = save_segmenter(tmp_path / "run", "model.depth=4", "stage.blocks=[0,2,2,3]")
    found = beit_pretrain.load(folder)
    assert found.labels == PARTS and found.model.blocks == [0, 2, 2, 3]  # pyright: ignore
    assert found.model(torch.randn(1, 3, 32, 40)).shape == (1, 3, 32, 40)  # at a quarter of patches of 4


def test_another_size_resizes_the_tables(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "run")
    small, large = beit_pretrain.load(folder), beit_pretrain.load(folder, image_size=[40, 48])
    name = "blocks.0.attn.relative_position_bias_table"
    tables = [found.encoder.get_parameter(name) for found in (small, large)]
    assert torch.equal(tables[1], resize_table(tables[0], (8, 8), (10, 12)))
    assert large.preprocess(pixels(90, 60)).shape == (3, 40, 48)
    with pytest.raises(ConfigError, match=r"model\.patch_size=4"):
        beit_pretrain.load(folder, image_size=33)


def test_a_picture_comes_in_any_form(tmp_path: Path) -> None:
    preprocess = beit_pretrain.load(save_classifier(tmp_path / "run")).preprocess
    picture = pixels(50, 61)
    array = picture.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = preprocess(picture)
    for form in (array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(preprocess(form), expected), type(form)
    with pytest.raises(TypeError, match="give uint8"):
        preprocess(picture.float())
    with pytest.raises(TypeError, match="give uint8"):
        preprocess(np.zeros((3, 50, 61), np.uint8))
    with pytest.raises(DataError, match=r"b\.png: No such file"):
        preprocess(tmp_path / "b.png")


def test_crops_begin_at_a_whole_pixel_below(tmp_path: Path) -> None:
    preprocess = beit_pretrain.load(save_classifier(tmp_path / "run"), crop_pct=1.0).preprocess
    picture = pixels(32, 35)  # margins of 3: torchvision begins at 2, Transformers at 1
    assert torch.equal(preprocess.crop(picture), picture[:, :, 1:33])
    assert torch.equal(EvalView(image_size=(32, 32), crop_pct=1.0)(picture, 0).image, picture[:, :, 2:34])


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"path=.* is of stage=tokenizer, .*pretrain, classify or segment"
    ):
        beit_pretrain.load(save_tokenizer(tmp_path / "tok"))
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        beit_pretrain.load(tmp_path / "nothing")
    found = beit_pretrain.load(save_classifier(tmp_path / "run"))
    torch.save({"model": formats.to_original(found.model.state_dict())}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth does not say how its images were normalised.*--mean"):
        beit_pretrain.load(tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"std=\[0\.5\]: give three numbers"):
        beit_pretrain.load(tmp_path / "w.pth", mean=[0.5] * 3, std=[0.5])


def test_what_one_should_know_of_a_file_of_others_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    beit_pretrain.load(save_classifier(tmp_path / "run"), tell=said.append)
    assert not said
    model = masked({**SMALL, "image_size": (16, 16), "width": 192, "depth": 1}, rel_pos="none", abs_pos=True)
    torch.save(formats.to_original(model.state_dict()), tmp_path / "w.pth")
    beit_pretrain.load(tmp_path / "w.pth", mean=[0.5] * 3, std=[0.5] * 3, tell=said.append)
    assert len(said) == 1 and "3, each 64 wide, is taken" in said[0]
    with pytest.warns(UserWarning, match="3, each 64 wide, is taken") as caught:  # a note never goes unsaid
        beit_pretrain.load(tmp_path / "w.pth", mean=[0.5] * 3, std=[0.5] * 3)
    assert caught[0].filename == __file__


def test_the_package_offers_no_more_than_it_has() -> None:
    assert "load" in beit_pretrain.__all__
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        beit_pretrain.lode  # pyright: ignore # noqa: B018


@pytest.mark.parametrize("blocks", [[0, 1, 2], [0, 1, 2, 4]])
def test_blocks_that_are_not_there_are_refused(blocks: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"blocks=\[0,1,2.*: give four numbers from 0 to 3"):
        beit_pretrain.load(save_segmenter(tmp_path / "run", "model.depth=4"), blocks=blocks)
