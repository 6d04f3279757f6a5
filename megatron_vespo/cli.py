"""The front door: one command per thing a person does; each is one call into the rooms below."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from megatron_vespo.config import ConfigError, SftConfig, TrainConfig, load_config
from megatron_vespo.types import Interrupted, RunError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, e.g. configs/demo.toml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. loop.max_staleness=0"),
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="auto|STEP",
        help="Continue the run that run_dir holds: at its newest checkpoint (a run is started where there is none), or "
        "at that of one step.",
    ),
]
DryRun = Annotated[bool, typer.Option(help="Print configuration, rank grid and process plan; start nothing.")]


@app.command()
def train(
    config: ConfigPath, overrides: Overrides = None, resume: Resume = None, dry_run: DryRun = False
) -> None:
    """Train with asynchronous off-policy reinforcement learning."""
    cfg = load_config(TrainConfig, config, overrides or ())
    from megatron_vespo.control import plan, run  # torch and ray: slow to import, needless for --help
    from megatron_vespo.diagnose.report import write_report

    if dry_run:
        _print(plan.describe_train(cfg))
    else:
        run.train(cfg, resume=_resume(resume), report=write_report)


@app.command()
def sft(
    config: ConfigPath, overrides: Overrides = None, resume: Resume = None, dry_run: DryRun = False
) -> None:
    """Fine-tune on demonstrations, with the same trainer."""
    cfg = load_config(SftConfig, config, overrides or ())
    from megatron_vespo.control import finetune, plan
    from megatron_vespo.diagnose.report import write_report

    if dry_run:
        _print(plan.describe_sft(cfg))
    else:
        finetune.finetune(cfg, resume=_resume(resume), report=write_report)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="Kind of GPU: a100-80gb, h100-80gb, h200-141gb, b200-192gb.")
    ] = "h100-80gb",
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    mean_response_tokens: Annotated[
        float | None, typer.Option(help="For the time; default: every response has the greatest length.")
    ] = None,
    peak_share: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of the GPU's peak reached while it computes.")
    ] = None,
    shape: Annotated[
        Path | None, typer.Option(help="config.json (or its directory) where the model is not at hand.")
    ] = None,
) -> None:
    """Print what the trainer needs of its GPUs, memory and time, before they are booked; status 2 where it cannot fit."""
    from megatron_vespo.control import capacity

    needs = capacity.read_capacity(
        capacity.load_either(config, overrides or ()),
        machines=capacity.find_machines(gpu, gpus_per_node, peak_share),
        shape=shape,
        mean_response_tokens=mean_response_tokens,
    )
    _print(capacity.describe(needs) + "\n")
    _print(capacity.verdict(needs))


@app.command("eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the numbers; default: eval.json in run_dir.")
    ] = None,
) -> None:
    """Sample the held-out sets with the configured model and print avg@k and pass@k of each."""
    cfg = load_config(TrainConfig, config, overrides or ())
    from megatron_vespo.control import run

    sets = run.evaluate(cfg, cfg.run_dir / "logs" / "eval")
    for one in sets:
        _print(one.describe())
    file = output or cfg.run_dir / "eval.json"
    rewards = {one.name: dict(zip(one.uids, one.reward.tolist(), strict=True)) for one in sets}
    metrics = {key: value for one in sets for key, value in one.metrics().items()}
    file.write_text(json.dumps({"model": str(cfg.model), "metrics": metrics, "rewards": rewards}) + "\n")
    _print(f"wrote {file}")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory, finished or not.")]) -> None:
    """Write RUN_DIR/report.html from the run's own files."""
    from megatron_vespo.diagnose.report import write_report

    _print(f"wrote {write_report(run_dir)}")


