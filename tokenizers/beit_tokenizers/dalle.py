"""The discrete VAE of DALL-E: the visual tokens of the BEiT paper (Sec. 2.1), from its published weights.

Letters: B images, N = rows * cols visual tokens, T the side of the view, V = 8,192 ids.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, _utils, nn

from beit_pretrain.checkpoint.download import fetch
from beit_pretrain.checkpoint.files import read, refusal, sha256, write_bytes
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.tokenizer import Tokenizer
from beit_tokenizers.views import check_view, size_of

MARGIN = 0.1  # the model saw pixels squeezed from [0, 1] to [0.1, 0.9] (arXiv 2102.12092, App. A.3)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DalleTokenizer(Tokenizer):
    """DALL-E's dVAE: 53,786,240 parameters to encode, 43,829,766 more to paint; 8 pixels per token.

    `files` holds for `encoder` and `decoder` the published file's `urls`, its `size` in bytes and its
    `sha256` (null where unknown). They are fetched to `weights` once and kept beside a copy in safetensors,
    which is what is read from then on.

    `precision` is that of the encoder's body; its last convolution is always float32, as in the released
    model. `auto` is float16 on a GPU (the published model's own choice) and float32 on a CPU. Ids are equal
    to the published encoder's in float32; a lower precision moves some between nearly equal scores.
    """

    vocab_size = 8192
    stride = 8

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 112,
        files: Mapping[str, Mapping[str, Any]],
        weights: str,
        offline: bool = False,
        precision: str = "auto",
        decoder: bool = True,
    ) -> None:
        super().__init__()
        self.image_size = size_of(image_size, self.stride)
        if precision != "auto" and precision not in PRECISIONS:
            raise ConfigError(f"tokenizer.precision={precision}: set it to auto, {', '.join(PRECISIONS)}")
        self.precision = precision
        folder = Path(weights).expanduser()
        self.encoder = build("encoder", parameters("encoder", files["encoder"], folder, offline))
        self.decoder = (
            build("decoder", parameters("decoder", files["decoder"], folder, offline)) if decoder else None
        )
        self.requires_grad_(False)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        check_view(image, self.image_size)
        return self.logits(image).argmax(1).flatten(1)  # (B, N)

    def logits(self, image: Tensor) -> Tensor:
        """Scores (B, V, rows, cols) in float32 of images (B, 3, T, T) in [0, 1]."""
        device, dtype = image.device.type, self._dtype(image.device)
        squeezed = (1 - 2 * MARGIN) * image.float() + MARGIN
        # Both autocasts also shut out the trainer's own: ids must not depend on its precision.
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            features = self.encoder[:-1](squeezed.contiguous(memory_format=torch.channels_last))
        with torch.autocast(device, enabled=False):
            return self.encoder[-1](features.float())

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor | None:
        if self.decoder is None:
            return None
        weight, bias = self.decoder.get_parameter("input.weight"), self.decoder.get_parameter("input.bias")
        rest = self.decoder[1:]
        with torch.autocast(ids.device.type, enabled=False):
            # A 1x1 convolution of one-hot vectors looks up its columns.
            codes = F.embedding(ids.view(-1, *self.grid), weight[:, :, 0, 0].t()) + bias
            stats = rest(codes.permute(0, 3, 1, 2)).float()  # (B, 6, T, T): means, then log scales
            return ((stats[:, :3].sigmoid() - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)

    def _dtype(self, device: torch.device) -> torch.dtype:
        if self.precision == "auto":
            return torch.float32 if device.type == "cpu" else torch.float16
        return PRECISIONS[self.precision]


def parameters(kind: str, source: Mapping[str, Any], cache: Path, offline: bool) -> dict[str, Tensor]:
    """The encoder's or decoder's parameters by name, fetched and converted if that was not done before."""
    path = fetch(
        f"{kind}.pkl",
        urls=source["urls"],
        cache=cache,
        size=source["size"],
        sha256=source["sha256"],
        offline=offline,
        key="tokenizer.offline",
    )
    converted = path.with_name(f"{kind}-{sha256(path)[:16]}.safetensors")
    if not converted.is_file():
        write_bytes(converted, safetensors.torch.save(load_pickled(path, kind)))
    return read(converted)


def load_pickled(path: Path, kind: str) -> dict[str, Tensor]:
    """The parameters in a pickled `encoder` or `decoder` module, without running anything the file asks for.

    Both formats of `torch.save` are read. A zip goes through torch's own restricted reader, told of the few
    classes the module is made of. The older format is a row of pickles, which that reader does not take with
    modules in them; a restricted unpickler of our own reads every one of them.
    """
    classes = _classes(kind)
    stream = io.BytesIO(path.read_bytes())  # not the file: torch would try an open file as a tar archive too
    zipped = stream.getvalue()[:4] == b"PK\x03\x04"
    try:
        if zipped:
            with torch.serialization.safe_globals(classes):
                module = torch.load(stream, map_location="cpu", weights_only=True)
        else:
            restricted = _restricted_pickle(classes)
            module = torch.load(stream, map_location="cpu", weights_only=False, pickle_module=restricted)
        if not isinstance(module, classes[0]):
            raise CheckpointError(f"{path}: holds a {type(module).__name__}, not DALL-E's {kind}")
        return {name: tensor.detach().clone() for name, tensor in _parameters(module)}
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {refusal(error)}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            f"{path}: cannot be read as DALL-E's {kind} ({type(error).__name__}); remove it to fetch it again"
        ) from error


def build(kind: str, state: Mapping[str, Tensor]) -> nn.Sequential:
    """The published `encoder` or `decoder` with these parameters, as plain convolutions."""
    with torch.device("meta"):
        module = _classes(kind)[0](device=torch.device("meta"))
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"these are not the weights of DALL-E's {kind}: {error}") from error
    blocks = module.blocks
    _plain_convolutions(blocks)
    return blocks.to(memory_format=torch.channels_last)


def _classes(kind: str) -> list[Any]:
    """The classes a pickled module is made of, its own first."""
    try:
        from dall_e import decoder, encoder, utils
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tokenizer=dalle needs the package dall-e ({error}); run `pip install beit-pretrain[dalle]`"
        ) from error
    parts = [utils.Conv2d, nn.Sequential, nn.ReLU, nn.Identity]
    if kind == "encoder":
        return [encoder.Encoder, encoder.EncoderBlock, nn.MaxPool2d, *parts]
    return [decoder.Decoder, decoder.DecoderBlock, nn.Upsample, *parts]


def _restricted_pickle(classes: Sequence[Any]) -> ModuleType:
    """A stand-in for the module `pickle` that knows these classes and the makers of tensors only."""
    known: dict[tuple[str, str], Any] = {(c.__module__, c.__qualname__): c for c in classes}
    known["collections", "OrderedDict"] = OrderedDict
    known["__builtin__", "set"] = known["builtins", "set"] = set
    known["torch", "device"] = torch.device
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        known["torch._utils", name] = _wrapped(getattr(_utils, name))

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
            return known[module, name]

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, _without_source(value) if name == "persistent_load" else value)

    def load(stream: io.BytesIO, **settings: Any) -> Any:
        return Unpickler(stream, **settings).load()

    restricted = ModuleType("restricted_pickle")
    vars(restricted).update(Unpickler=Unpickler, load=load)
    return restricted


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy for one load: a pickle may set attributes on whatever it is given."""
    return lambda *args: function(*args)


def _without_source(persistent_load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Torch's reader of stored objects, but for the source code that old files carry beside a module.

    Torch compares it with the installed code and may write the difference to a file named by the pickle.
    """

    def load(saved: Any) -> Any:
        is_module = isinstance(saved, tuple) and saved[0] in ("module", b"module")
        return saved[1] if is_module else persistent_load(saved)

    return load


def _parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and parameters read off the attributes: no method or hook that came with the file has a say."""
    for name, tensor in vars(module)["_parameters"].items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{prefix}{name} is a {type(tensor).__name__}")
        yield prefix + name, tensor
    for name, child in vars(module)["_modules"].items():
        yield from _parameters(child, f"{prefix}{name}.")


def _plain_convolutions(module: nn.Module) -> None:
    """Replace the package's convolutions, which choose a precision by themselves, with torch's."""
    from dall_e.utils import Conv2d

    for name, child in list(module.named_children()):
        if not isinstance(child, Conv2d):
            _plain_convolutions(child)
            continue
        plain = nn.Conv2d(child.n_in, child.n_out, child.kw, padding=(child.kw - 1) // 2, device="meta")
        plain.weight, plain.bias = child.w, child.b
        setattr(module, name, plain)
