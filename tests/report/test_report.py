"""The pages: whole, safe, and saying the numbers of the run."""

from __future__ import annotations

import base64
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from beit_pretrain.errors import BeitError
from beit_pretrain.report import make_chain_report, make_report
from beit_pretrain.report.pictures import embed, spread

EVIL = "<script>alert('x')</script>\"&<img src=x onerror=y>"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; refuses one whose tags do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(path.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += f" {data}" if self.open and self.open[-1] != "style" else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "knn", "classify", "probe", "segment"])
def test_a_page_holds_everything_it_shows(make_run, stage: str) -> None:
    run = make_run(stage=stage)
    path = make_report(run)
    page = Page(path)
    assert path == run / "report.html"
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/", "#")), target
        assert not any(name.startswith("on") for name in attributes)
    text = path.read_text()
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))


def test_the_numbers_of_the_run_are_on_the_page(make_run) -> None:
    words = " ".join(Page(make_report(make_run())).words.split())
    for said in (
        "2.451 ± 0.031",
        "4.02",
        "4.78",
        "36.90 ± 0.98%",
        "512,384",
        "2 min 12 s",
        "1,000",
        "+50.6 s.e.",
        "+21.2 s.e.",
    ):
        assert said in words, said
    assert (
        "1.569 nats below what a model without pictures reaches: 50.6 standard errors, a clear gain" in words
    )
    assert (
        "20.9 points above what a model without pictures reaches: 21.2 standard errors, a clear gain" in words
    )
    assert "batch_size 2048 64" in words and "git commit 0f3c2a1" in words and "width: 96" in words


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ((0.0313, 0.00984), "2.451 ± 0.031 36.90 ± 0.98%"),
        ((0.00048, 0.2), "2.45100 ± 0.00048 37 ± 20%"),
        ((12.0, 0.0), "2 ± 12 36.9%"),
        ((None, None), "2.451 36.9%"),
    ],
)
def test_a_value_has_as_many_digits_as_its_error(
    make_run, errors: tuple[float | None, ...], said: str
) -> None:
    metrics = {
        "val/loss": 2.451,
        "val/accuracy": 0.369,
        "val/loss_se": errors[0],
        "val/accuracy_se": errors[1],
    }
    words = " ".join(Page(make_report(make_run(results={"metrics": metrics}))).words.split())
    assert f"This model, held-out images {said} Ids counted" in words


def test_a_tokenizer_page_shows_its_reconstruction_and_codebook_use(make_run) -> None:
    final = {"val/loss": 0.5, "val/recon": 0.25, "val/codebook_use": 0.875}
    words = " ".join(Page(make_report(make_run(stage="tokenizer", results={"metrics": final}))).words.split())
    assert (
        "held-out loss 0.25 of the reconstruction codebook use 87.5% of the codes, on held-out images"
        in words
    )
    assert "Gumbel-softmax temperature" in words and "KL to uniform" in words and "baseline" not in words


def test_the_knn_page_compares_with_the_untrained_encoder_and_raw_pixels(make_run) -> None:
    path = make_report(make_run(stage="knn"))
    words = " ".join(Page(path).words.split())
    assert "Untrained encoder 62.0% Raw pixels 97.0% Pre-trained encoder 91.0%" in words
    assert "Raw pixels do well here" in words and "2 92.0% 91.0% best" in words
    assert "width: 62.0%" in path.read_text()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("model", "z", "said", "cell"),
    [
        (3.0, 12.0, "1.020 nats below .*12.0 standard errors, a clear gain", "+12.0 s.e."),
        (3.9, 1.5, "0.120 nats below .*only 1.5 standard errors, too little to call a gain", "+1.5 s.e."),
        (4.5, 4.0, "0.480 nats above .*4.0 standard errors on the wrong side", "-4.0 s.e."),
    ],
)
def test_the_verdict_follows_the_numbers(
    make_run, model: float, z: float, sign: int, said: str, cell: str
) -> None:
    baseline = {"loss_position": 4.02, "loss_z": sign * z}
    words = " ".join(
        Page(
            make_report(make_run(results={"metrics": {"val/loss": model}, "baseline": baseline}))
        ).words.split()
    )
    assert re.search(f"Masked loss on held-out images is {said}", words)
    assert cell in words


def test_text_from_files_is_never_markup(make_run) -> None:
    knn = {"accuracy": 0.9, "remark": EVIL, "blocks": [{"block": 0, "val": 0.9}]}
    results = {"name": EVIL, "stage": EVIL, "status": EVIL, "command": EVIL, "knn": knn}
    results |= {"recipe_diff": [[EVIL, EVIL, [EVIL]]], "environment": {EVIL: EVIL}}
    counted = {"support": [2, 1], "correct": [1, 1], "confusion": [[1, 1], [0, 1]]}
    results |= {"classification": {"classes": [EVIL, EVIL], **counted}}
    results |= {"init_from": {"path": EVIL, "report": [EVIL]}}
    results |= {"probe": {"rows": [{"block": 0, "pooling": EVIL, "val": 0.5}], "accuracy": 0.5}}
    run = make_run(folder="evil", results=results)
    (run / "config.yaml").write_text(f"name: {json.dumps(EVIL)}\n")
    (run / "metrics.csv").write_text("step,train/loss,<script>,knn/block_<b>\n1,2,3,4\n2,2,3,4\n")
    for path in (make_report(run), make_chain_report(run.parent, [(EVIL, run)])):
        page = Page(path)
        assert "<script" not in path.read_text() and "<img src=x" not in path.read_text()
        assert page.words.count(EVIL) >= 3
        assert not page.all("script") and len(page.all("h1")) == 1
    assert unescape(make_report(run).read_text()).count(EVIL) >= 18


