"""Supervised fine-tuning, with the trainer of reinforcement learning."""

from __future__ import annotations

from dataclasses import asdict

from megatron_vespo.config import SftConfig
from megatron_vespo.control import session
from megatron_vespo.control.actors import PolicySpec, TrainerGroup
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.cluster import Cluster
from megatron_vespo.control.desk import Desk, Report, finish, is_complete, open_desk
from megatron_vespo.control.measurements import optimizer_metrics
from megatron_vespo.control.plan import plan_sft
from megatron_vespo.control.progress import Progress, Resume, ledger_of, name_of_stream, rescue, start_of
from megatron_vespo.data.stream import EpochStream
from megatron_vespo.metrics import LiveView
from megatron_vespo.types import TrainSequence


def finetune(cfg: SftConfig, *, resume: Resume | None, report: Report) -> None:
    """Run `megatron-vespo sft` to its end."""
    demonstrations = plan_sft(cfg)
    stream = name_of_stream("sft", cfg.seed, cfg.data.shuffle, (sequence.uid for sequence in demonstrations))
    start = start_of(cfg.run_dir, stream, resume=resume)
    if not is_complete(cfg.run_dir, start, cfg.num_steps):
        deck = EpochStream(demonstrations, cfg.seed, cfg.data.shuffle, ledger_of(start, len(demonstrations)))
        view = LiveView(f"sft {cfg.run_dir}", cfg.num_steps)
        with open_desk(cfg, start, view, report, resume=resume is not None) as desk:
            session.run(lambda stop: _finetune(cfg, deck, start, desk, stop), desk.tell)


async def _finetune(
    cfg: SftConfig, deck: EpochStream[TrainSequence], start: Progress, desk: Desk, stop: session.Stop
) -> None:
    desk.tell("starting the trainer's ranks")
    version, ordinals = start.version, list[int]()

    def progress_at(reached: int) -> Progress:
        """Of the last step, or with the one in progress."""
        if reached > version:
            deck.done(ordinals, "trained")
        return Progress(stream=start.stream, version=reached, ledger=deck.ledger.state())

    async with (
        Cluster(cfg.trainer, None) as cluster,
        TrainerGroup(
            cluster, PolicySpec.of(cfg), desk.run, version=version, records_experts=False
        ) as trainer,
    ):
        stop.gently = lambda: None  # looked at between steps
        try:
            while version < cfg.num_steps and not stop.requested:
                clock = StepClock(version + 1, cfg.step_timeout_s, "step_timeout_s")
                ordinals, batch = deck.take(cfg.batch_size)
                output = await clock.lap("train", trainer.step(batch))
                deck.done(ordinals, "trained")
                version += 1
                record = desk.log.log(version, {
                    **optimizer_metrics(output),
                    "time/step_s": clock.elapsed_s,
                    "throughput/tokens_per_s": sum(len(s.token_ids) for s in batch) / clock.elapsed_s,
                })  # fmt: skip
                if version % cfg.log_every == 0 or version == cfg.num_steps:
                    desk.view.step(record)
                if cfg.save_every and version % cfg.save_every == 0:
                    await trainer.save(version, asdict(progress_at(version)))
        except Exception:
            await rescue(trainer, version, progress_at, desk.tell)
            raise
        await finish(trainer, progress_at(version), cfg.num_steps, desk)
