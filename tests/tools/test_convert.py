"""`beit-tools convert`: a folder is there whole, and compared, or not at all; the authors' format."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bare_models import masked
from classifiers import save_classifier
from conversions import MODELS, converted, saved
from timm.models.beit import Beit as TimmBeit
from timm.models.beit import gen_relative_position_index
from torch import Tensor

from beit_pretrain.checkpoint import files, formats
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.tools import convert as convert_module
from beit_pretrain.tools.app import app
from beit_pretrain.tools.certificate import compare, inputs
from beit_pretrain.tools.load import load

HF_TABLE = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def nothing_in(folder: Path) -> bool:
    return list(folder.iterdir()) == []


# --- the folder ------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_says_how_well_it_agrees(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    app(["convert", str(saved("classify", runs)), str(out), "--to", "huggingface"], standalone_mode=False)
    said = capsys.readouterr()
    assert said.err == ""
    first, second, third = said.out.splitlines()
    assert first == f"{out}: stage=classify as huggingface"
    assert "largest difference of the logits" in second and "transformers 5" in second
    assert third == "read again, every weight is bit-equal, with the same logits"
    expected = [
        "README.md",
        "certificate.json",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert sorted(path.name for path in out.iterdir()) == expected
    assert list((tmp_path / "new").iterdir()) == [out]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # whoever may read one may read all


@pytest.mark.parametrize("to", ["original", "huggingface", "timm"])
def test_the_certificate_holds_numbers_hashes_and_versions(runs: Path, tmp_path: Path, to: str) -> None:
    source = saved("classify", runs)
    converted(source, tmp_path / "out", to)
    said = json.loads((tmp_path / "out" / "certificate.json").read_text())
    library = "transformers" if to == "huggingface" else "timm"
    assert (said["format"], said["stage"], said["limit"]) == (to, "classify", 1e-4)
    assert said["checked_with"] == {library: sys.modules[library].__version__}
    assert 0 <= said["largest_difference"] <= 1e-5 < said["scale"]
    assert said["pictures"] == ["china.jpg", "flower.jpg", "china.jpg, turned", "flower.jpg, turned"]
    assert said["weights"] == files.weight_hash(load(source).model.state_dict())
    assert (
        said["read_back"] == "bit-equal" and said["versions"]["torch"] == torch.__version__.partition("+")[0]
    )
    others = {path.name: path for path in (tmp_path / "out").iterdir() if path.name != "certificate.json"}
    assert said["files"] == {name: files.sha256(path) for name, path in others.items()}


def test_what_is_compared_are_different_real_pictures_and_half_of_the_patches_is_hidden(runs: Path) -> None:
    given = inputs(load(saved("pretrain, not square", runs)))
    assert given.image.shape == (4, 3, 20, 32) and given.mask is not None
    assert given.mask.sum(1).tolist() == [20] * 4 and not torch.equal(given.mask[0], given.mask[1])
    assert all(
        (one - other).abs().max() > 0.5
        for one, other in zip(given.image, given.image.roll(1, 0), strict=True)
    )


@pytest.mark.parametrize("name", ["full folder", "file"])
def test_a_place_that_is_taken_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    if name == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"OUT=.*out is there already: give another folder, or remove it"
    ):
        converted(tmp_path / "no-such-source", out, "timm")
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_is_free(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    converted(saved("classify", runs), tmp_path / "out", "original")
    assert (tmp_path / "out" / "checkpoint.pth").is_file()


def test_what_is_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--to jax is unknown: set original, huggingface or timm"):
        converted(tmp_path, tmp_path / "out", "jax")


def test_a_source_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"SOURCE=.*gone"):
        converted(tmp_path / "gone", tmp_path / "a" / "b", "timm")
    assert nothing_in(tmp_path)


def test_a_place_that_cannot_be_written_is_said_in_one_line(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"OUT=.*file/out was not written: "):
        converted(saved("classify", runs), tmp_path / "file" / "out", "timm")


def test_numbers_that_a_file_does_not_say_can_be_given(runs: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint.pth"
    torch.save(formats.to_original(load(saved("classify", runs)).model.state_dict()), source)
    with pytest.raises(ConfigError, match="does not say how its images were normalised"):
        converted(source, tmp_path / "out", "timm")
    converted(source, tmp_path / "out", "timm", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    said = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (said["mean"], said["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("pretrain, not square", "original"),
        ("classify", "original"),
        ("segment", "original"),
        ("classify, not square", "huggingface"),
        ("segment, not square", "huggingface"),
        ("classify", "timm"),
    ],
)
def test_what_was_written_is_used_like_the_run_itself(runs: Path, tmp_path: Path, name: str, to: str) -> None:
    source = saved(name, runs)
    converted(source, tmp_path / "out", to)
    ours, again = load(source), load(tmp_path / "out")
    assert again.preprocess == ours.preprocess and again.labels == ours.labels
    assert getattr(again.model, "blocks", None) == getattr(ours.model, "blocks", None)
    origin = again.about["lineage"]["parents"]["converted_from"]
    assert origin["sha256"] == files.sha256(source / "checkpoints" / "last.ckpt")
    assert origin["path"] == source.name and origin["name"] == ours.about["config"]["name"]
    assert str(runs) not in json.dumps(again.about["lineage"])


def test_an_encoder_alone_is_given_back_as_the_authors_have_it(runs: Path, tmp_path: Path) -> None:
    state = formats.to_original(load(saved("classify", runs)).model.state_dict())
    alone = {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    torch.save(alone, source := tmp_path / "encoder.pth")
    scale = {"mean": [0.5] * 3, "std": [0.5] * 3}
    for to in ("huggingface", "timm"):
        with pytest.raises(CheckpointError, match=r"SOURCE=.*is an encoder without a head.*--to original"):
            converted(source, tmp_path / "out", to, **scale)
    converted(source, tmp_path / "out", "original", **scale)
    again = files.read(tmp_path / "out" / "checkpoint.pth")["model"]
    assert all(torch.equal(again[name], value) for name, value in alone.items())


def test_the_running_average_can_be_converted(tmp_path: Path) -> None:
    source = save_classifier(tmp_path / "run", "stage.ema=0.99")
    for weights in ("raw", "ema"):
        converted(source, tmp_path / weights, "original", weights=weights)
        written = files.read(tmp_path / weights / "checkpoint.pth")["model"]["head.weight"]
        assert torch.equal(written, load(source, weights=weights).model.state_dict()["head.head.weight"])


# --- heads -----------------------------------------------------------------------------------------------------

NO_TABLES = ["model.rel_pos=none", "model.abs_pos=true", "model.heads=3"]


@pytest.mark.parametrize("to", ["original", "huggingface", "timm"])
def test_a_model_without_tables_keeps_its_heads(tmp_path: Path, to: str) -> None:
    source = save_classifier(tmp_path / "run", *NO_TABLES)
    converted(source, tmp_path / "out", to)
    ours, again = load(source), load(tmp_path / "out")
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert again.model(image).std() > 0.05
        torch.testing.assert_close(again.model(image), ours.model(image), atol=1e-6, rtol=1e-6)
    said = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert 0 <= said["read_back_difference"] <= 1e-6


def test_logits_that_are_others_when_read_again_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are bit-equal, and so are timm's logits, which is told the number of heads."""
    source = save_classifier(tmp_path / "run", *NO_TABLES)

    def other_heads(folder: Path) -> None:
        content = files.read(folder / "checkpoint.pth")
        content["preprocessing"]["heads"] = 2
        files.write(folder / "checkpoint.pth", content)

    spoil(monkeypatch, "original", other_heads)
    with pytest.raises(CheckpointError, match="logits of the folder, read again, differ from ours by"):
        converted(source, tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


def test_pixels_that_are_others_when_read_again_are_a_failure(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_mean(folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))

    spoil(monkeypatch, "huggingface", other_mean)
    with pytest.raises(CheckpointError, match="pixels of the folder, read again, differ from ours by"):
        converted(saved("classify", runs), tmp_path / "out", "huggingface")
    assert nothing_in(tmp_path)


def test_heads_can_be_given_to_each_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = masked(
        dict(image_size=(16, 16), patch_size=4, width=24, depth=1, heads=3), rel_pos="none", abs_pos=True
    )
    torch.save(formats.to_original(model.state_dict()), source := tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"SOURCE=.*w\.pth does not say how many heads .*--heads"):
        app(["show", str(source)], standalone_mode=False)
    app(["show", str(source), "--heads", "3"], standalone_mode=False)
    assert "3 heads" in capsys.readouterr().out
    given = ["--heads", "3", "--mean", ".5,.5,.5", "--std", ".5,.5,.5"]
    out = tmp_path / "out"
    app(["convert", str(source), str(out), "--to", "original", *given], standalone_mode=False)
    assert load(out).about["config"]["model"]["heads"] == 3  # and from there on nobody is asked


def test_a_neck_that_the_authors_do_not_have_is_remarked(runs: Path, tmp_path: Path) -> None:
    said = converted(saved("segment", runs), tmp_path / "out", "original")
    assert "patches of 4 pixels: the authors' segmentation builds this neck for patches of 16 only" in said
    for name in ("classify", "pretrain"):
        assert "builds this neck" not in converted(saved(name, runs), tmp_path / name, "original")


# --- what goes wrong -------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, to: str, what: Any) -> None:
    """Let something happen to the folder after its files were written."""
    target = convert_module.TARGETS[to]

    def write(loaded: Any, folder: Path, mark: dict[str, Any]) -> list[str]:
        remarks = target.write(loaded, folder, mark)
        what(folder)
        return remarks

    monkeypatch.setitem(convert_module.TARGETS, to, target._replace(write=write))


def change(name: str, how: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """Another value for one of the written weights, or none."""

    def happen(folder: Path) -> None:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        value = state.pop(name)
        if how is not None:
            state[name] = how(value)
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})

    return happen