def test_pictures_are_the_files_own_bytes_while_small(make_run) -> None:
    run = make_run(sheets=5)
    pictures = Page(make_report(run)).all("img")
    names = [1000, 0, 250, 500, 750]  # the last, the first, then those between
    files = [run / "pictures" / f"step-{step:08d}.png" for step in names] + [run / "pictures" / "masks.png"]
    assert [picture["alt"] for picture in pictures] == [
        "Step 1,000, the last one", "Step 0, the first one", "Step 250", "Step 500", "Step 750",
        "Hidden patches (mask sheet)",
    ]  # fmt: skip
    for picture, file in zip(pictures, files, strict=True):
        shown = base64.b64decode((picture["src"] or "").split(",")[1])
        with Image.open(io.BytesIO(shown)) as embedded, Image.open(file) as original:
            assert embedded.size == (int(picture["width"] or 0), int(picture["height"] or 0))
            if file in (files[0], files[1], files[-1]):
                assert shown == file.read_bytes()
            likeness = np.asarray(
                original.convert("RGB").resize(embedded.size, Image.Resampling.LANCZOS), float
            )
            assert np.abs(np.asarray(embedded.convert("RGB"), float) - likeness).mean() < 6


def test_a_large_picture_is_made_small_and_transparency_white(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (1500, 2000, 4), dtype=np.uint8)
    pixels[:700, :, 3], pixels[700:, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "large.png")
    picture = embed(tmp_path / "large.png", "large", side=800)
    assert (picture.width, picture.height) == (800, 600)
    with Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))) as shown:
        assert np.asarray(shown)[:250].min() > 240
    assert len(picture.uri) < 600_000


@pytest.mark.parametrize(("count", "most"), [(3, 12), (12, 12), (13, 12), (500, 12)])
def test_a_long_strip_is_thinned_evenly(count: int, most: int) -> None:
    sheets = [Path(str(index)) for index in range(count)]
    kept = [int(str(path)) for path in spread(sheets, most)]
    assert len(kept) == len(set(kept)) == min(count, most) and (kept[0], kept[-1]) == (0, count - 1)
    assert np.ptp(np.diff(kept)) <= 1


def test_a_long_run_makes_a_page_of_modest_size(make_run) -> None:
    run = make_run(steps=200_000, every=10, sheets=40, side=160)
    assert make_report(run).stat().st_size < 5_000_000


def test_a_report_changes_nothing_else_and_is_the_same_twice(make_run) -> None:
    run = make_run()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = make_report(run).read_bytes()
    assert make_report(run).read_bytes() == first
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.pop(run / "report.html") == first and after == before


def test_a_page_that_cannot_be_written_leaves_the_last_one(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    first = make_report(run).read_text()

    def full(self: Path, *_: object, **__: object) -> int:
        with self.open("w") as file:
            file.write("half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        BeitError, match=r"report\.html could not be written .*No space left.*free some space"
    ):
        make_report(run)
    assert (run / "report.html").read_text() == first
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]


def test_a_chain_shows_its_links_and_its_headline(make_run, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    links = [
        (name, make_run(name=name, stage=name, folder=name)) for name in ("tokenizer", "pretrain", "knn")
    ]
    odd = make_run(name="odd", stage="segment", folder="a b#c%", sheets=0, results={"status": "stopped"})
    links.append(("odd", odd))
    for _, run in links:
        make_report(run)
    page = Page(make_chain_report(folder, [*links, ("later", folder / "later")]))
    words = " ".join(page.words.split())
    assert (
        "Untrained encoder 62.0% Raw pixels 97.0% Pre-trained encoder 91.0%" in words
        and "Raw pixels do well" in words
    )
    assert (
        "pretrain masked image modelling finished held-out loss 2.451, held-out accuracy 36.9% 2 min 12 s"
        in words
    )
    assert "odd segmentation stopped" in words and "later not started" in words
    targets = [folder / unquote(link["href"] or "") for link in page.all("a")]
    assert targets == [run / "report.html" for _, run in links]
    assert page.all("a")[-1]["href"] == "a%20b%23c%25/report.html"  # relative: the folder may be moved
    assert "unfinished 5 links, 8 min 50 s" in words
    assert len(page.all("img")) == 2  # the last sheets of the tokenizer and of pre-training


def test_a_finished_chain_says_so_and_a_link_without_a_report_is_no_link(make_run, tmp_path: Path) -> None:
    page = Page(make_chain_report(tmp_path / "runs", [("knn", make_run(stage="knn", folder="knn"))]))
    assert not page.all("a") and "unfinished" not in page.words and "finished" in page.words


def test_a_chain_without_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(BeitError, match=r"There is no folder .*gone to write the report of the chain to"):
        make_chain_report(tmp_path / "gone", [])
