"""The commands of `beit-tools` around a trained model. Each command's code is imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from beit_pretrain.wording import printable

Model = Annotated[
    str,
    typer.Argument(help="a run folder, a file, an address, hf:OWNER/NAME, timm:NAME or published:NAME"),
]
Images = Annotated[list[Path], typer.Argument(help="files, or folders of images")]
Weights = Annotated[str, typer.Option(help="raw, or ema: the running average that fine-tuning can keep")]
Size = Annotated[str | None, typer.Option(help="pixels, 384 or [480,640], in place of those of the training")]
Batch = Annotated[int, typer.Option(help="images at a time", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
Colours = Annotated[
    str | None, typer.Option(help="three numbers, such as 0.5,0.5,0.5, where the file does not say them")
]
Heads = Annotated[int | None, typer.Option(help="of the attention, where the file does not say it", min=1)]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (convert, show, predict, segment, embed, reconstruct, attention, export):
        app.command()(command)


def convert(
    source: Model,
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option(help="original, huggingface or timm")],
    weights: Weights = "raw",
    mean: Colours = None,
    std: Colours = None,
    heads: Heads = None,
) -> None:
    """Weights in another format, compared there: beit-tools convert runs/finetune out --to huggingface

    OUT holds certificate.json: the largest difference of the logits between both libraries. Above 1e-4 of them nothing
    is written.
    """
    from beit_pretrain.tools.convert import convert as convert_to

    _echo(
        convert_to(
            source,
            out.expanduser(),
            to=to,
            weights=weights,
            mean=numbers(mean),
            std=numbers(std),
            heads=heads,
        )
    )


def show(source: Model, heads: Heads = None) -> None:
    """What a file of weights is and where it comes from, as a tree: beit-tools show runs/finetune"""
    from beit_pretrain.tools.show import show as print_tree

    print_tree(source, heads)


def predict(
    checkpoint: Model,
    images: Images,
    top: Annotated[int, typer.Option(help="classes named for each image", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="a CSV file to write")] = None,
    weights: Weights = "raw",
    image_size: Size = None,
    mean: Colours = None,
    std: Colours = None,
    heads: Heads = None,
    batch_size: Batch = 32,
    device: Device = "auto",
) -> None:
    """The likeliest classes of images: beit-tools predict runs/finetune photo.jpg folder/ --out classes.csv"""
    from beit_pretrain.tools.predict import predict as classify

    raise typer.Exit(
        classify(
            checkpoint,
            images,
            top=top,
            out=None if out is None else out.expanduser(),
            options=_options(weights, image_size, mean, std, heads),
            batch_size=batch_size,
            device=device,
        )
    )


def segment(
    checkpoint: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="the folder to write to")] = Path("segments"),
    multi_scale: Annotated[
        bool,
        typer.Option("--multi-scale", help="mean over six sizes, each mirrored too: slower, a little better"),
    ] = False,
    whole: Annotated[bool, typer.Option("--whole", help="the whole image at once, without windows")] = False,
    alpha: Annotated[float, typer.Option(help="weight of the colours", min=0.0, max=1.0)] = 0.5,
    blocks: Annotated[
        str | None, typer.Option(help="four blocks, counted from 0, in place of those that the file names")
    ] = None,
    mean: Colours = None,
    std: Colours = None,
    heads: Heads = None,
    device: Device = "auto",
) -> None:
    """The class of each pixel: beit-tools segment runs/segment photo.jpg folder/ --out segments

    Writes NAME.overlay.png, to look at, and NAME.labels.png, with the numbers of the data set's files.
    """
    from beit_pretrain.tools.segment import segment as run_on

    raise typer.Exit(
        run_on(
            checkpoint,
            images,
            out=out.expanduser(),
            multi_scale=multi_scale,
            whole=whole,
            alpha=alpha,
            options={**_options("raw", None, mean, std, heads), "blocks": _whole_numbers("--blocks", blocks)},
            device=device,
        )
    )


def embed(
    checkpoint: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="a file to write: .npz or .parquet")] = Path("embeddings.npz"),
    block: Annotated[
        int | None, typer.Option(help="counted from 0, or from the end as -1; else the last")
    ] = None,
    pooling: Annotated[
        str, typer.Option(help="mean of the patches, cls, both (side by side) or patches (each of them)")
    ] = "mean",
    weights: Weights = "raw",
    image_size: Size = None,
    mean: Colours = None,
    std: Colours = None,
    heads: Heads = None,
    batch_size: Batch = 32,
    device: Device = "auto",
) -> None:
    """Features of images: beit-tools embed runs/pretrain folder/ --out features.npz --block 8"""
    from beit_pretrain.tools.embed import embed as features

    raise typer.Exit(
        features(
            checkpoint,
            images,
            out=out.expanduser(),
            block=block,
            pooling=pooling,
            options=_options(weights, image_size, mean, std, heads),
            batch_size=batch_size,
            device=device,
        )
    )


def reconstruct(
    checkpoint: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="the folder to write to")] = Path("reconstructions"),
    tokenizer: Annotated[
        str | None,
        typer.Option(help="a run of stage=tokenizer, or dalle; else the one that the model was trained with"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the masks", min=0)] = 0,
    mean: Colours = None,
    std: Colours = None,
    heads: Heads = None,
    device: Device = "auto",
) -> None:
    """What a pre-trained model sees behind a mask: beit-tools reconstruct runs/pretrain photo.jpg"""
    from beit_pretrain.tools.reconstruct import reconstruct as paint

    raise typer.Exit(
        paint(
            checkpoint,
            images,
            out=out.expanduser(),
            tokenizer=tokenizer,
            seed=seed,
            options=_options("raw", None, mean, std, heads),
            device=device,
        )
    )


def attention(
    checkpoint: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="the folder to write to")] = Path("attention"),
    patch: Annotated[
        str | None, typer.Option(help="row,column of the patch that looks, from 0; else the CLS token")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="counted from 0, or from the end as -1; else the last")
    ] = None,
    weights: Weights = "raw",
    image_size: Size = None,
    mean: Colours = None,
    std: Colours = None,
    heads: Heads = None,
    device: Device = "auto",
) -> None:
    """Where each head looks from one patch: beit-tools attention runs/pretrain photo.jpg --patch 7,4"""
    from beit_pretrain.tools.attention import attention as draw

    raise typer.Exit(
        draw(
            checkpoint,
            images,
            out=out.expanduser(),
            patch=patch,
            block=block,
            options=_options(weights, image_size, mean, std, heads),
            device=device,
        )
    )


def export(
    checkpoint: Model,
    out: Annotated[Path, typer.Argument(help="the file to write, such as model.onnx or model.pt2")],
    to: Annotated[str, typer.Option(help="onnx or torch (torch.export)")],
    weights: Weights = "raw",
    image_size: Size = None,
    mean: Colours = None,
    std: Colours = None,
    heads: Heads = None,
) -> None:
    """The model as a graph, checked against itself: beit-tools export runs/finetune model.onnx --to onnx"""
    from beit_pretrain.tools.export import export as write_graph

    _echo(
        write_graph(
            checkpoint, out.expanduser(), to=to, options=_options(weights, image_size, mean, std, heads)
        )
    )


def _echo(lines: str) -> None:
    """Print lines with names from a file of others in them."""
    typer.echo("\n".join(map(printable, lines.split("\n"))))


def numbers(text: str | None) -> list[float] | None:
    """`0.5,0.5,0.5`, with or without brackets, as numbers; BadParameter otherwise."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.strip("[]() ").split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text}: give numbers with commas between them, such as 0.5,0.5,0.5"
        ) from None


def _options(
    weights: str, image_size: str | None, mean: str | None, std: str | None, heads: int | None
) -> dict[str, Any]:
    """What `load` takes beside the path."""
    size = _whole_numbers("--image-size", image_size)
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise typer.BadParameter(f"--image-size {image_size}: give pixels, such as 384 or [480,640]")
    return {
        "weights": weights,
        "image_size": None if size is None else (size * 2)[:2],
        "mean": numbers(mean),
        "std": numbers(std),
        "heads": heads,
        "key": "CHECKPOINT",
        "tell": lambda note: typer.echo(f"note: {printable(note)}", err=True),
    }


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    given = numbers(text)
    if given is not None and any(value % 1 for value in given):
        raise typer.BadParameter(f"{option} {text}: give whole numbers")
    return None if given is None else [int(value) for value in given]
