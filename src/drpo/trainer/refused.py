"""TRL's options that would have no effect in this trainer, and what to set instead."""

from __future__ import annotations

from typing import Any

from drpo.rollout.sampling import FILTERS

_NO_REFERENCE = "no reference model is kept: the objective bounds how far a rollout's updates go from μ, and nothing here how far a run goes from its start; leave it out"
_NO_ENTROPY_BONUS = "its gradient goes through the whole vocabulary, which the fused loss does not keep; objective='clip_cov' or 'kl_cov' keeps the entropy up by its tokens"
_OTHER_OBJECTIVE = "belongs to TRL's own losses; choose an objective with objective= and objective_kwargs="
_OTHER_CORRECTION = "set correction_kwargs={'cap': ...} of a truncation, {'low': ..., 'high': ...} of a mask"
_NO_LOG_PROBS = "it returns no log-probs, and the ratio needs those of the sampler"
_CHANGES_SAMPLING = (
    "it changes the distribution that is sampled from, while the trainer scores the full one; set it to its default"
)

REFUSED: dict[str, str] = {
    "loss_type": "set objective= (what is maximised) and aggregation= (how tokens are averaged)",
    "epsilon": "set objective='ppo', objective_kwargs={'clip_low': ...}",
    "epsilon_high": "set objective='ppo', objective_kwargs={'clip_high': ...}",
    "delta": "this is TRL's two-sided clip; DRPO's δ is objective_kwargs={'delta': ...}",
    "importance_sampling_level": "the objective decides what the ratio is taken over",
    "num_iterations": "every token is trained on once a rollout; raise updates_per_rollout for more, smaller updates",
    "scale_rewards": "set advantage= ('mean', 'mean-std', 'leave-one-out', 'max-rl' or 'length-weighted')",
    "multi_objective_aggregation": "rewards are summed with reward_weights before the group baseline is taken",
    "vllm_importance_sampling_correction": "set correction='token_truncate', for an objective anchored on the old policy",
    "vllm_importance_sampling_mode": "set correction= ('token_truncate', 'token_mask', 'sequence_truncate' or 'sequence_mask')",
    "off_policy_mask_threshold": "set correction='opsm', correction_kwargs={'delta': ...}",
    "top_entropy_quantile": "every completion token is trained on",
    **dict.fromkeys(
        ("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "use_bias_correction_kl"),
        _NO_REFERENCE,
    ),
    **dict.fromkeys(
        ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"),
        _OTHER_CORRECTION,
    ),
    **dict.fromkeys(
        (
            "entropy_coef",
            "use_adaptive_entropy",
            "entropy_coef_min",
            "entropy_coef_max",
            "entropy_coef_delta",
            "entropy_target",
        ),
        _NO_ENTROPY_BONUS,
    ),
    **dict.fromkeys(
        (
            "sapo_temperature_neg",
            "sapo_temperature_pos",
            "vespo_k_pos",
            "vespo_k_neg",
            "vespo_lambda_pos",
            "vespo_lambda_neg",
        ),
        _OTHER_OBJECTIVE,
    ),
    **dict.fromkeys(FILTERS, f"{_CHANGES_SAMPLING}, or set replay_support=True to score the tokens that it leaves"),
    **dict.fromkeys(("repetition_penalty", "vllm_structured_outputs_regex"), _CHANGES_SAMPLING),
    **dict.fromkeys(("use_transformers_continuous_batching", "use_transformers_paged"), _NO_LOG_PROBS),
}
"""Options of GRPOConfig that this trainer would ignore, and what to do instead. Only their defaults, and values that mean the same, are accepted."""

_CLIP = "objective='ppo', objective_kwargs={'clip_high': 0.2}"

AS_IN_TRL: dict[str, dict[Any, str]] = {
    "loss_type": {
        "grpo": f"{_CLIP}, aggregation='seq-mean-token-mean'",
        "bnpo": f"{_CLIP}, aggregation='token-mean'",
        "dr_grpo": f"{_CLIP}, aggregation='seq-mean-token-sum-norm', horizon=max_completion_length",
        "cispo": "objective='cispo', aggregation='token-mean'",
        "sapo": "objective='sapo', aggregation='seq-mean-token-mean'",
        "luspo": "objective='gspo', aggregation='seq-mean-token-sum'",
        "vespo": "objective='vespo', aggregation='token-mean'",
    },
    "importance_sampling_level": {"sequence": "objective='gspo', aggregation='seq-mean-token-mean'"},
    "scale_rewards": dict.fromkeys(("group", True), "advantage='mean-std'"),
}
"""Values of refused options, and what trains as they did. ``loss_type='dapo'``, TRL's default, is that of 'bnpo'."""

GENERATION_KWARGS = {
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "eos_token_id",
    "max_new_tokens",
    "max_time",
    "pad_token_id",
    "prefill_chunk_size",
    "temperature",
    "use_cache",
}
"""Generation settings that leave what is sampled from as it is. The temperature is here because the audit compares it."""
