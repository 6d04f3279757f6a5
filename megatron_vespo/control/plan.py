"""Everything about a run that can be known, and refused, before any process starts."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config import ConfigError, SftConfig, TrainConfig, TrainerConfig, to_toml
from megatron_vespo.data.environments import make_environment
from megatron_vespo.data.prompts import load_demonstrations, load_prompts, load_tokenizer
from megatron_vespo.rollout.server import command as engine_command
from megatron_vespo.trainer.hf_config import ModelShape, read_model_shape
from megatron_vespo.trainer.hf_weights import check_weights
from megatron_vespo.trainer.layout import check_layout, grid
from megatron_vespo.trainer.packing import padded_length
from megatron_vespo.trainer.reference import check_same_shape
from megatron_vespo.types import Environment, Prompt, TrainSequence

logger = logging.getLogger(__name__)

_NUM_CANARIES = 4
_ANY_PORT = 30000


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A checked configuration with the data it names."""

    cfg: TrainConfig
    shape: ModelShape
    prompts: Sequence[Prompt]
    heldout: Mapping[str, Sequence[Prompt]]
    """By the name of the set."""
    environment: Environment | None

    @property
    def canary(self) -> list[TrainSequence]:
        """Fixed prompts whose log-probs, first token excepted, confirm every weight push."""
        long_enough = [prompt for prompt in self.prompts if len(prompt.token_ids) > 1]
        return [
            TrainSequence(uid=f"canary {prompt.uid}", token_ids=prompt.token_ids, num_prompt_tokens=1)
            for prompt in long_enough[:_NUM_CANARIES]
        ]

    @property
    def records_experts(self) -> bool:
        return self.cfg.rollout.record_experts and self.shape.num_experts > 0


def plan_train(cfg: TrainConfig) -> TrainPlan:
    """Check everything that `train` will need.

    Raises:
        ConfigError: a file is missing or malformed, or the model cannot be divided over the layout.
    """
    _warn_of_replayed_choices(cfg)
    longest = cfg.prompts.max_prompt_tokens + cfg.sampling.max_response_tokens
    field = "prompts.max_prompt_tokens + sampling.max_response_tokens"
    shape = _checked_shape(cfg.model, cfg.trainer, longest, field)
    engine_command(
        cfg.rollout, cfg.model, port=_ANY_PORT
    )  # refuses what the server could not be started with
    if cfg.algorithm.kl_coeff and (reference := cfg.algorithm.kl_reference):
        check_same_shape(reference, shape)
        check_weights(reference, shape)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.prompts.train, tokenizer, cfg.prompts)
    columns = cfg.prompts.model_copy(update={"split": cfg.evaluation.split or cfg.prompts.split})
    heldout = {name: load_prompts(path, tokenizer, columns) for name, path in cfg.evaluation.sets.items()}
    environment = make_environment(cfg.environment, tokenizer)
    if all(len(prompt.token_ids) < 2 for prompt in prompts):
        raise ConfigError(
            f"prompts.train = '{cfg.prompts.train}': every prompt has one token, but weight pushes are confirmed on "
            "prompts of at least two; give longer ones"
        )
    return TrainPlan(cfg=cfg, shape=shape, prompts=prompts, heldout=heldout, environment=environment)


def _warn_of_replayed_choices(cfg: TrainConfig) -> None:
    if cfg.trainer.router_replay == "engine" and cfg.rollout.partial_rollouts == "retract":
        logger.warning(
            "rollout.partial_rollouts = 'retract': a response that a weight push interrupts carries the expert choices of the "
            "engine's second pass over its beginning, which trainer.router_replay = 'engine' then repeats; 'abort' keeps those "
            "of the first pass"
        )


def plan_sft(cfg: SftConfig) -> Sequence[TrainSequence]:
    """Check everything that `sft` will need; the tokenized demonstrations.

    Raises:
        ConfigError: as in `plan_train`.
    """
    _checked_shape(cfg.model, cfg.trainer, cfg.data.max_tokens, "data.max_tokens")
    return load_demonstrations(cfg.data.train, load_tokenizer(cfg.model), cfg.data)