@pytest.mark.parametrize(
    ("to", "weight"),
    [
        ("huggingface", "beit.encoder.layer.1.lambda_1"),
        ("huggingface", HF_TABLE),
        ("timm", "blocks.1.attn.relative_position_bias_table"),
    ],
)
def test_other_logits_are_a_failure_that_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, weight: str
) -> None:
    spoil(monkeypatch, to, change(weight, lambda value: value.roll(1, 0)))
    library = "transformers" if to == "huggingface" else "timm"
    with pytest.raises(
        CheckpointError, match=rf"logits of {library} .* differ from ours by .* is allowed: nothing"
    ):
        converted(saved("classify, cls", runs), tmp_path / "out", to)
    assert nothing_in(tmp_path)


def test_a_weight_that_no_logit_shows_must_be_bit_equal_too(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "huggingface", change("auxiliary_head.convs.0.conv.weight", lambda value: -value))
    with pytest.raises(
        CheckpointError, match=r"1 weights are others when read again \(head.auxiliary_head.convs.0"
    ):
        converted(saved("segment", runs), tmp_path / "out", "huggingface")
    assert nothing_in(tmp_path)


def test_a_key_that_the_library_misses_is_a_failure(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "huggingface", change("auxiliary_head.classifier.bias", None))
    with pytest.raises(
        CheckpointError, match=r"does not take the weights as they are: .*auxiliary_head.classifier"
    ):
        converted(saved("segment", runs), tmp_path / "out", "huggingface")
    assert nothing_in(tmp_path)


