"""`beit-tools`: what one does beside training. Each command's code is imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from beit_pretrain.errors import ConfigError
from beit_pretrain.tools.app_models import register


class Commands(TyperGroup):
    """Refuses an argument that is an empty text: typer would make the working folder of it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            within = type(ctx)(command, info_name=name, parent=ctx)
            given, _, _ = command.make_parser(within).parse_args(list(rest))
            for param in command.get_params(within):
                value = given.get(param.name)
                if "" in (value if isinstance(value, list | tuple) else [value]):
                    key = param.opts[0] if param.param_type_name == "option" else str(param.name).upper()
                    raise ConfigError(
                        f"{key} of {ctx.command_path} {name} is an empty text (of a variable that is not set?): give a "
                        "value, or leave it out"
                    )
        return name, command, rest


app = typer.Typer(
    name="beit-tools",
    cls=Commands,
    help="Tools around beit-train. Arguments like key=value are the same overrides as beit-train's.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

shards = typer.Typer(
    cls=Commands, help="Images in tar files: write them, check them, look at them.", no_args_is_help=True
)
app.add_typer(shards, name="shards")

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as for beit-train")]


@app.callback()
def _commands() -> None:
    """Keeps sub-commands by name."""


register(app)


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
def sweep(
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(help="trials at a time, or jobs with --slurm", min=1)] = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit the workers as a Slurm job array")] = False,
    show: Annotated[bool, typer.Option("--show", help="only print the table so far")] = False,
    in_job: Annotated[bool, typer.Option("--in-job", hidden=True)] = False,
) -> None:
    """Search for good settings: beit-tools sweep sweep=finetune stage=classify init_from=runs/pretrain data=...

    Each trial is a run in runs/NAME/trial-0000 and so on; bad ones are stopped early. The same command goes on.
    """
    from beit_pretrain.tools.sweep import sweep as search

    search(overrides or [], workers=workers, slurm=slurm, in_job=in_job, only_show=show)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="of a run or a chain, finished or not")]) -> None:
    """Make report.html anew: beit-tools report runs/pretrain"""
    from beit_pretrain.tools.report import report as make

    typer.echo(make(folder.expanduser()))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or a folder above them")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("compare.html"),
    csv: Annotated[Path | None, typer.Option(help="a table to write, one row for each run")] = None,
) -> None:
    """Runs side by side, results, options that differ, curves: beit-tools compare runs/a runs/b --csv compare.csv"""
    from beit_pretrain.tools.compare import compare as side_by_side

    paths = [path.expanduser() for path in runs]
    side_by_side(paths, out=out.expanduser(), csv=None if csv is None else csv.expanduser())


@app.command()
def sbatch(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the script to write")] = Path("job.sh"),
) -> None:
    """Write a Slurm script for a run: beit-tools sbatch stage=pretrain data.root=/images hydra.launcher.nodes=4

    Options hydra.launcher.* say what the job asks for; configs/hydra/launcher/slurm.yaml lists them.
    """
    from beit_pretrain.tools.sbatch import write_script

    typer.echo(write_script(overrides or [], out.expanduser()))


@app.command()
def drill(
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="updates after which both runs end", min=4)] = 40,
    signal: Annotated[
        str | None, typer.Option(help="USR1, USR2 or TERM; else the first of trainer.signals")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="as Slurm jobs, by hydra.launcher.*")] = False,
    seed: Annotated[int, typer.Option(help="decides in which step the signal comes")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of both runs; else runs/NAME-drill")] = None,
    timeout: Annotated[
        float, typer.Option(help="minutes that the job may take to start again", min=0.0)
    ] = 30.0,
) -> None:
    """Interrupt a run and prove that nothing is lost: beit-tools drill stage=pretrain data.root=/images --slurm

    A short run left alone and one with a signal must see the same samples and end with the same weights.
    """
    from beit_pretrain.tools.drill import drill as rehearse

    folder = None if out is None else out.expanduser()
    raise typer.Exit(
        rehearse(
            overrides or [], steps=steps, signal=signal, slurm=slurm, seed=seed, out=folder, timeout=timeout
        )
    )


