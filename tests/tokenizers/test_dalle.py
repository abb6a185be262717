from __future__ import annotations

import contextlib
import io
import os
import pickle
import tarfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dall_e
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from dall_e.decoder import Decoder
from dall_e.encoder import Encoder
from mirrors import Mirror, serving
from torch import nn

from beit_pretrain.errors import CheckpointError, ConfigError, DownloadError
from beit_tokenizers import dalle
from beit_tokenizers.dalle import DalleTokenizer, build, load_pickled

SMALL = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}


def pickled(module: Any, zipped: bool) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old format announces that it is old
        torch.save(module, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.fixture(scope="module")
def published() -> dict[str, nn.Module]:
    """The whole architecture, with random weights strong enough that pictures differ in their ids."""
    torch.manual_seed(0)
    modules = {"encoder": Encoder(), "decoder": Decoder()}
    for parameter in modules["encoder"].parameters():
        parameter.data *= 1.2
    modules["decoder"].blocks.output.conv.w.data *= 20
    for module in modules["decoder"].modules():
        if isinstance(module, nn.Upsample):
            del module.recompute_scale_factor  # as in a file that an old torch wrote
    return modules


@pytest.fixture(scope="module")
def mirror(published: dict[str, nn.Module]) -> Iterator[Mirror]:
    """A server of both files: the encoder in today's format, the decoder in the older one."""
    contents = {f"{kind}.pkl": pickled(module, kind == "encoder") for kind, module in published.items()}
    with serving(Mirror(files=contents)) as mirror:
        yield mirror


@pytest.fixture(scope="module")
def sources(mirror: Mirror) -> dict[str, dict[str, Any]]:
    return {
        kind: {"urls": [mirror.url(f"{kind}.pkl")], "size": len(mirror.files[f"{kind}.pkl"]), "sha256": None}
        for kind in ("encoder", "decoder")
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache: Path, sources: Mapping[str, Any]) -> DalleTokenizer:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NO_PROXY", "127.0.0.1")
        return DalleTokenizer(image_size=(48, 32), files=sources, weights=str(cache))


def pictures(height: int, width: int, count: int = 2) -> torch.Tensor:
    """Smooth coloured shapes rather than noise, so that positions differ."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def oracle_ids(encoder: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoder(dall_e.map_pixels(image)).argmax(1).flatten(1)


def test_ids_in_float32_are_the_packages_own(
    published: dict[str, nn.Module], tokenizer: DalleTokenizer
) -> None:
    image = pictures(48, 32)
    ids, expected = tokenizer.encode(image), oracle_ids(published["encoder"], image)
    with torch.no_grad():
        unsqueezed = published["encoder"](image).argmax(1).flatten(1)
    assert tokenizer.grid == (6, 4)
    assert ids.dtype == torch.int64
    assert len(expected.unique()) > 5, "too few ids to tell anything apart"
    assert not torch.equal(expected, unsqueezed), "a forgotten squeeze of the pixels would not show"
    assert torch.equal(ids, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(image), expected), "the trainer's precision reached the tokenizer"


@pytest.mark.slow
def test_ids_at_the_published_size_are_the_packages_own(
    published: dict[str, nn.Module], tokenizer: DalleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "image_size", (112, 112))
    image = pictures(112, 112)
    expected = oracle_ids(published["encoder"], image)
    assert expected.shape == (2, 196)
    assert torch.equal(tokenizer.encode(image), expected)


def test_ids_in_bfloat16_are_mostly_the_packages_own(
    published: dict[str, nn.Module], tokenizer: DalleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "precision", "bfloat16")
    image = pictures(48, 32, count=4)
    equal = (tokenizer.encode(image) == oracle_ids(published["encoder"], image)).float().mean().item()
    print(f"share of equal ids in bfloat16, random weights: {equal:.3f}")
    assert equal > 0.85
    assert tokenizer.logits(image).dtype == torch.float32
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}


def test_painted_pictures_are_the_packages_own(
    published: dict[str, nn.Module], tokenizer: DalleTokenizer
) -> None:
    ids = torch.randint(8192, (1, 24), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(ids.view(1, 6, 4), 8192).permute(0, 3, 1, 2).float()
    decoder = published["decoder"]
    for module in decoder.modules():
        if isinstance(module, nn.Upsample):
            module.recompute_scale_factor = None
    with torch.no_grad():
        expected = dall_e.unmap_pixels(decoder(one_hot)[:, :3].sigmoid())
    painted = tokenizer.decode(ids)
    assert painted is not None
    assert painted.shape == (1, 3, 48, 32)
    assert expected.std() > 0.03
    torch.testing.assert_close(painted, expected, atol=1e-5, rtol=0)


def test_the_architecture_has_the_published_number_of_parameters() -> None:
    for kind, maker, count in (("encoder", Encoder, 53_786_240), ("decoder", Decoder, 43_829_766)):
        built = build(kind, maker(device=torch.device("meta")).state_dict())
        assert sum(parameter.numel() for parameter in built.parameters()) == count
        assert not any(type(module).__module__.startswith("dall_e.utils") for module in built.modules())


def test_weights_are_fetched_and_converted_once_and_then_read_offline(
    tokenizer: DalleTokenizer, mirror: Mirror, sources: Mapping[str, Any], cache: Path
) -> None:
    converted = sorted(cache.glob("*.safetensors"))
    assert [path.name.split("-")[0] for path in converted] == ["decoder", "encoder"]
    stamp = [path.stat().st_mtime_ns for path in converted]
    mirror.asked.clear()
    again = DalleTokenizer(image_size=16, files=sources, weights=str(cache), offline=True, decoder=False)
    assert mirror.asked == []
    assert [path.stat().st_mtime_ns for path in converted] == stamp
    weight = tokenizer.encoder.get_parameter("output.conv.weight")
    assert torch.equal(again.encoder.get_parameter("output.conv.weight"), weight)
    assert again.decode(torch.zeros(1, 4, dtype=torch.int64)) is None
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_offline_without_the_files_says_where_they_belong(sources: Mapping[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"encoder\.pkl is not there and tokenizer\.offline=true"):
        DalleTokenizer(files=sources, weights=str(tmp_path), offline=True)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dall_e", None)
    with pytest.raises(ConfigError, match=r"pip install beit-pretrain\[dalle\]"):
        build("encoder", {})


def test_a_size_off_the_stride_an_unknown_precision_and_a_wrong_view_are_refused(
    tokenizer: DalleTokenizer, sources: Mapping[str, Any], cache: Path
) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.image_size=100: .*stride 8; set .* to 96, 104"):
        DalleTokenizer(image_size=100, files=sources, weights=str(cache))
    with pytest.raises(ConfigError, match=r"tokenizer\.precision=half: set it to auto, float32"):
        DalleTokenizer(files=sources, weights=str(cache), precision="half")
    with pytest.raises(ConfigError, match=r"for images of 3 x 48 x 32 and was given 3 x 24 x 16"):
        tokenizer.encode(torch.rand(1, 3, 24, 16))


# The pickled files: read without running what is in them.


class Payload:
    """Creates a folder when an ordinary unpickler meets it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def runs_when_trusted(path: Path, witness: Path) -> bool:
    """Whether the ordinary reader would have run the payload."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    return witness.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_both_formats_give_the_parameters_and_leave_torch_as_it_was(
    tmp_path: Path, kind: str, zipped: bool
) -> None:
    module = (Encoder if kind == "encoder" else Decoder)(**SMALL)
    path = tmp_path / f"{kind}.pkl"
    path.write_bytes(pickled(module, zipped))
    before = set(torch.serialization.get_safe_globals())
    state = load_pickled(path, kind)
    assert set(torch.serialization.get_safe_globals()) == before
    expected = module.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    safetensors.torch.save(state)  # no two share memory


def test_source_code_in_an_old_file_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "encoder.pkl"
    module = Encoder(**SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.serialization, "get_source_lines_and_file", lambda *_: (["class Old: ..."], 0, "old.py")
        )
        content = pickled(module, zipped=False)
    assert b"class Old" in content
    path.write_bytes(content)
    assert list(load_pickled(path, "encoder")) == list(module.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_deep_in_the_module_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, witness = tmp_path / "encoder.pkl", tmp_path / "witness"
    module = Encoder(**SMALL)
    module.blocks.group_3.block_1.extra = Payload(witness)
    path.write_bytes(pickled(module, zipped))
    with pytest.raises(CheckpointError, match=r"encoder\.pkl: asks for posix\.mkdir.*not loaded"):
        load_pickled(path, "encoder")
    assert not witness.exists()
    assert runs_when_trusted(path, witness)


STREAMS = ("magic number", "protocol", "system", "module", "keys")


@pytest.mark.parametrize("bad", STREAMS)
def test_a_payload_in_any_stream_of_the_old_format_is_refused(tmp_path: Path, bad: str) -> None:
    path, witness = tmp_path / "encoder.pkl", tmp_path / "witness"
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    values = (
        torch.serialization.MAGIC_NUMBER,
        torch.serialization.PROTOCOL_VERSION,
        system,
        nn.Sequential(),
        [],
    )
    streams: dict[str, Any] = dict(zip(STREAMS, values, strict=True))
    path.write_bytes(b"".join(pickle.dumps(stream, 2) for stream in streams.values()))
    with pytest.raises(CheckpointError, match="holds a Sequential, not DALL-E's encoder"):
        load_pickled(path, "encoder")  # well formed, so far

    streams[bad] = Payload(witness)
    path.write_bytes(b"".join(pickle.dumps(stream, 2) for stream in streams.values()))
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
        load_pickled(path, "encoder")
    assert not witness.exists()
    assert runs_when_trusted(path, witness)


@pytest.mark.parametrize("bad", ["storages", "tensors", "pickle"])
def test_a_payload_in_a_tar_of_the_oldest_format_is_refused(tmp_path: Path, bad: str) -> None:
    path, witness = tmp_path / "encoder.pkl", tmp_path / "witness"
    streams = {"storages": pickle.dumps(0, 2) + pickle.dumps([], 2), "tensors": pickle.dumps(0, 2)}
    streams["pickle"] = pickle.dumps(nn.Sequential(), 2)
    streams[bad] = pickle.dumps(Payload(witness), 2)
    with tarfile.open(path, "w") as tar:
        for name, content in streams.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read as DALL-E's encoder"):
        load_pickled(path, "encoder")
    assert not witness.exists()
    assert runs_when_trusted(path, witness)


class WithSource(pickle.Pickler):
    """Writes a chosen object as torch's old format writes a class: together with 'its' source code."""

    def __init__(self, stream: io.BytesIO, chosen: object) -> None:
        super().__init__(stream, 2)
        self.chosen = chosen

    def persistent_id(self, obj: object) -> object:
        return ("module", Wrapped(obj), "file.py", "planted text\n") if obj is self.chosen else None


class Wrapped:
    """Stands for an object without being written as a persistent one again."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __reduce__(self) -> tuple:
        return nn.Sequential, (), vars(self.obj)


def test_source_code_in_an_old_file_cannot_plant_a_patch_file(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    chosen = nn.Sequential()
    vars(chosen).update(__wrapped__=nn.ReLU, dump_patches=True, __name__=str(tmp_path / "planted"))
    stream = io.BytesIO()
    WithSource(stream, chosen).dump(chosen)
    values = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    head = b"".join(pickle.dumps(value, 2) for value in values)
    path.write_bytes(head + stream.getvalue() + pickle.dumps([], 2))
    with pytest.raises(CheckpointError, match="holds a Sequential"):
        load_pickled(path, "encoder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder.pkl"]


def test_another_module_and_rubbish_are_named(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    path.write_bytes(pickled(nn.Sequential(nn.ReLU()), zipped=True))
    with pytest.raises(CheckpointError, match="holds a Sequential, not DALL-E's encoder"):
        load_pickled(path, "encoder")
    path.write_bytes(b"\x80\x02rubbish")
    with pytest.raises(CheckpointError, match=r"encoder\.pkl: .*(damaged|remove it)"):
        load_pickled(path, "encoder")


def test_weights_of_another_size_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not the weights of DALL-E's encoder"):
        build("encoder", Encoder(**SMALL).state_dict())


def test_the_classes_allowed_are_those_of_the_published_modules_only() -> None:
    known = {c.__qualname__ for kind in ("encoder", "decoder") for c in dalle._classes(kind)}
    assert known == {
        "Encoder", "EncoderBlock", "Decoder", "DecoderBlock", "Conv2d",
        "Sequential", "ReLU", "Identity", "MaxPool2d", "Upsample",
    }  # fmt: skip
