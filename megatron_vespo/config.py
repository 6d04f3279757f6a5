"""The typed configuration: one TOML file per run, dotted overrides on the command line.

A default is stated once, here.  Unknown keys, wrong types and impossible values are refused before any
process starts, in the form `<what = value>: <expected, why>; <what to do>`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """The person who wrote the configuration can mend this."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class LayoutConfig(_Section):
    """The rank grid of the trainer; data * tensor * context * pipeline ranks."""

    tensor: Positive = 1
    context: Positive = 1
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1
    """Model chunks of each pipeline rank, scheduled interleaved (1F1B): smaller bubble, more messages."""
    first_stage_layers: Positive | None = None
    """Layers of the first pipeline stage, where stages are to be uneven (the embedding weighs on it)."""
    last_stage_layers: Positive | None = None
    """Layers of the last pipeline stage, where stages are to be uneven (the LM head weighs on it)."""
    data: Positive = 1
    expert: Positive = 1
    """Ranks over which a layer's experts are divided; taken out of data * context * tensor."""
    expert_tensor: Positive | None = None
    """Ranks over which one expert is divided. Default: 1 where expert > 1, else `tensor`."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def resolved_expert_tensor(self) -> int:
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    @model_validator(mode="after")
    def _expert_gradients_are_right(self) -> LayoutConfig:
        if self.expert == 1 and self.resolved_expert_tensor != self.tensor:
            raise ValueError(
                f"expert_tensor = {self.expert_tensor}: must equal tensor ({self.tensor}) where expert = 1, "
                "because Megatron-Core 0.16 computes wrong expert gradients otherwise; "
                "leave expert_tensor out, or set expert > 1"
            )
        return self


class OptimizerConfig(_Section):
    """Adam, and what bounds its step."""

    learning_rate: PositiveFloat
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegative = 0.01
    clip_grad_norm: PositiveFloat = 1.0
    warmup_steps: Count = 0
    """Updates over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up; the last two fall to `min_learning_rate` at `decay_steps`."""
    decay_steps: Count = 0
    """Update, counted from the first one, at which `min_learning_rate` is reached; it stays there."""
    min_learning_rate: NotNegative = 0.0
    distributed: bool = True
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap: bool = False
    """Reduce gradients and gather updated weights while the passes run (needs `distributed`)."""
    cpu_offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the optimizer state that lives, and is updated, in host memory (needs device = "cuda", dtype = "bfloat16"
    and `distributed`)."""

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> OptimizerConfig:
        if (self.schedule != "constant") != (self.decay_steps > 0):
            raise ValueError(
                f"decay_steps = {self.decay_steps}: schedule = '{self.schedule}' needs "
                f"{'none, it never decays' if self.schedule == 'constant' else 'the update at which it ends'}; "
                "set both, or neither"
            )
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps = {self.decay_steps}: must be above warmup_steps = {self.warmup_steps}, because the decay "
                "begins where the warm-up ends; raise it"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate}: must not exceed learning_rate = {self.learning_rate}; lower it"
            )
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate}: is never reached with schedule = 'constant'; set a schedule that "
                "decays, or take it out"
            )
        if self.overlap and not self.distributed:
            raise ValueError(
                "overlap = true: needs distributed = true, whose buckets it overlaps; set it, or take overlap out"
            )
        return self


