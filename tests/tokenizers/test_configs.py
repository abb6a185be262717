from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from beit_pretrain.tokenizer import Tokenizer
from beit_tokenizers.dalle import DalleTokenizer
from beit_tokenizers.dvae import DVae

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "maker"), [("dvae", DVae), ("dalle", DalleTokenizer)])
def test_a_yaml_names_its_class_and_every_setting_of_it_with_a_comment(name: str, maker: type) -> None:
    path = ROOT / "configs" / "tokenizer" / f"{name}.yaml"
    text = path.read_text()
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    assert text.startswith("# beit-train ")
    assert config.pop("_target_") == f"{maker.__module__}.{maker.__qualname__}"
    assert config.pop("name") == name
    for kept in ("checkpoint", "cache", "views"):  # of the configuration, not of the class
        config.pop(kept, None)
    assert config.keys() == inspect.signature(maker).parameters.keys()
    for key in config:
        above = re.search(rf"(.*)\n{key}:", text)
        assert above
        assert above[1].startswith("#") or key == "temperature_end", f"{key} has no comment"


def test_defaults_of_the_class_and_of_the_yaml_agree() -> None:
    config = OmegaConf.load(ROOT / "configs" / "tokenizer" / "dvae.yaml")
    for key, parameter in inspect.signature(DVae).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert config[key] == parameter.default, key


def test_the_readmes_own_tokenizer_keeps_the_contract() -> None:
    text = (ROOT / "tokenizers" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    names = {"Tokenizer": Tokenizer, "Tensor": torch.Tensor, "F": torch.nn.functional}
    exec("\n".join(line.removeprefix("   ") for line in code[1].splitlines()), names)
    tokenizer = names["Grey"](image_size=32)
    image = torch.full((2, 3, 32, 32), 20 / 63)
    ids = tokenizer.encode(image)
    assert ids.tolist() == [[20] * 16] * 2
    torch.testing.assert_close(tokenizer.decode(ids), image)


def test_the_source_root_cannot_shadow_hugging_faces_tokenizers() -> None:
    assert not (ROOT / "tokenizers" / "__init__.py").exists()