def describe_train(cfg: TrainConfig) -> str:
    """What `train` would do, in words: resolved configuration, rank grid, process plan."""
    plan = plan_train(cfg)
    loop = cfg.loop
    in_flight = math.ceil(loop.oversampling * (loop.max_staleness + 1) * loop.prompts_per_step)
    processes = [
        _ranks_line(cfg.trainer),
        *_engine_lines(cfg),
        f"verifier {cfg.reward.verifier}: {cfg.reward.num_processes} at a time, each ended after {cfg.reward.timeout_s:g} s",
    ]
    heldout = ", ".join(f"{name} {len(prompts)}" for name, prompts in plan.heldout.items()) or "none"
    work = [
        f"{len(plan.prompts)} train prompts; held-out prompts: {heldout}",
        f"{loop.num_steps} steps of {loop.prompts_per_step} prompts x {loop.group_size} responses, "
        f"at most {in_flight} prompts in flight (staleness <= {loop.max_staleness})",
    ]
    return _sections(cfg, grid(cfg.trainer.layout, plan.shape), processes, work)


def describe_sft(cfg: SftConfig) -> str:
    """What `sft` would do, in words."""
    num = len(plan_sft(cfg))
    work = [f"{num} demonstrations", f"{cfg.num_steps} steps of {cfg.batch_size}"]
    shape = read_model_shape(cfg.model)
    return _sections(cfg, grid(cfg.trainer.layout, shape), [_ranks_line(cfg.trainer)], work)


def _checked_shape(model: Path, cfg: TrainerConfig, longest: int, field: str) -> ModelShape:
    """The model's shape, if it can be divided over the layout and hold sequences of `longest` tokens."""
    shape = read_model_shape(model)
    check_layout(cfg.layout, shape)
    check_weights(model, shape)
    if cfg.router_replay != "off" and not shape.num_experts:
        raise ConfigError(
            f"trainer.router_replay = '{cfg.router_replay}': the model is dense and has no routers; set it to 'off'"
        )
    for name, value in (("freeze_router", cfg.freeze_router), ("moe_aux_loss_coeff", cfg.moe_aux_loss_coeff)):
        if value and not shape.num_experts:
            raise ConfigError(f"trainer.{name} = {value}: the model is dense and has no routers; take it out")
    if cfg.moe_aux_loss_coeff:
        logger.warning(
            "trainer.moe_aux_loss_coeff = %g: a load-balancing loss is on, whose gradient is not the policy's; RL of MoE models "
            "is done without, as is the default 0",
            cfg.moe_aux_loss_coeff,
        )
    if cfg.megatron:
        from megatron_vespo.trainer.model import check_overrides  # imports megatron: seconds

        check_overrides(cfg)
    if longest > shape.max_positions:
        raise ConfigError(
            f"{field} = {longest}: '{model}' was made for at most {shape.max_positions} positions "
            "(max_position_embeddings); lower it"
        )
    padded = padded_length(longest, cfg.layout)
    if padded > cfg.max_tokens_per_microbatch:
        raise ConfigError(
            f"trainer.max_tokens_per_microbatch = {cfg.max_tokens_per_microbatch}: must hold the longest sequence, "
            f"{padded} padded tokens ({field} = {longest}), because sequences are never split; raise it"
        )
    return shape


def _engine_lines(cfg: TrainConfig) -> list[str]:
    rollout = cfg.rollout
    lines = [f"SGLang server of somebody else: {url}" for url in rollout.external]
    if not rollout.engines:
        return lines
    where = "one machine, loopback only" if cfg.trainer.ray_address == "local" else "anywhere in the cluster"
    gpus = f", {rollout.resolved_gpus_per_engine} GPU(s) each" if rollout.device == "cuda" else ""
    kind = f"{rollout.engines} SGLang server(s) as Ray actors ({rollout.placement}{gpus}; {where}), on free ports:"
    return [kind, f"  {_shell_line(cfg)}", *lines]


def _shell_line(cfg: TrainConfig) -> str:
    argv, env = engine_command(cfg.rollout, cfg.model, port=cfg.rollout.port or _ANY_PORT, seed=cfg.seed)
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in env.items()), shlex.join(argv)])


def _ranks_line(cfg: TrainerConfig) -> str:
    backend = "NCCL, one GPU each" if cfg.device == "cuda" else "gloo, CPU"
    return f"{cfg.layout.world_size} Megatron-Core rank(s) as Ray actors ({backend})"


def _sections(
    cfg: TrainConfig | SftConfig, rank_grid: str, processes: Sequence[str], work: Sequence[str]
) -> str:
    return "\n".join([
        "# resolved configuration", to_toml(cfg),
        "# rank grid", rank_grid, "",
        "# processes", *processes, "",
        "# work", *work,
    ])  # fmt: skip