class TrainerConfig(_Section):
    """The Megatron-Core ranks."""

    device: Literal["cpu", "cuda"] = "cuda"
    """"cpu" adapts Megatron-Core to gloo ranks without CUDA; never chosen silently."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; "auto" takes Transformer Engine on CUDA where it is installed."""
    layout: LayoutConfig = LayoutConfig()
    optimizer: OptimizerConfig
    token_dispatcher: Literal["auto", "alltoall", "allgather", "flex"] = "auto"
    """How tokens travel to their experts; "auto" is alltoall (allgather on CPU where one expert is divided);
    "flex" is DeepEP, and needs Transformer Engine and the package deep_ep."""
    max_tokens_per_microbatch: Positive = 16384
    """Packed tokens that the ranks of one context group hold together in one forward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, of attention and expert layers' insides, or of every layer."""
    freeze_router: bool = False
    """Leave the routers' weights as they are."""
    moe_aux_loss_coeff: NotNegative = 0.0
    """Load-balancing loss; 0 is right for RL, where it fights the reward."""
    router_replay: Literal["off", "trainer", "engine"] = "off"
    """Which expert choices the training passes repeat: none; those of the trainer's own log-prob pass on the weights at
    the start of the batch (R2); or those that the engine recorded while it sampled (R3)."""
    keep_checkpoints: Positive = 2
    """The newest ones that are kept."""
    keep_every: Count = 0
    """Checkpoints whose step this divides are kept for ever; 0: none."""
    async_save: bool = True
    """Write checkpoints while training goes on; only the copy to host memory is waited for."""
    logprob_chunk_tokens: Positive = 256
    """Tokens whose full-vocabulary logits exist at one time."""
    logprob_top_k: Count = 0
    """Also log the probability mass of this many most likely tokens; 0: not computed."""
    collective_timeout_s: Seconds = 600
    ray_address: str = "local"
    """"local" starts a Ray of our own on this machine; "auto" or host:port joins a running cluster."""
    call_timeout_s: Seconds = 1800
    """Longest wait for all ranks to start, load, save, export or push; a training step has a limit of its own."""
    placement_timeout_s: Seconds = 600
    """Longest wait for the cluster to have room for all ranks."""
    megatron: dict[str, Any] = {}
    """Verbatim fields of Megatron-Core's TransformerConfig; what the layout, the model or the loss decides is refused."""

    @model_validator(mode="after")
    def _state_can_be_offloaded(self) -> TrainerConfig:
        if self.optimizer.cpu_offload and not (self.optimizer.distributed and self.dtype == "bfloat16"):
            raise ValueError(
                f"optimizer.cpu_offload = {self.optimizer.cpu_offload:g}: Megatron-Core offloads the master weights of its "
                f"distributed optimizer in bfloat16 alone, and this run has distributed = {str(self.optimizer.distributed).lower()}, "
                f"dtype = '{self.dtype}'; set both, or take it out"
            )
        return self

    @model_validator(mode="after")
    def _cpu_can_do_it(self) -> TrainerConfig:
        if self.device != "cpu":
            return self
        for name in ("implementation", "token_dispatcher"):
            if (value := getattr(self, name)) in ("transformer_engine", "flex"):
                raise ValueError(f"{name} = '{value}': needs device = 'cuda'; leave it out")
        divided = self.layout.expert > 1 and self.layout.resolved_expert_tensor > 1
        if divided and self.token_dispatcher == "alltoall":
            raise ValueError(
                f"token_dispatcher = 'alltoall': with device = 'cpu' and experts divided over {self.layout.expert} x "
                f"{self.layout.resolved_expert_tensor} ranks it needs an all-gather of unequal parts, which gloo does not "
                "have; leave it out, or set layout.expert_tensor = 1"
            )
        if self.optimizer.cpu_offload:
            raise ValueError(
                f"optimizer.cpu_offload = {self.optimizer.cpu_offload:g}: the optimizer state is in host memory already with "
                "device = 'cpu'; take it out"
            )
        return self