def test_a_library_that_gives_up_is_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "timm", lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(CheckpointError, match=r"timm 1.* cannot use what would be written \(KeyError: 'arch"):
        converted(saved("classify", runs), tmp_path / "out", "timm")
    assert nothing_in(tmp_path)


def test_an_interruption_leaves_nothing(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    spoil(monkeypatch, "timm", stop)
    with pytest.raises(KeyboardInterrupt):
        converted(saved("classify", runs), tmp_path / "a" / "b", "timm")
    assert nothing_in(tmp_path)


def test_without_transformers_the_folder_is_written_and_said_to_be_unchecked(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = converted(saved("classify", runs), tmp_path / "out", "huggingface")
    assert (
        "not compared with another library: " in said and "pip install 'beit-pretrain[huggingface]'" in said
    )
    content = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert content["checked_with"] is None and content["largest_difference"] is None
    assert "transformers" in content["why"] and "Not compared" in (tmp_path / "out" / "README.md").read_text()


def test_logits_are_judged_by_their_size() -> None:
    large = torch.tensor([[1000.0, -2.0]])
    assert compare(large + 0.05, large, "x 1").difference == pytest.approx(0.05, rel=1e-2)
    small = torch.tensor([[0.01, -0.02]])
    assert compare(small + 5e-5, small, "x 1").scale == pytest.approx(0.02)
    with pytest.raises(
        CheckpointError, match=r"logits of x 1 differ from ours by 0\.2, where the largest is 1e"
    ):
        compare(large + 0.2, large, "x 1")
    with pytest.raises(CheckpointError, match=r"differ from ours by 0\.0002, .* 0\.0001 is allowed"):
        compare(small + 2e-4, small, "x 1")
    for broken in (float("nan"), float("inf")):
        for pair in ((large * broken, large), (large, large * broken), (large * broken, large * broken)):
            with pytest.raises(CheckpointError, match="differ from ours by"):
                compare(*pair, "x 1")
    with pytest.raises(CheckpointError, match=r"have shape \(1, 2\), ours \(1, 1\)"):
        compare(large[:, :1], large, "x 1")


# --- the authors' format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_authors_format_comes_back_as_it_was(runs: Path, tmp_path: Path, name: str) -> None:
    source, out = saved(name, runs), tmp_path / "out"
    converted(source, out, "original")
    ours, preprocess = load(source), load(source).preprocess
    again = load(out / "checkpoint.pth", mean=preprocess.mean, std=preprocess.std)
    state, other = ours.model.state_dict(), again.model.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert again.stage == ours.stage and again.preprocess == preprocess
    assert sorted(path.name for path in out.iterdir()) == ["certificate.json", "checkpoint.pth"]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("pretrain, not square", "rel_pos_bias.relative_position_index"),
        ("classify, not square", "blocks.1.attn.relative_position_index"),
        ("segment, not square", "backbone.blocks.3.attn.relative_position_index"),
    ],
)
def test_the_index_of_each_table_is_in_the_file(runs: Path, tmp_path: Path, name: str, index: str) -> None:
    converted(saved(name, runs), tmp_path / "out", "original")
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    state = content["state_dict" if name.startswith("segment") else "model"]
    grid = load(saved(name, runs)).encoder.grid
    assert torch.equal(state[index], gen_relative_position_index(grid))
    assert state[index].dtype == torch.int64
    count = sum(key.endswith("relative_position_index") for key in state)
    assert count == sum(key.endswith("relative_position_bias_table") for key in state)


