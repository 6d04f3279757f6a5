"""What a simulated engine says about itself."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_vespo.rollout.simulated_engine.behaviour import Behaviour
from megatron_vespo.rollout.simulated_engine.scheduler import Scheduler

SGLANG_VERSION = "0.5.23"


def model_info(model: Path, label: str) -> dict[str, Any]:
    """GET /model_info, without what it says of embeddings."""
    config = json.loads((model / "config.json").read_text())
    return {
        "model_path": str(model),
        "served_model_name": str(model),
        "tokenizer_path": str(model),
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": label,
        "load_format": "auto",
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
    }


def server_info(model: Path, behaviour: Behaviour, context_length: int, load: Scheduler) -> dict[str, Any]:
    """GET /server_info: of the hundreds of options those that mean something here."""
    options = {
        "model_path": str(model),
        "tokenizer_path": str(model),
        "context_length": context_length,
        "max_running_requests": behaviour.max_running_requests,
        "weight_version": behaviour.weight_version,
        "random_seed": behaviour.seed,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
        "enable_dp_attention": False,
        "disable_radix_cache": False,
        "enable_metrics": behaviour.metrics,
        "enable_return_routed_experts": True,
    }
    return options | {
        "status": "ready",
        "max_total_num_tokens": load.capacity,
        "max_req_input_len": context_length - 6,
        "internal_states": [options],
        "version": SGLANG_VERSION,
        "frontend": "python",
    }


def startup_time(total_s: float) -> dict[str, Any]:
    """Of the start of one life."""
    phases = ("prefill", "decode", "target_verify", "draft_prefill", "draft_decode", "draft_extend")
    return {
        "load_weight": 0.0,
        "kv_cache_allocation": 0.0,
        "scheduler_e2e": total_s,
        "cuda_graph": dict.fromkeys(phases, 0.0),
        "tokenizer_e2e": total_s,
    }


def loads(load: Scheduler) -> dict[str, Any]:
    """GET /v1/loads, whatever sections are asked for; its numbers are newer than a real server's."""
    now = datetime.now(UTC)
    core = {
        "timestamp": now.timestamp(),
        "dp_rank": 0,
        "num_running_reqs": load.num_running,
        "num_waiting_reqs": load.num_waiting,
        "num_waiting_uncached_tokens": load.num_waiting_tokens,
        "num_used_tokens": load.num_tokens,
        "num_total_tokens": load.num_tokens + load.num_waiting_tokens,
        "num_active_tokens": load.num_tokens + load.num_waiting_tokens,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": load.capacity,
        "max_running_requests": load.max_running,
        "token_usage": load.num_tokens / load.capacity,
        "gen_throughput": load.throughput,
        "cache_hit_rate": 0.0,
        "utilization": load.num_running / load.max_running,
        "total_prefill_uncached_tokens": load.num_prefilled,
        "total_prefill_busy_us": load.prefill_us,
        "decode_moments": load.decode_moments if load.decode_moments[0] else None,
    }
    sections = {
        "memory": {
            "weight_gb": 0.0,
            "kv_cache_gb": 0.0,
            "graph_gb": 0.0,
            "token_capacity": load.capacity,
        },
        "disaggregation": {
            "mode": "null",
            "prefill_bootstrap_queue_reqs": 0,
            "prefill_inflight_queue_reqs": 0,
            "decode_prealloc_queue_reqs": 0,
            "decode_transfer_queue_reqs": 0,
            "decode_retracted_queue_reqs": 0,
            "kv_transfer_speed_gb_s": 0.0,
            "kv_transfer_latency_ms": 0.0,
        },
        "queues": {
            "waiting": load.num_waiting,
            "grammar": 0,
            "paused": 0,
            "retracted": 0,
            "prealloc_ready": 0,
        },
    }
    return {
        "timestamp": now.isoformat(),
        "version": SGLANG_VERSION,
        "accelerator": None,
        "num_accelerators": 1,
        "loads": [core | sections],
    }


def metrics(load: Scheduler, model: Path) -> str:
    """GET /metrics: of the names of a real server those that mean something here, with their labels."""
    tokenizer = f'engine_type="unified",model_name="{model}"'
    scheduler = f'{tokenizer},moe_ep_rank="0",pp_rank="0",tp_rank="0"'
    lines: list[str] = []
    for name, kind, labels, value in (
        ("max_total_num_tokens", "gauge", scheduler, load.capacity),
        ("num_running_reqs", "gauge", scheduler, load.num_running),
        ("num_queue_reqs", "gauge", scheduler, load.num_waiting),
        ("gen_throughput", "gauge", scheduler, load.throughput),
        ("token_usage", "gauge", scheduler, load.num_tokens / load.capacity),
        ("num_used_tokens", "gauge", scheduler, load.num_tokens),
        ("num_retracted_reqs", "gauge", scheduler, load.num_retracted),
        ("generation_tokens_total", "counter", f'{tokenizer},is_streaming="false"', load.num_delivered),
        ("num_requests_total", "counter", tokenizer, load.num_ended),
        ("num_aborted_requests_total", "counter", tokenizer, load.num_aborted),
        ("realtime_tokens_total", "counter", f'{scheduler},mode="prefill_compute"', load.num_prefilled),
        ("realtime_tokens_total", "counter", f'{scheduler},mode="decode"', load.num_decoded),
    ):
        kind_line = f"# TYPE sglang:{name} {kind}"
        lines += [] if kind_line in lines else [kind_line]
        lines.append(f"sglang:{name}{{{labels}}} {float(value)}")
    return "\n".join(lines) + "\n"