class RolloutConfig(_Section):
    """The SGLang engines."""

    device: Literal["cpu", "cuda"] = "cuda"
    """"cpu" starts the stock server with this project's plain-PyTorch platform plugin."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    python: Path | None = None
    """Interpreter that runs `sglang.launch_server`; default: the one that runs this program."""
    engines: Count = 1
    """Servers that this run starts, watches and restarts."""
    external: tuple[str, ...] = ()
    """http://host:port of servers that somebody else started from the same model: used, but never started or ended."""
    placement: Literal["apart", "colocated"] = "apart"
    """GPUs of the engines: their own, or those of the trainer's ranks (both then hold their memory all the time)."""
    tensor_parallel: Positive = 1
    gpus_per_engine: Positive | None = None
    """Default: tensor_parallel. Above it where `sglang` sets pp_size."""
    context_length: Positive = 32768
    """Longest prompt + response, tokens."""
    max_running_requests: Positive = 256
    """Of each engine; admission adapts below this to queues and retractions."""
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Of the only engine; default: free ones."""
    record_experts: bool = True
    """Ask the engines for the experts of every token (MoE models only)."""
    partial_rollouts: Literal["abort", "retract", "in_place"] = "abort"
    """What a weight push does to responses under way, all of which continue with what was sampled so far (docs/rollouts.md).
    "abort": the engine gives them back and they are sent again with their prefix, experts of the first pass kept;
    "retract": the engine computes their prefix again itself, which replaces the recorded experts;
    "in_place": their key-value cache of the old weights is kept, so later tokens mix both."""
    start_timeout_s: Seconds = 600
    request_timeout_s: Seconds = 1800
    """Longest wait for one answer of an engine that makes progress."""
    stall_timeout_s: Seconds = 120
    """An engine with requests under way and no new token for so long hangs: its work goes elsewhere, it is restarted."""
    max_restarts: Count = 5
    """Restarts of one engine in a row without its having served in between; then it is given up."""
    sync_timeout_s: Seconds = 300
    sync_transport: Literal["auto", "broadcast", "shared_memory", "disk"] = "auto"
    """How weights travel: one broadcast for all engines ("auto"); memory of rank 0's machine, for engines on it; or files
    in `sync_directory`, which every engine must see."""
    sync_directory: Path | None = None
    sync_bucket_bytes: Positive = 512 * 1024**2
    sync_staging_bytes: Count = 64 * 1024**3
    """Host memory of rank 0 in which weights are gathered while the engines still generate; what does not fit is gathered
    while they pause."""
    sync_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Of the broadcast; "auto" is gloo on CPU, else NCCL, which needs trainer and engine on different GPUs."""
    canary_tolerance: PositiveFloat = 0.5
    """Largest |trainer logp - engine logp| on the canary that confirms a weight push, nats."""
    sglang: dict[str, Any] = {}
    """Verbatim `sglang.launch_server` options, without the leading dashes; what a field above decides is refused."""

    @model_validator(mode="after")
    def _there_are_engines(self) -> RolloutConfig:
        if not self.engines and not self.external:
            raise ValueError("engines = 0: nobody would sample; raise it, or name `external` servers")
        if self.port is not None and self.engines != 1:
            raise ValueError(
                f"port = {self.port}: is one port, and engines = {self.engines}; leave it out to get free ones"
            )
        for url in self.external:
            if not url.startswith("http://"):
                raise ValueError(f"external = '{url}': expected http://host:port; mend it")
        if len(set(self.external)) < len(self.external):
            raise ValueError("external: names one server twice; name each once")
        return self

    @model_validator(mode="after")
    def _transport_is_complete(self) -> RolloutConfig:
        if (self.sync_transport == "disk") != (self.sync_directory is not None):
            raise ValueError(
                f"sync_directory = {self.sync_directory}: goes with sync_transport = 'disk' and nothing else; set both, or "
                "neither"
            )
        if self.sync_transport == "shared_memory" and self.external:
            raise ValueError(
                "sync_transport = 'shared_memory': reaches engines of this machine only, and `external` ones may be "
                "elsewhere; choose another"
            )
        return self

    @property
    def resolved_gpus_per_engine(self) -> int:
        return self.gpus_per_engine or self.tensor_parallel


class SamplingConfig(_Section):
    """From what is trained on: the whole distribution (no top-p, no top-k), or log-probs would be of another one."""

    temperature: PositiveFloat = 1.0
    max_response_tokens: Positive


class PromptsConfig(_Section):
    """Prompts: parquet or jsonl, one prompt a row, or the directory of a Hugging Face dataset (cloned, or save_to_disk).

    The default columns are those of DAPO-Math; a dot goes into a struct.
    """

    train: Path
    split: str = "train"
    """Of a dataset directory with several."""
    prompt_column: str = "prompt"
    """A list of {role, content}, or a text, which becomes the user's message."""
    answer_column: str = "reward_model.ground_truth"
    uid_column: str = "extra_info.index"
    """Unique names; "" numbers the rows."""
    max_prompt_tokens: Positive
    on_long_prompt: Literal["error", "skip"] = "error"
    shuffle: bool = True


class RewardConfig(_Section):
    """How a response is judged."""

    verifier: Literal["math_verify", "exact_match", "function", "http"] = "math_verify"
    """"exact_match": what stands in the last \\boxed{}, or the whole text, equals the answer;
    "function": a Python function of (prompt, response, answer) -> number, sync or async;
    "http": a server that is posted {"uid", "prompt", "response", "answer"} and answers {"reward": number}."""
    function: str | None = None
    """"package.module:name", or "path/to/file.py:name"."""
    url: str | None = None
    timeout_s: Seconds = 5
    """A response whose verification takes longer gets `failure_reward` and is counted."""
    failure_reward: float = 0.0
    """Of a response that could not be judged: deadline, crash, refusal."""
    num_processes: Positive = 1
    """Workers, each judging one response at a time; of "http", requests at a time."""
    overlong_tokens: Count = 0
    """DAPO's soft overlong punishment begins so many tokens below sampling.max_response_tokens; 0: none."""
    overlong_penalty: NotNegative = 1.0
    """Taken off the reward of a response of the greatest length; grows linearly from 0."""

    @model_validator(mode="after")
    def _verifier_is_complete(self) -> RewardConfig:
        for field, verifier in (("function", "function"), ("url", "http")):
            if (getattr(self, field) is not None) != (self.verifier == verifier):
                raise ValueError(
                    f"{field} = {getattr(self, field)!r}: goes with verifier = '{verifier}' and nothing else, and verifier = "
                    f"'{self.verifier}'; set both, or neither"
                )
        return self