@app.command()
def demo_inputs(
    directory: Annotated[
        Path, typer.Argument(help="Where to write them; existing other files are never replaced.")
    ],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the demo's tiny Qwen3 models, arithmetic prompts and demonstrations."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_vespo.data.demo import write_demo_inputs

    disable_progress_bar()
    _print(f"wrote {write_demo_inputs(directory, seed)}")


doctor = typer.Typer(no_args_is_help=True, help="Engine mismatch and router divergence, explained.")
app.add_typer(doctor, name="doctor")


@doctor.command()
def probe(  # noqa: PLR0913 - one argument an option
    engine: Annotated[str, typer.Option(help="http://host:port of a stock SGLang server.")],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Of the weights that it serves: a Hugging Face directory, RUN/checkpoints/step_NNNNNN, or Megatron-Core's "
            "(torch_dist)."
        ),
    ],
    prompts: Annotated[
        Path, typer.Option(help='jsonl or parquet (or a dataset) with a column "prompt" or "messages".')
    ],
    output: Annotated[Path, typer.Option(help="Directory for evidence and logs.")] = Path("probe"),
    num: Annotated[int, typer.Option(min=1, help="Responses; prompts are taken in turn.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a response.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    model_shape: Annotated[
        Path | None,
        typer.Option(help="Hugging Face directory of the model, where the checkpoint names no architecture."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Of a training run, whose [trainer] scores; default: one rank, on the GPU if there is one."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Have an engine and a trainer say what they think of the same tokens, and explain the difference."""
    if overrides and config is None:
        raise ConfigError(f"{overrides[0]}: overrides a --config, and there is none; give one")
    trainer = load_config(TrainConfig, config, overrides or ()).trainer if config else None
    from megatron_vespo.control.probe import Probe
    from megatron_vespo.control.probe import probe as run

    asked = Probe(
        engine=engine,
        checkpoint=checkpoint,
        prompts=prompts,
        output=output,
        num=num,
        max_tokens=max_tokens,
        temperature=temperature,
        model_shape=model_shape,
        trainer=trainer,
    )
    written = run(asked, _print)
    _print(f"wrote {written}\n")
    _examine([written], None, None, output / "report.html", as_json=False, fail_on=None)


Evidences = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH...",
        help="Run directories, evidence or rollout files, or another framework's parquet dump.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="OURS=THEIRS,...", help="What the dump calls a column, e.g. behavior_logp=old_logp."
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Response tokens to read, about; evenly spaced sequences.")
]


@doctor.command("report")
def doctor_report(
    paths: Evidences,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; default: none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    fail_on: Annotated[
        str | None,
        typer.Option(metavar="warn|broken", help="Exit status 1 warn, 2 broken, 3 insufficient data."),
    ] = None,
    columns: Columns = None,
    limit: Limit = 1_000_000,
) -> None:
    """Judge what trainer and engine said about the same tokens: verdicts, causes, next steps."""
    _examine(paths, columns, limit, output, as_json=as_json, fail_on=fail_on)


@doctor.command("check-routes")
def check_routes(paths: Evidences, columns: Columns = None, limit: Limit = 1_000_000) -> None:
    """Test the record of expert choices alone; exit status 2 where a test fails."""
    from megatron_vespo.diagnose import doctor as ours

    is_sound, text = ours.check_structure(ours.read(paths, _columns(columns), limit))
    _print(text)
    if not is_sound:
        sys.exit(2)


@doctor.command("compare")
def doctor_compare(before: Path, after: Path, columns: Columns = None, limit: Limit = 1_000_000) -> None:
    """Say which part of the gap moved from one run (or dump) to another, with bootstrap intervals."""
    from megatron_vespo.diagnose import doctor as ours

    one, other = (ours.judge(ours.read([path], _columns(columns), limit)) for path in (before, after))
    _print(ours.compare(one, other))


@doctor.command("explain")
def doctor_explain(
    metric: Annotated[str | None, typer.Argument(help="Default: list all.")] = None,
) -> None:
    """Define a metric: formula, bounds, their source, what to do."""
    from megatron_vespo.algo.norms import NORMS, explain

    if metric is None:
        _print("\n".join(f"{name:36s} {norm.meaning}" for name, norm in NORMS.items()))
        return
    try:
        _print(explain(metric))
    except KeyError as err:
        raise ConfigError(str(err.args[0])) from None


def _examine(
    paths: list[Path],
    columns: str | None,
    limit: int | None,
    output: Path | None,
    *,
    as_json: bool,
    fail_on: str | None,
) -> None:
    if fail_on not in (None, "warn", "broken"):
        raise ConfigError(
            f"--fail-on {fail_on}: expected warn or broken; leave it out to always end with status 0"
        )
    from megatron_vespo.diagnose import doctor as ours

    diagnosis = ours.judge(ours.read(paths, _columns(columns), limit))
    _print(json.dumps(ours.to_json(diagnosis)) if as_json else ours.describe(diagnosis))
    if output is not None:
        from megatron_vespo.diagnose.doctor_page import write_page

        write_page(diagnosis, output)
        if not as_json:
            _print(f"\nwrote {output}")
    if status := ours.exit_status(diagnosis.level, fail_on):  # pyright: ignore[reportArgumentType] - checked above
        sys.exit(status)


def _columns(text: str | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for ours, sign, theirs in pairs:
        if not (ours and sign and theirs):
            raise ConfigError(
                f"--columns {text}: expected OURS=THEIRS,...; e.g. behavior_logp=rollout_log_probs"
            )
    return {ours: theirs for ours, _, theirs in pairs}


def main() -> None:
    """Exit status: 0 done, 2 the configuration is wrong, 1 the run failed, 130 interrupted."""
    try:
        app()
    except ConfigError as err:
        _fail("ConfigError", str(err), 2)
    except RunError as err:
        _fail("RunError", str(err), 1)
    except Interrupted as err:
        _fail("Interrupted", str(err), 130)


def _resume(text: str | None) -> Literal["auto"] | int | None:
    if text is None or text == "auto":
        return text
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"--resume {text}: expected auto, or the step of a checkpoint; e.g. --resume 40")
    return int(text)


def _print(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


def _fail(kind: str, message: str, status: int) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"{kind}: {message}", style="red", markup=False
    )
    sys.exit(status)


if __name__ == "__main__":
    main()
