"""`beit-tools reconstruct`: hidden patches are predicted as the model does, painted by the tokenizer it learnt from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import save_classifier
from oracles import strengthen
from PIL import Image
from pretrained import save_pretrained, save_tokenizer
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

import beit_pretrain
from beit_pretrain.build import build_tokenizer
from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose
from beit_pretrain.data.sampler import mix
from beit_pretrain.errors import CheckpointError, DataError
from beit_pretrain.masking import BlockwiseMask, RandomMask
from beit_pretrain.sheets import GAP, MARGIN
from beit_pretrain.tokenizer import Tokenizer
from beit_pretrain.tools import reconstruct
from beit_pretrain.tools.app import app
from beit_pretrain.tools.images import read_image

LAST = Path("checkpoints") / "last.ckpt"
OPTIONS = ["image_size=[32,40]", "masking.count=37", "stage.views.token_interpolation=bicubic"]


def tool(*arguments: Any) -> int:
    return app(["reconstruct", *map(str, arguments), "--device", "cpu"], standalone_mode=False)


def change(run: Path, how: Callable[[dict[str, Any]], None]) -> Path:
    """Another run folder beside `run`, with what its checkpoint says changed."""
    saved = files.read(run / LAST)
    how(saved)
    other = run.with_name(f"{run.name}-{len(list(run.parent.iterdir()))}")
    files.write(other / LAST, saved)
    return other


def forget(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["beit_pretrain"]["config"].pop(key)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dVAE of 16 x 20 pixels in 8 x 10 tokens of 32 kinds, under which pictures differ."""
    folder = tmp_path_factory.mktemp("runs") / "wide-tokenizer"
    run = save_tokenizer(folder, "tokenizer.image_size=[16,20]", "tokenizer.layers=1")
    cfg = compose(["stage=pretrain", "data=digits", f"tokenizer.checkpoint={run}"])
    made: Any = build_tokenizer(cfg)
    strengthen(made)
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(made.decoder[-1].weight, std=0.3, generator=generator)
    with torch.no_grad():  # no kind is likelier than another by itself
        made.to_logits.bias -= made.logits(torch.rand(8, 3, 16, 20, generator=generator)).mean((0, 2, 3))
    saved = files.read(run / LAST)
    saved["state_dict"] = {f"tokenizer.{name}": value for name, value in made.state_dict().items()}
    files.write(run / LAST, saved)
    made.run = run
    return made.eval()


@pytest.fixture(scope="module")
def run(tokenizer: Any) -> Path:
    """A pre-training of 8 x 10 patches, of which it hides 37, that knows its tokenizer."""
    made = save_pretrained(tokenizer.run.with_name("wide"), *OPTIONS)
    saved = files.read(made / LAST)
    saved["beit_pretrain"]["frozen"] = {"tokenizer": files.weight_hash(tokenizer.state_dict())}
    # So that some predictions are right: nearly always the commonest token of the picture below.
    commonest = tokenizer.encode(view(made, photo(made.with_name("photo.png")))).mode().values.item()
    saved["state_dict"]["head.lm_head.bias"][commonest] += 2.0
    files.write(made / LAST, saved)
    return made