class EnvironmentConfig(_Section):
    """The other side of conversations of several turns; without it a response is one turn."""

    name: str | None = None
    """"calculator", or "package.module:Class" or "path/to/file.py:Class" of an Environment (types.py)."""
    max_turns: Positive = 8
    """Turns of the assistant; the token limit of sampling is for all of them together."""
    timeout_s: Seconds = 60
    """A reply that takes longer ends the conversation and is counted."""


class EvaluationConfig(_Section):
    """Held-out sets, sampled on the same engines."""

    sets: dict[str, Path] = {}
    """Files in the layout of [prompts], by the name under which they are reported."""
    split: str | None = None
    """Of a dataset directory with several. Default: prompts.split."""
    every: Count = 0
    """Steps between evaluations; 0: at the start and the end only."""
    samples: Positive = 1
    """Responses per prompt: the k of avg@k and pass@k."""
    temperature: PositiveFloat | None = None
    """Default: sampling.temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_response_tokens: Positive | None = None
    """Default: sampling.max_response_tokens."""
    waits: bool = True
    """Whether training waits for an evaluation, which is then of one version; else it goes on, and the versions are reported."""


Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(gt=0, lt=1)]
AtLeastOne = Annotated[float, Field(ge=1)]
AboveOne = Annotated[float, Field(gt=1)]


class VespoConfig(_Section):
    """phi(W) = W^k exp(lam (1 - W)); pairs are (A >= 0, A < 0).  What follows `lam` is beyond the paper, and off."""

    k: tuple[NotNegative, NotNegative] = (2.0, 3.0)
    lam: tuple[PositiveFloat, PositiveFloat] = (3.0, 2.0)
    """Above 0, or phi would not be bounded.  k = lam + 1 is the family that is unbiased to first order."""
    length_exponent: Fraction = 0.0
    """The kernel takes log W / T^e: 0 is the paper's W, 0.5 and 1 its two ablations."""
    budget: PositiveFloat | None = None
    """C: lam is solved anew for every update and sign, so that E_Q[W] <= C (algo/kernel.py), in place of `lam`; costs a forward
    pass."""
    ess_target: BelowOne | None = None
    """phi^s with the greatest s in [0.1, 1] for which the effective sample size of the update is this share of its sequences;
    costs a forward pass."""
    noise_aware: bool = False
    """Take the engine's own noise out of log W before the kernel sees it (reference = "behavior"); it is measured on each batch
    that both engines score, and on the canary before the first."""

    @model_validator(mode="after")
    def _one_thing_is_adapted(self) -> VespoConfig:
        if self.budget is not None and self.ess_target is not None:
            raise ValueError(
                f"ess_target = {self.ess_target:g}: tempers the kernel whose lam budget = {self.budget:g} solves for; choose one"
            )
        return self


class GrpoConfig(_Section):
    """Token ratio with clip-higher (DAPO's values) and dual clip."""

    clip: tuple[BelowOne, PositiveFloat] = (0.2, 0.28)
    """The ratio counts from 1 - clip[0] where A < 0, and up to 1 + clip[1] where A > 0."""
    dual_clip: AboveOne = 3.0
    """Where A < 0 the ratio counts up to here; a great number switches it off."""


class GspoConfig(_Section):
    """Geometric mean of the token ratios, clipped."""

    clip: tuple[BelowOne, PositiveFloat] = (3e-4, 4e-4)
    """Of W^(1/T): meant for T of thousands of tokens."""


class SapoConfig(_Section):
    """Sigmoid gate on the token ratio."""

    tau: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.05)
    """Sharpness of the gate for (A > 0, A <= 0)."""


class CispoConfig(_Section):
    """Token ratio, truncated."""

    max_ratio: AtLeastOne = 1.28
    """MiniMax-M1 names no value; DAPO's clip-higher is meant here, ScaleRL uses 4 to 6."""


class TisConfig(_Section):
    """Whole-sequence W, truncated."""

    max_weight: AtLeastOne = 2.0


class MisConfig(_Section):
    """Whole-sequence W within a band, else nothing."""

    band: tuple[BelowOne, AboveOne] = (0.5, 2.0)