@app.command()
def plan(
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(help="for the test of the loader; 0: none", min=0.0)] = 30.0,
    rate: Annotated[
        float | None, typer.Option(help="images/s of one device, to count its workers; else 1,000", min=1.0)
    ] = None,
) -> None:
    """Images, disk space and loader of a run, before it starts: beit-tools plan stage=pretrain data.root=/images

    Tests the loader and says what limits it: reading, decoding, views or copying; and how many workers a device needs.
    """
    from beit_pretrain.tools.plan import plan as look_ahead

    look_ahead(overrides or [], seconds=seconds, rate=rate)


@shards.command("write")
def shards_write(
    src: Annotated[
        str, typer.Argument(help="a folder of images, or a choice of data: imagenet, torchvision, ...")
    ],
    out: Annotated[Path, typer.Argument(help="the folder to write to")],
    overrides: Overrides = None,
    samples: Annotated[int | None, typer.Option(help="images in a shard; else 10,000", min=1)] = None,
    size_mb: Annotated[float | None, typer.Option(help="or about how many MB", min=0.001)] = None,
    workers: Annotated[int, typer.Option(help="processes, a shard at a time each", min=1)] = 8,
    shuffle_seed: Annotated[int, typer.Option(help="of the order within each split", min=0)] = 0,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="keep the source's order")] = False,
    resize: Annotated[
        int | None,
        typer.Option(help="make the shorter side of larger images this long, as JPEG: a loss", min=1),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="of these JPEG files; else 90", min=1, max=100)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="throw away other shards in OUT")] = False,
) -> None:
    """Pack images into shards: beit-tools shards write /imagenet /shards --size-mb 500

    A folder with a sub-folder train is read as data=class_folders, another as data=folder. Image files go in
    as they are. The same command goes on after an interruption.
    """
    from beit_pretrain.tools.shards_write import write

    raise typer.Exit(
        write(
            src,
            out.expanduser(),
            overrides or [],
            samples=samples,
            size_mb=size_mb,
            workers=workers,
            seed=None if no_shuffle else shuffle_seed,
            resize=resize,
            quality=quality,
            overwrite=overwrite,
        )
    )


@shards.command("verify")
def shards_verify(
    root: Annotated[str, typer.Argument(help="the folder of the shards")],
    workers: Annotated[int, typer.Option(help="processes, a shard at a time each", min=1)] = 8,
) -> None:
    """Read every byte and compare it with the index: beit-tools shards verify /shards"""
    from beit_pretrain.tools.shards import verify

    raise typer.Exit(verify(root, workers))


@shards.command("show")
def shards_show(root: Annotated[str, typer.Argument(help="the folder of the shards")]) -> None:
    """What is in a set of shards and how it was written: beit-tools shards show /shards"""
    from beit_pretrain.tools.shards import show

    show(root)


tokens = typer.Typer(
    cls=Commands, help="Ids of a tokenizer, kept for pre-training (tokenizer.cache).", no_args_is_help=True
)
app.add_typer(tokens, name="tokens")


@tokens.command("build")
def tokens_build(overrides: Overrides = None) -> None:
    """Run the tokenizer ahead: beit-tools tokens build data.root=/images tokenizer.cache=/tokens tokenizer.views=4

    Give the overrides of the pre-training that is to use the ids. The same command goes on where it stopped.
    """
    from beit_pretrain.tools.tokens import build

    build(overrides or [])


@tokens.command("show")
def tokens_show(folder: Annotated[Path, typer.Argument(help="what tokenizer.cache names")]) -> None:
    """What caches of ids hold: beit-tools tokens show /tokens"""
    from beit_pretrain.tools.tokens import show

    show(folder.expanduser())