def test_the_encoder_of_the_authors_pre_training_is_timms(runs: Path, tmp_path: Path) -> None:
    source = saved("pretrain, not square", runs)
    said = converted(source, tmp_path / "out", "original")
    assert "not compared with another library: no library reads the authors' files of stage=pretrain" in said
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    assert {"mask_token", "lm_head.weight", "lm_head.bias", "norm.weight"} <= state.keys()
    twin = TimmBeit(
        img_size=(20, 32),
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        num_classes=0,
        global_pool="token",
    )
    twin.load_state_dict({name: state[name] for name in twin.state_dict()})
    ours, image = load(source), torch.randn(2, 3, 20, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            twin.eval().forward_features(image), ours.model.head.norm(ours.encoder(image))
        )


def test_the_authors_segmentation_has_their_names_and_the_classes(runs: Path, tmp_path: Path) -> None:
    converted(saved("segment", runs), tmp_path / "out", "original")
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert content["meta"] == {"CLASSES": ["wall", "floor", "sky"]}
    expected = {
        "backbone.patch_embed.proj.weight",
        "backbone.fpn1.0.weight",
        "backbone.fpn1.1.running_mean",
        "backbone.fpn1.3.bias",
        "backbone.fpn2.0.weight",
        "decode_head.psp_modules.3.1.conv.weight",
        "decode_head.bottleneck.bn.weight",
        "decode_head.lateral_convs.2.conv.weight",
        "decode_head.fpn_convs.0.bn.running_var",
        "decode_head.conv_seg.bias",
        "auxiliary_head.convs.0.conv.weight",
        "auxiliary_head.conv_seg.weight",
    }
    assert expected <= content["state_dict"].keys()