def photo(path: Path, height: int = 50, width: int = 90) -> Path:
    """Two halves, a smooth one and one of noise."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([5 * x, 4 * y, 3 * (x + y)], -1) % 256
    pixels[:, width // 2 :] = np.random.default_rng(0).integers(0, 256, (height, width - width // 2, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def view(run: Path, path: Path) -> Tensor:
    """What the tokenizer sees of a picture, (1, 3, 16, 20) in [0, 1]."""
    crop = beit_pretrain.load(run).preprocess.crop(read_image(path))
    smaller = v2.functional.resize(crop, [16, 20], InterpolationMode.BICUBIC, antialias=True)
    return smaller[None].float() / 255


def cells(path: Path) -> list[np.ndarray]:
    """The four pictures of a sheet, as the 32 x 40 pixels that were magnified six times."""
    with Image.open(path) as file:
        sheet = np.asarray(file)
    high, wide = 32 * 6, 40 * 6
    top = len(sheet) - MARGIN - high
    lefts = [MARGIN + column * (wide + GAP) for column in range(4)]
    return [sheet[top : top + high, left : left + wide][3::6, 3::6] for left in lefts]


def pixels(image: Tensor) -> np.ndarray:
    return (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


@torch.no_grad()
def test_what_is_hidden_predicted_counted_and_painted(
    run: Path, tokenizer: Any, tmp_path: Path, capsys
) -> None:
    paths = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 80, 41)]
    assert tool(run, *paths, "--seed", 5, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    loaded: Any = beit_pretrain.load(run)
    generator = BlockwiseMask(grid=(8, 10), count=37, min_block=4)
    total = 0
    for position, path in enumerate(paths):
        mask = torch.from_numpy(generator(mix(5, position))).view(1, 80)
        ids = tokenizer.encode(view(run, path))
        logits = loaded.model(loaded.preprocess(path)[None], mask)  # (1, N, V), of every patch
        mixed = torch.where(mask, logits.argmax(-1), ids)
        right = int((mask & (mixed == ids)).sum())
        total += right
        assert f"{path}: {right} of 37 hidden patches right ({right / 37:.1%})" in printed
        original, masked, true, predicted = cells(tmp_path / "out" / f"{path.stem}.reconstruction.png")
        crop = loaded.preprocess.crop(read_image(path))[None] / 255
        np.testing.assert_array_equal(original, pixels(crop))
        grey = np.kron(mask.view(8, 10).numpy(), np.ones((4, 4), bool))
        np.testing.assert_array_equal(masked, np.where(grey[..., None], 128, original))
        for shown, tokens in ((true, ids), (predicted, mixed)):
            np.testing.assert_array_equal(shown[::2, ::2], pixels(tokenizer.decode(tokens)))
        assert len(ids.unique()) > 5 and (true != predicted).any()
    assert 0 < total < 74
    assert (
        f"2 images written to {tmp_path / 'out'}; {total} of 74 hidden patches right ({total / 74:.1%})"
        in printed
    )
    assert "2 images, 37 of 8 x 10 patches hidden in each" in printed


def test_masks_follow_from_the_seed_and_the_place_and_are_the_checkpoints_own(
    run: Path, tmp_path: Path
) -> None:
    paths = [photo(tmp_path / f"{name}.png") for name in "ab"]

    def grey(made: Path, seed: int) -> list[bytes]:
        out = tmp_path / f"{made.name}-{seed}"
        assert tool(made, *paths, "--seed", seed, "--out", out) == 0
        return [cells(out / f"{name}.reconstruction.png")[1].tobytes() for name in "ab"]

    first = grey(run, 0)
    assert first[0] != first[1] and first == grey(run, 0)
    assert not set(first) & set(grey(run, 1))

    def at_random(saved: dict[str, Any]) -> None:
        config = saved["beit_pretrain"]["config"]
        config["masking"] = {
            "_target_": "beit_pretrain.masking.RandomMask",
            "grid": [8, 10],
            "count": 9,
        }

    made = change(run, at_random)
    grey(made, 0)
    shown = cells(tmp_path / f"{made.name}-0" / "a.reconstruction.png")[1]
    hidden = np.kron(RandomMask(grid=(8, 10), count=9)(mix(0, 0)), np.ones((4, 4), bool))
    assert (shown[hidden] == 128).all() and not (shown[~hidden] == 128).all(-1).all()


def test_without_masking_in_the_file_the_papers_share_is_hidden(run: Path, tmp_path: Path, capsys) -> None:
    assert tool(change(run, forget("masking")), photo(tmp_path / "x.png"), "--out", tmp_path) == 0
    assert "32 of 8 x 10 patches hidden in each" in capsys.readouterr().out


def test_the_tokenizer_can_lie_elsewhere_but_must_be_the_same(
    run: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path, out = photo(tmp_path / "x.png"), tmp_path / "out"

    def moved(saved: dict[str, Any]) -> None:
        saved["beit_pretrain"]["config"]["tokenizer"]["checkpoint"] = "gone/tok"

    with pytest.raises(
        CheckpointError,
        match=r"was trained with the tokenizer of gone/tok, which is not there: set --tokenizer to",
    ):
        tool(change(run, moved), path, "--out", out)
    unknown = change(run, forget("tokenizer"))
    with pytest.raises(
        CheckpointError, match=r"does not say which tokenizer .*: set --tokenizer to a run .* dalle"
    ):
        tool(unknown, path, "--out", out)
    other = change(tokenizer.run, lambda saved: saved["state_dict"]["tokenizer.codebook"].add_(1))
    with pytest.raises(
        CheckpointError,
        match=r"--tokenizer=.*: its weights \(hash \w{12}\) are not those .*: give the original",
    ):
        tool(run, path, "--tokenizer", other, "--out", out)
    with pytest.raises(
        CheckpointError, match=r"--tokenizer=.* is of stage=pretrain: give a run of stage=tokenizer"
    ):
        tool(run, path, "--tokenizer", run, "--out", out)
    with pytest.raises(CheckpointError, match=r"--tokenizer=.*nowhere.*there is no such file"):
        tool(run, path, "--tokenizer", tmp_path / "nowhere", "--out", out)
    assert not out.exists()
    assert tool(unknown, path, "--tokenizer", tokenizer.run, "--out", out) == 0
    assert tool(run, path, "--out", tmp_path / "own") == 0
    sheets = [(folder / "x.reconstruction.png").read_bytes() for folder in (out, tmp_path / "own")]
    assert sheets[0] == sheets[1]
    unhashed = change(run, lambda saved: saved["beit_pretrain"].pop("frozen"))
    assert tool(unhashed, path, "--tokenizer", other, "--out", tmp_path / "free") == 0


def test_a_tokenizer_of_another_grid_or_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    path = photo(tmp_path / "x.png")
    square = save_tokenizer(tmp_path / "square", "tokenizer.image_size=32")
    with pytest.raises(
        CheckpointError, match=r"--tokenizer=.*square gives 8 x 8 tokens, .* has 8 x 10 patches: give"
    ):
        tool(run, path, "--tokenizer", square, "--out", tmp_path / "out")
    larger = save_tokenizer(tmp_path / "larger", "tokenizer.image_size=[32,40]", "tokenizer.vocab_size=40")
    with pytest.raises(
        CheckpointError, match=r"larger has 40 visual tokens, .* tells 32 apart: give the tokenizer"
    ):
        tool(run, path, "--tokenizer", larger, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Blind(Tokenizer):
    """Made without what paints."""

    vocab_size = 32

    def __init__(self, image_size: list[int]) -> None:
        super().__init__()
        self.image_size, self.stride = (image_size[0], image_size[1]), 8
        self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def encode(self, image: Tensor) -> Tensor:
        raise AssertionError("it was refused before")

    def decode(self, ids: Tensor) -> None:
        return None


def test_dalle_comes_at_the_size_of_the_grid_and_one_that_cannot_paint_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Blind] = []

    def build(cfg: Any, key: str) -> Blind:
        assert cfg.tokenizer.name == "dalle" and cfg.tokenizer.decoder
        made.append(Blind(list(cfg.tokenizer.image_size)))
        return made[-1]

    monkeypatch.setattr(reconstruct, "build_tokenizer", build)
    hashed = {}

    def trained_with(saved: dict[str, Any]) -> None:
        saved["beit_pretrain"]["frozen"] = hashed

    def attempt() -> None:
        tool(
            change(run, trained_with),
            photo(tmp_path / "x.png"),
            "--tokenizer",
            "dalle",
            "--out",
            tmp_path / "out",
        )

    with pytest.raises(
        CheckpointError, match=r"--tokenizer=dalle cannot paint its tokens: give one with a decoder"
    ):
        attempt()
    assert made[-1].image_size == (64, 80)
    hashed["tokenizer"] = "0" * 64
    with pytest.raises(CheckpointError, match=r"--tokenizer=dalle: its weights .* are not those"):
        attempt()
    # A training without the decoder remembers the rest; so must a tokenizer that has one pass.
    blind = Blind([64, 80])
    monkeypatch.setattr(reconstruct, "build_tokenizer", lambda cfg, key: blind)
    hashed["tokenizer"] = files.weight_hash(
        {f"encoder.{k}": v for k, v in blind.encoder.state_dict().items()}
    )
    with pytest.raises(CheckpointError, match="cannot paint"):
        attempt()
    assert not (tmp_path / "out").exists()


def test_only_a_pre_training_predicts_tokens(tmp_path: Path) -> None:
    made = save_classifier(tmp_path / "cls")
    with pytest.raises(
        CheckpointError, match=r"cls is of stage=classify, which predicts no visual tokens: give a run"
    ):
        tool(made, photo(tmp_path / "x.png"), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_listed_and_keep_their_place(run: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "photos"
    photo(folder / "x.png")
    (folder / "a.jpg").write_bytes(b"x")
    for _ in range(2):  # the second time, a result lies beside the images
        assert tool(run, folder, "--out", folder) == 1
        assert f"1 could not be read:\n  {folder / 'a.jpg'}: " in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"a.jpg", "x.png", "x.reconstruction.png"}
    photo(tmp_path / "a.png")
    assert tool(run, tmp_path / "a.png", folder / "x.png", "--out", tmp_path) == 0  # second of both times
    first, again = [cells(where / "x.reconstruction.png")[1] for where in (folder, tmp_path)]
    np.testing.assert_array_equal(first, again)
    with pytest.raises(DataError, match=r"would both become .*x\.reconstruction\.png: let one"):
        tool(run, folder / "x.png", photo(tmp_path / "x.tif"), "--out", tmp_path / "out")
