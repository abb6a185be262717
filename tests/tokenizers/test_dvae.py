from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_pretrain.errors import ConfigError
from beit_tokenizers import dvae
from beit_tokenizers.dvae import DVae


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(**changes: Any) -> DVae:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "image_size": (12, 8),
        "vocab_size": 16,
        "code_dim": 6,
        "hidden": 8,
        "layers": 2,
        "temperature_steps": 10,
    }
    return DVae(**{**settings, **changes})


def pictures(count: int = 3, size: tuple[int, int] = (12, 8)) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("size", [(48, 32), (24, 40), 16])
def test_ids_and_pictures_have_the_shape_of_the_grid(size: int | tuple[int, int], layers: int) -> None:
    tokenizer = make(image_size=size, layers=layers)
    height, width = (size, size) if isinstance(size, int) else size
    stride = 2**layers
    assert (tokenizer.stride, tokenizer.grid) == (stride, (height // stride, width // stride))
    ids = tokenizer.encode(pictures(5, (height, width)))
    assert ids.shape == (5, height * width // stride**2)
    assert (ids.dtype, ids.requires_grad) == (torch.int64, False)
    painted = tokenizer.decode(ids)
    assert painted.shape == (5, 3, height, width)
    assert 0 <= painted.min() <= painted.max() <= 1


def middle(changed: torch.Tensor) -> tuple[float, float]:
    """(row, column) of the middle of the box around what is not zero."""
    rows, columns = changed.nonzero(as_tuple=True)
    return (int(rows.min()) + int(rows.max())) / 2, (int(columns.min()) + int(columns.max())) / 2


def test_each_token_stands_for_its_place_row_by_row() -> None:
    tokenizer = make(image_size=(48, 32))
    image = pictures(1, (48, 32))
    changed = image.clone()
    changed[..., 20:24, 12:16] = 1 - changed[..., 20:24, 12:16]
    with torch.no_grad():
        assert middle((tokenizer.logits(image) - tokenizer.logits(changed))[0].abs().sum(0)) == (5, 3)
    ids = torch.zeros(1, 96, dtype=torch.int64)
    one = ids.clone()
    one[0, 5 * 8 + 3] = 1
    assert middle((tokenizer.decode(ids) - tokenizer.decode(one))[0].abs().sum(0)) == (21.5, 13.5)


def test_ids_do_not_depend_on_the_trainers_precision() -> None:
    tokenizer = make(image_size=64, vocab_size=512)
    image = pictures(4, (64, 64))
    ids = tokenizer.encode(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(tokenizer.logits(image).argmax(1).flatten(1), ids), (
            "this precision changes nothing"
        )
        assert torch.equal(tokenizer.encode(image), ids)


def test_the_loss_is_the_one_of_the_formulas() -> None:
    tokenizer = make(kl_weight=0.3).double()
    image, step = pictures().double(), 4
    torch.manual_seed(5)
    loss, logs = tokenizer.loss(image, step)

    logits = tokenizer.logits(image).float().detach()
    torch.manual_seed(5)
    noise = -torch.empty_like(logits).exponential_().log().numpy()
    scores = logits.numpy()
    tau = 1 / 16 + (1 - 1 / 16) * (1 + math.cos(math.pi * 0.4)) / 2
    mixed = np.exp((scores + noise) / tau)
    mixed /= mixed.sum(1, keepdims=True)
    codes = np.einsum("bvhw,vc->bchw", mixed, tokenizer.codebook.detach().numpy())
    painted = tokenizer.decoder(torch.from_numpy(codes)).detach().numpy()
    recon = ((painted - (2 * image.numpy() - 1)) ** 2).mean()
    q = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    kl = (q * np.log(q * 16)).sum(1).mean()
    assert kl > 1e-4
    assert logs["recon"].item() == pytest.approx(recon, rel=1e-4)
    assert logs["kl"].item() == pytest.approx(kl, rel=1e-3)
    assert loss.item() == pytest.approx(recon + 0.3 * kl, rel=1e-4)
    assert logs["temperature"].item() == pytest.approx(tau)


def test_the_temperature_falls_on_a_cosine_and_stays() -> None:
    tokenizer = make(temperature_start=2.0, temperature_end=0.5, temperature_steps=8)
    assert [tokenizer.temperature(step) for step in (0, 4, 8, 1000)] == pytest.approx([2.0, 1.25, 0.5, 0.5])
    assert make(temperature_steps=0).temperature(0) == 1 / 16


def test_straight_through_decodes_single_codes_and_still_teaches_the_encoder() -> None:
    tokenizer = make(straight_through=True)
    image = pictures()
    torch.manual_seed(5)
    loss, logs = tokenizer.loss(image, 0)
    loss.backward()
    assert tokenizer.to_logits.weight.grad is not None
    assert tokenizer.to_logits.weight.grad.abs().sum() > 0
    torch.manual_seed(5)
    logits = tokenizer.logits(image)
    drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(1)
    codes = F.embedding(drawn, tokenizer.codebook).permute(0, 3, 1, 2)
    assert logs["recon"].item() == pytest.approx(F.mse_loss(tokenizer.decoder(codes), 2 * image - 1).item())


def test_evaluation_judges_the_best_codes_without_chance_or_trace() -> None:
    tokenizer = make().eval()
    image = pictures()
    before = torch.get_rng_state()
    _, logs = tokenizer.loss(image, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert tokenizer.pending.sum() == 0
    codes = F.embedding(tokenizer.encode(image).view(3, 3, 2), tokenizer.codebook).permute(0, 3, 1, 2)
    assert logs["recon"].item() == pytest.approx(F.mse_loss(tokenizer.decoder(codes), 2 * image - 1).item())


def test_perplexity_is_one_for_a_single_code_and_their_number_for_even_use() -> None:
    tokenizer = make()
    with torch.no_grad():
        tokenizer.to_logits.weight.zero_()
    assert tokenizer.loss(pictures(), 0)[1]["perplexity"] == 1
    assert dvae._perplexity(torch.tensor([4, 4, 0, 4, 4])).item() == pytest.approx(4)


def test_use_is_a_running_average_over_steps_of_all_their_micro_batches() -> None:
    tokenizer = make(use_window=4, dead_below=0.0)
    image = pictures(4)
    whole = torch.bincount(tokenizer.encode(image).flatten(), minlength=16)
    for half in image.split(2):
        tokenizer.loss(half, 0)
    assert torch.equal(tokenizer.pending, whole.float())
    tokenizer.after_step(0)
    assert tokenizer.pending.sum() == 0
    torch.testing.assert_close(tokenizer.use, 0.75 / 16 + 0.25 * whole / whole.sum())


def test_a_refused_step_leaves_no_trace() -> None:
    tokenizer = make()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.loss(pictures(), 0)
    tokenizer.drop_pending()
    assert tokenizer.pending.sum() == 0
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def revived(step: int, **changes: Any) -> tuple[DVae, DVae]:
    """The same tokenizer before and after a step in which codes 3 and 7 are dead and code 5 is used most."""
    before, after = make(use_window=5, **changes), make(use_window=5, **changes)
    for tokenizer in (before, after):
        tokenizer.use.copy_(torch.full((16,), 1 / 16))
        tokenizer.use[[3, 7]] = 1e-5
        tokenizer.use[5] = 100
    after.pending.copy_(torch.tensor([1.0] * 16))
    after.pending[[3, 7]] = 0
    after.after_step(step)
    return before, after


def test_dead_codes_become_changed_copies_of_codes_in_use() -> None:
    before, after = revived(step=4)
    live = [code for code in range(16) if code not in (3, 7)]
    assert torch.equal(after.codebook[live], before.codebook[live])
    assert torch.equal(after.to_logits.weight[live], before.to_logits.weight[live])
    for old, new in ((before.codebook, after.codebook), (before.to_logits.weight, after.to_logits.weight)):
        for dead in (3, 7):
            distance = (new[dead] - old[5]).abs().max()
            assert 0 < distance < 0.6 * old.std()
    assert torch.equal(after.to_logits.bias[[3, 7]], before.to_logits.bias[[5, 5]])
    assert not torch.equal(after.codebook[3], after.codebook[7])


def test_revival_is_the_same_everywhere_and_another_at_another_step() -> None:
    first, second = make(use_window=5), make(use_window=5)
    for seed, tokenizer in enumerate((first, second)):
        tokenizer.use[[3, 7]] = 0
        torch.manual_seed(seed)  # the ranks' own generators differ
        before = torch.get_rng_state()
        tokenizer.after_step(4)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.codebook, second.codebook)
    other = revived(step=9, temperature_steps=20)[1]
    assert not torch.equal(revived(step=4, temperature_steps=20)[1].codebook, other.codebook)


@pytest.mark.parametrize(
    ("step", "changes"), [(3, {}), (14, {}), (4, {"dead_below": 0.0})], ids=["between", "annealed", "off"]
)
def test_codes_are_left_alone_between_windows_after_the_annealing_and_on_request(
    step: int, changes: dict[str, Any]
) -> None:
    before, after = revived(step, **changes)
    assert torch.equal(before.codebook, after.codebook)
    assert torch.equal(before.to_logits.weight, after.to_logits.weight)


def test_logged_use_is_the_share_of_codes_that_are_not_dead() -> None:
    before, _ = revived(step=4)
    assert before.loss(pictures(), 4)[1]["codebook_use"].item() == pytest.approx(14 / 16)


def train(tokenizer: DVae, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        loss, _ = tokenizer.loss(pictures(), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.after_step(step)


def test_a_run_that_was_saved_and_loaded_ends_bit_identical() -> None:
    settings: dict[str, Any] = {"use_window": 2, "dead_below": 0.9, "kl_weight": 0.1}
    straight = make(**settings)
    optimizer = torch.optim.AdamW(straight.parameters(), lr=0.01)
    train(straight, optimizer, range(4))
    saved, moments = straight.state_dict(), copy.deepcopy(optimizer.state_dict())
    resumed = make(**settings)
    resumed.load_state_dict({name: value.clone() for name, value in saved.items()})
    other = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    other.load_state_dict(moments)
    train(resumed, other, range(4, 8))
    train(straight, optimizer, range(4, 8))
    expected = straight.state_dict()
    assert "use" in expected
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_it_learns_to_paint_what_it_sees() -> None:
    tokenizer = make(hidden=24, temperature_steps=100)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=5e-3)
    flat = torch.rand(64, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 12, 8)
    torch.manual_seed(0)
    for step in range(120):
        loss, _ = tokenizer.loss(flat, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.after_step(step)
    error = F.mse_loss(tokenizer.decode(tokenizer.encode(flat)), flat)
    assert error < 0.4 * (flat - flat.mean(0)).square().mean()


RANK = """
    import sys
    import torch
    from torch import distributed
    from beit_tokenizers.dvae import DVae
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    tokenizer = DVae(image_size=(12, 8), vocab_size=16, code_dim=6, hidden=8, layers=2, temperature_steps=10,
                     use_window=1, dead_below=0.5)
    images = torch.rand(4, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    if rank >= 0:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        images = images[2 * rank : 2 * rank + 2]
    tokenizer.loss(images, 0)
    tokenizer.after_step(0)
    torch.save(tokenizer.state_dict(), f"{folder}/{rank}.pt")
    if rank >= 0:
        distributed.destroy_process_group()
"""


def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path) -> None:
    root = Path(dvae.__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tokenizers')!r}]\n" + textwrap.dedent(
        RANK
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)]) for rank in (-1, 0, 1)]
    assert [job.wait(timeout=300) for job in jobs] == [0, 0, 0]
    alone, first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (-1, 0, 1))
    assert (alone["codebook"] != make().codebook).any(), "no code was revived, so nothing had to be agreed"
    assert all(torch.equal(alone[name], first[name]) for name in alone)
    assert all(torch.equal(alone[name], second[name]) for name in alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, r"tokenizer\.image_size=30: .*stride 4; set .* to 28, 32"),
        ({"image_size": (8, 8, 8)}, r"tokenizer\.image_size=\(8, 8, 8\)"),
        ({"temperature_end": 2.0}, r"tokenizer\.temperature_end=2\.0 must lie between 0 and .*start=1\.0"),
        ({"temperature_steps": -1}, r"tokenizer\.temperature_steps=-1 must be 0"),
        ({"vocab_size": 1}, r"tokenizer\.vocab_size=1 must be at least 2"),
        ({"use_window": 0}, r"tokenizer\.use_window=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_a_view_of_another_size_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"for images of 3 x 12 x 8 and was given 3 x 8 x 12; set tokenizer"
    ):
        make().encode(pictures(1, (8, 12)))


@pytest.mark.slow
def test_digits_are_painted_well_with_a_varied_codebook() -> None:
    from sklearn.datasets import load_digits

    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]
    images = (
        F.interpolate(digits, (32, 32), mode="bicubic", align_corners=False).clamp(0, 1).repeat(1, 3, 1, 1)
    )
    tokenizer = make(
        image_size=32, vocab_size=256, code_dim=64, hidden=64, temperature_steps=320, kl_weight=0.01, use_window=25,
        dead_below=0.1,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=400, pct_start=0.12)
    for step in range(400):
        loss, _ = tokenizer.loss(images[torch.randint(400, 1797, (64,))], step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tokenizer.after_step(step)
    with torch.no_grad():
        _, logs = tokenizer.eval().loss(images[:397], 400)
    assert logs["recon"] < 0.01
    assert logs["perplexity"] > 30
