"""`beit-tools`: what one does beside training. Each command's code is imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="beit-tools",
    help="Tools around beit-train. Arguments like key=value are the same overrides as beit-train's.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as for beit-train")]


@app.callback()
def _commands() -> None:
    """Keeps sub-commands by name."""


@app.command()
def masks(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("masks.png"),
    count: Annotated[int, typer.Option(help="masks to draw; the statistics are over 2,000", min=1)] = 24,
) -> None:
    """Draw a sheet of masks: beit-tools masks masking=random image_size=224 --out masks.png"""
    from hydra.utils import instantiate

    from beit_pretrain.compose import compose
    from beit_pretrain.report.mask_sheet import draw_sheet

    cfg = compose(["stage=pretrain", *(overrides or [])])
    draw_sheet(instantiate(cfg.masking), masks=count, path=out, seed=cfg.seed)
    typer.echo(out)


@app.command()
def knn(checkpoint: Path, overrides: Overrides = None) -> None:
    """Nearest neighbours on frozen features: beit-tools knn runs/pretrain data=folder data.root=/labelled"""
    from beit_pretrain.compose import compose
    from beit_pretrain.run import run
    from beit_pretrain.summary import show

    arguments = ["stage=knn", f"init_from={checkpoint}", *(overrides or [])]
    cfg = compose(arguments)
    show(run(cfg, arguments), cfg)


@app.command()
def replay(file: Path) -> None:
    """Run a step that was refused for a NaN again, and say where the first one appears."""
    from beit_pretrain.tools.replay import replay as run_again

    raise typer.Exit(run_again(file))


@app.command()
def segment(
    checkpoint: Annotated[Path, typer.Argument(help="a run folder or checkpoint of stage=segment")],
    images: Annotated[list[Path], typer.Argument(help="files, or folders of images")],
    out: Annotated[Path, typer.Option(help="the folder to write to")] = Path("segments"),
    multi_scale: Annotated[
        bool,
        typer.Option("--multi-scale", help="mean over six sizes, each mirrored too: slower, a little better"),
    ] = False,
    whole: Annotated[bool, typer.Option("--whole", help="the whole image at once, without windows")] = False,
    alpha: Annotated[float, typer.Option(help="weight of the colours", min=0.0, max=1.0)] = 0.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
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
            device=device,
        )
    )