class BapoConfig(_Section):
    """GRPO's surrogate with bounds that move until positive samples have their share (values of the released script)."""

    low: tuple[BelowOne, BelowOne] = (0.8, 0.95)
    """First and last lower bound of the ratio."""
    high: tuple[AboveOne, AboveOne] = (1.2, 2.0)
    """First and last upper bound."""
    step: PositiveFloat = 0.05
    min_positive: PositiveFloat = 0.5
    """Least quotient of the surrogates of positive and negative samples; raising the lower bound is tried first."""
    dual_clip: AboveOne = 3.0

    @model_validator(mode="after")
    def _bounds_open(self) -> BapoConfig:
        for name, (first, last) in (("low", self.low), ("high", self.high)):
            if first > last:
                raise ValueError(
                    f"{name} = {[first, last]}: expected (first, last), because the bound is raised from one to the other; swap them"
                )
        return self


class M2poConfig(_Section):
    """Token ratio, where the second moment of log ratios allows it."""

    max_second_moment: PositiveFloat = 0.04
    """tau: the tokens with the largest |log r| are masked until the mean of (log r)^2 over the others is at most this."""


class CorrectionConfig(_Section):
    """A bounded factor for the engine's part of the gap, rho_t = pi_start(y_t) / mu(y_t), token by token (reference = "proximal")."""

    kind: Literal["none", "token_tis", "icepop", "sequence_mask"] = "none"
    """"token_tis": rho truncated; "icepop": rho within the band, else 0; "sequence_mask": rho, 0 for the whole sequence where
    its geometric mean leaves the band."""
    band: tuple[Annotated[float, Field(ge=0, lt=1)], AboveOne] | None = None
    """Default, as published: (0, 2) for token_tis, (0.5, 5) for icepop, (0.999, 1.002) for sequence_mask."""

    @model_validator(mode="after")
    def _band_is_used(self) -> CorrectionConfig:
        if self.band is not None and self.kind == "none":
            raise ValueError(
                f"band = {self.band}: bounds a correction, and kind = 'none'; choose one, or take band out"
            )
        return self


Method = Literal[
    "vespo", "reinforce", "importance_sampling", "grpo", "gspo", "sapo", "cispo", "topr", "bapo", "m2po", "seq_tis", "seq_mis"
]  # fmt: skip
Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"]


class AlgorithmConfig(_Section):
    """How off-policy samples are weighted (algo/coefficients.py has the formulas); defaults are the published ones."""

    name: Method = "vespo"
    """"reinforce" is coefficient 1: no correction for off-policy data; "importance_sampling" is W itself."""
    vespo: VespoConfig = VespoConfig()
    grpo: GrpoConfig = GrpoConfig()
    gspo: GspoConfig = GspoConfig()
    sapo: SapoConfig = SapoConfig()
    cispo: CispoConfig = CispoConfig()
    bapo: BapoConfig = BapoConfig()
    m2po: M2poConfig = M2poConfig()
    seq_tis: TisConfig = TisConfig()
    seq_mis: MisConfig = MisConfig()
    reference: Literal["behavior", "proximal"] = "behavior"
    """Below pi in every ratio: what the engine reported when it sampled; or the trainer's own weights at the start of the
    batch, which costs a forward pass and leaves the engine's part to `correction`."""
    correction: CorrectionConfig = CorrectionConfig()
    aggregation: Literal["published", "token_mean", "seq_mean_token_sum", "seq_mean_token_mean"] = "published"
    """What one update averages over, with one global denominator; "published" is what the method's authors use."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from a reward: the mean of its group, or of the others in it."""
    advantage_scale: Literal["std", "batch_std", "none"] = "std"
    """Divided by: the deviation within the group, that of the whole batch, or nothing (the paper's eq. 20; its code uses std)."""
    zero_mean: bool = False
    """Beyond the paper: shift the advantages of each group so that coefficient * advantage sums to 0; costs a forward pass."""
    ess_learning_rate: bool = False
    """Beyond the paper: multiply the learning rate by sqrt(ESS / n) of the update's W."""
    min_living_weight: Fraction = 0.0
    """Beyond the paper: leave the rest of a batch untrained once the mean coefficient, or its effective sample size, of an update
    falls below this; 0: never."""
    kl_coeff: NotNegative = 0.0
    """Weight of the penalty KL(pi || kl_reference) on the response tokens; 0: no such model is loaded."""
    kl_reference: Path | None = None
    """Hugging Face directory of the penalty's model; default: the model that the run starts from."""

    @property
    def resolved_aggregation(self) -> Aggregation:
        if self.aggregation != "published":
            return self.aggregation
        published: dict[str, Aggregation] = {
            "gspo": "seq_mean_token_mean",
            "sapo": "seq_mean_token_mean",
            "topr": "seq_mean_token_sum",
        }
        return published.get(self.name, "token_mean")

    @property
    def needs_start(self) -> bool:
        """Whether a batch is scored under the weights of its start even where it has one update."""
        return self.needs_whole_update or self.reference == "proximal"

    @property
    def needs_whole_update(self) -> bool:
        """Whether a coefficient depends on the other sequences of the update: they are surveyed by a forward pass of their own."""
        adapts = self.name == "vespo" and (self.vespo.budget or self.vespo.ess_target)
        return bool(adapts) or self.name in ("bapo", "m2po") or self.zero_mean

    @model_validator(mode="after")
    def _sections_are_used(self) -> AlgorithmConfig:
        methods = set(get_args(Method)) & set(type(self).model_fields)
        for section in sorted(methods & self.model_fields_set - {self.name}):
            if getattr(self, section) != type(self).model_fields[section].default:
                raise ValueError(
                    f"{section} = ...: is not used with name = '{self.name}'; set name = '{section}', or take the section out"
                )
        return self

    @model_validator(mode="after")
    def _reference_fits(self) -> AlgorithmConfig:
        if self.kl_reference and not self.kl_coeff:
            raise ValueError(
                f"kl_reference = '{self.kl_reference}': is not used with kl_coeff = 0; set that above 0, or take kl_reference out"
            )
        if self.correction.kind != "none" and self.reference == "behavior":
            raise ValueError(
                f"correction.kind = '{self.correction.kind}': with reference = 'behavior' the ratios contain the engine's part "
                "already, and it would count twice; set reference = 'proximal', or kind = 'none'"
            )
        if self.name == "reinforce" and self.correction.kind == "none":
            for field, value, unused in (
                ("reference", self.reference, self.reference == "proximal"),
                ("zero_mean", self.zero_mean, self.zero_mean),
                ("min_living_weight", self.min_living_weight, self.min_living_weight > 0),
            ):
                if unused:
                    raise ValueError(
                        f"{field} = {value!r}: changes nothing with name = 'reinforce' without a correction, whose coefficient is 1 "
                        "whatever the ratios are; take it out"
                    )
        if self.vespo.noise_aware and self.reference == "proximal":
            raise ValueError(
                "vespo.noise_aware = true: takes the engine's noise out of W, and with reference = 'proximal' there is none in it; "
                "take one of them out"
            )
        return self


