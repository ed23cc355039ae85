"""Commands for trained models: `sfd export`, `import`, `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sfd_scale import config
from sfd_scale.launch.command_line import Overrides

app = typer.Typer()
# The names of `diffusion.samplers.Solver`, which imports torch; a test compares them.
SolverName = Literal["euler", "midpoint", "heun2", "heun3", "rk4", "ab2", "ab3", "exp_ab2", "exp_ab3", "dopri5"]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder or one of its checkpoints; for .pt also an exported file.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write: .safetensors, or .pt in the format of the official code.")
    ] = None,
    hub_folder: Annotated[
        Path | None, typer.Option(help="Instead of --out: a folder for the Hugging Face hub, with a model card.")
    ] = None,
    license: Annotated[  # noqa: A002
        str | None, typer.Option(help="With --hub-folder: the licence of the weights, such as apache-2.0.")
    ] = None,
    weights: Annotated[Literal["ema", "params"], typer.Option(help="ema or params.")] = "ema",
    step: Annotated[int | None, typer.Option(help="The step of the checkpoint; default: the newest.")] = None,
    initial: Annotated[bool, typer.Option("--initial", help="Export the initial weights, before training.")] = False,
    ema_length: Annotated[
        float | None,
        typer.Option(help="Post-hoc EMA of this relative standard deviation; needs ema.lengths."),
    ] = None,
) -> None:
    """Export the EMA weights of a run as safetensors, with the recipe and statistics that sampling needs.

    With --out FILE.pt, write a file for the official code: weights, EMA weights and Adam's moments.
    """
    from sfd_scale import hub, official
    from sfd_scale.export import WeightsChoice
    from sfd_scale.export import export as export_run

    choice = WeightsChoice(weights=weights, step=step, initial=initial, ema_length=ema_length)
    if (out is None) == (hub_folder is None):
        raise ValueError("--out: a file to write, or --hub-folder in its place; give one of the two")
    if hub_folder is not None:
        hub.write_folder(run, hub_folder, choice, license)
    elif out is not None and out.suffix == ".pt":
        if weights != "ema" or initial or ema_length is not None:
            raise ValueError("--weights, --initial, --ema-length: not for .pt, which holds what the run has")
        official.export_official(run, out, step)
    elif out is not None:
        export_run(run, out, choice)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the official code (.pt).")],
    recipe: Annotated[str | None, typer.Argument(help="Its training recipe; default: SFD of its size.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The safetensors file to write, for evaluation.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run folder to create; `sfd train` resumes from it.")] = None,
    stats: Annotated[
        list[Path] | None,
        typer.Option(
            help="Latent statistics: the official latents_stats.pt and latents_sv_stats.pt, or one .safetensors."
        ),
    ] = None,
    weights: Annotated[Literal["ema", "params"], typer.Option(help="ema or params, for --out.")] = "ema",
) -> None:
    """Import a checkpoint of the official code, without executing its pickle: as weights, or as a run to resume."""
    from sfd_scale import official

    if recipe is not None and config.is_override(recipe):  # an override; no recipe was named
        overrides, recipe = [recipe, *(overrides or ())], None
    if (out is None) == (run is None):
        raise ValueError("--out or --run: give one of them: a file for the weights, or a run folder to resume from")
    loaded = official.recipe_for(file, recipe, overrides or ())
    if out is not None:
        official.import_weights(file, out, loaded, stats=stats or (), weights=weights)
    else:
        assert run is not None
        official.import_run(file, run, loaded, stats=stats or ())


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A file of `sfd export`, or a folder of `--hub-folder`.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    count: Annotated[
        int | None, typer.Option(min=1, help="How many images; default: 16, and 3 with --over-time.")
    ] = None,
    label: Annotated[int | None, typer.Option(help="A class index; default: all classes in turn.")] = None,
    guidance: Annotated[
        str,
        typer.Option(
            help="Scale of classifier-free guidance, or of AutoGuidance with --guide; 1 is none. Two numbers, as in "
            "1.5,2.5, are for texture and for semantics."
        ),
    ] = "1",
    guide: Annotated[
        Path | None, typer.Option(help="The guidance model (AutoGuidance), a file of `sfd export`.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the solver.")] = 50,
    solver: Annotated[
        SolverName,
        typer.Option(help="dopri5 chooses its own steps. ab2 and ab3 (Adams-Bashforth) need one evaluation a step."),
    ] = "euler",
    grid: Annotated[
        int | None, typer.Option(min=1, help="Columns of the grid; default: a square, and 8 with --over-time.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    over_time: Annotated[
        bool, typer.Option("--over-time", help="Draw how semantics and texture form: two rows per image, by Euler.")
    ] = False,
) -> None:
    """Draw a grid of images from an exported checkpoint."""
    scale = _scale(guidance)
    from sfd_scale.sample import load, sample_grid

    if not over_time:
        sample_grid(
            checkpoint, out, count=count or 16, label=label, steps=steps, seed=seed, guidance=scale, guide=guide,
            solver=solver, columns=grid,
        )  # fmt: skip
        return
    if solver != "euler":
        raise ValueError(f"--solver: {solver}; allowed with --over-time: euler")
    from sfd_scale.commands.over_time import over_time as draw

    pipeline = load(checkpoint, guide=guide)
    labels = pipeline.labels(label, count or 3)
    draw(
        pipeline, out, labels=labels.tolist(), columns=grid or 8, steps=steps, seed=seed,
        guidance=pipeline.guidance_of(scale),
    )  # fmt: skip


def _scale(text: str) -> float | tuple[float, float]:
    """A guidance scale, or two: for texture and for semantics."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers
    raise ValueError(f"--guidance: {text}; allowed: a number, or two as in 1.5,2.5 (texture, semantics)")