class LoopConfig(_Section):
    num_steps: Positive
    prompts_per_step: Positive
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt; group-relative advantages need at least 2."""
    updates_per_batch: Positive = 1
    """Optimizer updates on each batch, each on an equal share of its groups (the paper's N); weights are published
    after the last one, which makes the next version."""
    max_staleness: Count = 1
    """Versions a token may be older than the weights it trains; 0 is synchronous."""
    window: Count = 0
    """Finished groups may overtake unfinished ones by so many places, never beyond the staleness bound; 0: admission order."""
    filter_groups: bool = False
    """Sample another prompt instead of a group whose rewards are all equal: it has no signal (DAPO's dynamic sampling)."""
    oversampling: Annotated[float, Field(ge=1, le=8)] = 1.0
    """With `filter_groups`: so many times the prompts are under way that would be without filtering.  A group that this
    would make too stale is sampled again."""
    save_every: Count = 0
    """Steps between checkpoints; 0: at the end only."""
    rescored_sequences: Positive | None = None
    """Sequences of each batch that the engine scores again, for the mismatch metrics; default: all of them.
    Scoring is one prefill, but at a temperature other than 1 one request for every response token."""
    step_timeout_s: Seconds = 3600
    """Longest wait for each phase of a step: the batch, the update, the push, an evaluation, a checkpoint."""


class InstrumentsConfig(_Section):
    """What tells staleness, the other engine and the router apart while a run goes on (docs/doctor.md)."""

    every: Count = 20
    """Steps between evidence files, the first of which comes at step 1: three more forward passes over a sample of the batch, on
    whose numbers `doctor report` judges; 0: none."""
    sequences: Positive = 16
    """Of a batch that are examined, at most; drawn anew each time."""
    expert_tokens: Positive = 65536
    """Tokens of each step whose expert choices trainer and engine are compared on, about: whole sequences, drawn anew each step.
    Those of examined sequences come first."""


class _RunConfig(_Section):
    run_dir: Path
    seed: Count = 0
    model: Path
    """Hugging Face directory: config.json, safetensors, tokenizer with a chat template."""
    trainer: TrainerConfig
    wandb_project: str | None = None
    prometheus: str | None = None
    """"host:port" on which the newest step's metrics are served to Prometheus, e.g. "127.0.0.1:9400"; default: nowhere."""

    @model_validator(mode="after")
    def _prometheus_can_listen(self) -> _RunConfig:
        if self.prometheus is None:
            return self
        host, colon, port = self.prometheus.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(
                f"prometheus = '{self.prometheus}': expected host:port, where the metrics are served; e.g. '127.0.0.1:9400'"
            )
        return self


class TrainConfig(_RunConfig):
    """`megatron-vespo train`: reinforcement learning."""

    prompts: PromptsConfig
    sampling: SamplingConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    loop: LoopConfig
    instruments: InstrumentsConfig = InstrumentsConfig()

    @model_validator(mode="after")
    def _sequences_fit(self) -> TrainConfig:
        responses = {"sampling": self.sampling.max_response_tokens}
        if self.evaluation.max_response_tokens:
            responses["evaluation"] = self.evaluation.max_response_tokens
        for section, tokens in responses.items():
            longest = self.prompts.max_prompt_tokens + tokens
            if longest > self.rollout.context_length:
                raise ValueError(
                    f"rollout.context_length = {self.rollout.context_length}: must be at least "
                    f"prompts.max_prompt_tokens + {section}.max_response_tokens = {longest}; raise it or shorten those"
                )
        return self

    @model_validator(mode="after")
    def _filtering_is_complete(self) -> TrainConfig:
        if self.loop.oversampling > 1 and not self.loop.filter_groups:
            raise ValueError(
                f"loop.oversampling = {self.loop.oversampling:g}: makes up for groups that are filtered, and "
                "loop.filter_groups = false; set that, or take it out"
            )
        if self.loop.window and not self.loop.max_staleness:
            raise ValueError(
                f"loop.window = {self.loop.window}: with loop.max_staleness = 0 a step takes all groups under way, and "
                "there is nothing to overtake; take it out"
            )
        if self.reward.overlong_tokens >= self.sampling.max_response_tokens:
            raise ValueError(
                f"reward.overlong_tokens = {self.reward.overlong_tokens}: must be below sampling.max_response_tokens = "
                f"{self.sampling.max_response_tokens}, or every response would be punished; lower it"
            )
        return self

    @model_validator(mode="after")
    def _batches_can_be_divided(self) -> TrainConfig:
        if self.loop.prompts_per_step % self.loop.updates_per_batch:
            raise ValueError(
                f"loop.updates_per_batch = {self.loop.updates_per_batch}: must divide loop.prompts_per_step = "
                f"{self.loop.prompts_per_step}, because each update takes an equal share of the groups; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _ratios_are_not_all_1(self) -> TrainConfig:
        algorithm = self.algorithm
        if algorithm.reference == "behavior" or self.loop.updates_per_batch > 1:
            return self
        adapts = algorithm.ess_learning_rate or algorithm.vespo.budget or algorithm.vespo.ess_target
        if algorithm.correction.kind == "none" or adapts:
            raise ValueError(
                "algorithm.reference = 'proximal': with loop.updates_per_batch = 1 the weights are still those of the start of the "
                "batch, and every ratio is 1: no method and no option that looks at W does anything; raise updates_per_batch, leave a "
                "correction alone, or set reference = 'behavior'"
            )
        return self

    @model_validator(mode="after")
    def _a_batch_can_be_left(self) -> TrainConfig:
        if self.algorithm.min_living_weight and self.loop.updates_per_batch == 1:
            raise ValueError(
                f"algorithm.min_living_weight = {self.algorithm.min_living_weight:g}: leaves out later updates on a batch, and "
                "loop.updates_per_batch = 1 has none; raise that, or take it out"
            )
        return self

    @model_validator(mode="after")
    def _replay_has_something_to_replay(self) -> TrainConfig:
        if self.trainer.router_replay == "engine" and not self.rollout.record_experts:
            raise ValueError(
                "trainer.router_replay = 'engine': repeats the engine's expert choices, and rollout.record_experts = false "
                "keeps none; set it to true, or router_replay = 'off'"
            )
        if self.trainer.router_replay == "trainer" and self.loop.updates_per_batch == 1:
            raise ValueError(
                "trainer.router_replay = 'trainer': repeats the choices of the weights at the start of a batch, and with "
                "loop.updates_per_batch = 1 there are no others; raise that, or set router_replay = 'off'"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_travel(self) -> TrainConfig:
        if self.trainer.device == "cpu" and self.rollout.sync_backend == "nccl":
            raise ValueError(
                "rollout.sync_backend = 'nccl': needs trainer.device = 'cuda'; leave it out, or set it to 'gloo'"
            )
        if self.rollout.sync_timeout_s >= self.trainer.collective_timeout_s:
            raise ValueError(
                f"rollout.sync_timeout_s = {self.rollout.sync_timeout_s:g}: must be below trainer.collective_timeout_s "
                f"= {self.trainer.collective_timeout_s:g}, because the other ranks wait in a collective while rank 0 "
                "pushes; lower it, or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _gpus_can_be_shared(self) -> TrainConfig:
        if self.rollout.placement == "apart":
            return self
        if not self.trainer.device == self.rollout.device == "cuda":
            raise ValueError(
                "rollout.placement = 'colocated': shares GPUs between trainer and engines, and one of them has device = 'cpu'; "
                "take it out"
            )
        if self.rollout.external:
            raise ValueError(
                "rollout.placement = 'colocated': places the engines of this run, and `external` ones are elsewhere; take one "
                "of them out"
            )
        if self.rollout.sync_transport in ("auto", "broadcast") and self.rollout.sync_backend != "gloo":
            raise ValueError(
                "rollout.placement = 'colocated': NCCL cannot connect two processes on one GPU; set rollout.sync_transport = "
                "'shared_memory' (one machine) or 'disk', or rollout.sync_backend = 'gloo'"
            )
        num, ranks = (
            self.rollout.engines * self.rollout.resolved_gpus_per_engine,
            self.trainer.layout.world_size,
        )
        if num > ranks:
            raise ValueError(
                f"rollout.engines = {self.rollout.engines}: take {num} GPUs, and the trainer whose GPUs they share has {ranks}; "
                "lower it"
            )
        return self


class SftDataConfig(_Section):
    """Demonstrations: parquet or jsonl with a column `messages` that ends with an assistant turn."""

    train: Path
    max_tokens: Positive
    shuffle: bool = True


class SftConfig(_RunConfig):
    """`megatron-vespo sft`: supervised fine-tuning with the same trainer."""

    data: SftDataConfig
    num_steps: Positive
    batch_size: Positive
    """Sequences in one optimizer step, over all ranks."""
    log_every: Positive = 10
    """Steps between lines of the live view; metrics.jsonl has every step."""
    save_every: Count = 0
    """Steps between checkpoints; 0: at the end only."""
    step_timeout_s: Seconds = 3600
    """Longest wait for one optimizer step."""

    @model_validator(mode="after")
    def _demonstrations_have_no_rollout(self) -> SftConfig:
        if self.trainer.router_replay != "off":
            raise ValueError(
                f"trainer.router_replay = '{self.trainer.router_replay}': demonstrations carry no expert choices and are used "
                "for one update; set it to 'off'"
            )
        return self


C = TypeVar("C", bound=_RunConfig)


def load_config(kind: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read a TOML file and apply `dotted.key=value` overrides, whose values are TOML (or bare strings).

    Raises:
        ConfigError: naming every field that is unknown, missing, mistyped or out of range.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(
            f"config = '{path}': no such file; give the path of a TOML file, e.g. configs/demo.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"config = '{path}': expected TOML, but {err}; mend that line") from err
    for override in overrides:
        _apply(tree, override)
    return parse_config(kind, tree, source=str(path))


def parse_config(kind: type[C], tree: dict[str, Any], source: str = "config") -> C:
    """Check a tree of plain values against `kind` (strict: no coercion between types)."""
    try:
        return kind.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as err:
        lines = [_explain(kind, error) for error in err.errors()]
        raise ConfigError(
            "\n".join([f"{source}: {len(lines)} problem(s)", *("  " + line for line in lines)])
        ) from None


def to_toml(cfg: _RunConfig) -> str:
    """The resolved configuration as TOML that `load_config` reads back to an equal object."""
    import tomli_w

    return tomli_w.dumps(cfg.model_dump(mode="json", exclude_none=True))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override '{override}': expected dotted.key=value; e.g. loop.num_steps=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare string needs no quotes on a command line
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override '{override}': '{parent}' is a value, not a table; drop what follows it"
            )
    tree[leaf] = value


def _explain(kind: type[BaseModel], error: Any) -> str:
    """One house-form line for one pydantic error."""
    *parents, leaf = error["loc"] or ("",)
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(_section_at(kind, parents).model_fields)
        near = difflib.get_close_matches(str(leaf), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean '{'.'.join([*map(str, parents), near[0]])}'?"
            if near
            else f"known here: {', '.join(known)}."
        )
        return f"unknown field '{dotted}': {hint}"
    if error["type"] == "missing":
        return f"missing field '{dotted}': it has no default; set it in the TOML file."
    if error["type"] == "value_error":
        where = f"{dotted}: " if dotted else ""
        return f"{where}{error['ctx']['error']}."
    return f"{dotted} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}; change it."


def _section_at(kind: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    for part in loc:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        options = [annotation, *get_args(annotation)]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), kind)
    return kind
