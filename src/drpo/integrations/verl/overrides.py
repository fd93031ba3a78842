"""A recipe as overrides of verl's trainer, and what of a recipe verl has no word for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from verl.trainer.config import RolloutCorrectionConfig

from drpo.data.problems import BUILTIN_MODELS
from drpo.errors import UserError
from drpo.integrations.verl.config import LOSS_MODES, TARGET, PolicyLoss
from drpo.integrations.verl.problems import PLAIN_TEMPLATE
from drpo.run.options import check_option
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig

_FP32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"

# Options of DRPOConfig with a word of verl's.
_TRAINER = {
    "weight_decay": "actor_rollout_ref.actor.optim.weight_decay",
    "max_grad_norm": "actor_rollout_ref.actor.optim.clip_grad",
    "gradient_checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
}
_REFUSED = {
    "audit_threshold": "verl has no audit before the first update",
    "record_rollouts": "verl has no log of trained tokens",
    "reward_timeout": "verl calls rewards in workers of its own",
    "rollout_lag": "verl's trainer decides how old its sampler's weights are",
    "stop_on_collapse": "verl's trainer runs to its end",
    "rollout_precision": "verl's sampler has a dtype of its own, --verl actor_rollout_ref.rollout.dtype",
}
"""Fields of a recipe that verl would ignore, and why."""

_OTHER_PRECISIONS = {
    "auto": "auto is measured with TRL's trainer alone",
    "fp16": "FP16 of verl's is not tried",
    "fp8": "verl trains in FP8 with Megatron alone",
}

_REJECTIONS = {
    "sequence_max_k3": "seq_max_k3",
    "sequence_mean_k3": "seq_mean_k3",
    "sequence_geometric": "seq_mean_k1",
}
"""Corrections that are one of verl's ``rollout_rs``."""

_ADVANTAGES = {
    "mean": ("grpo", False),
    "mean-std": ("grpo", True),
    "leave-one-out": ("rloo", False),
    "length-weighted": ("opo", False),
}


def overrides(
    recipe: Recipe, folder: Path, train_rows: int, prompt_length: int, plain: bool, resume: bool = False
) -> dict[str, Any]:
    """What verl's trainer is told, by key.

    Args:
        recipe: the run.
        folder: of the run, where its ``recipe.yaml`` is; what verl writes goes there.
        train_rows: problems in ``verl/train.jsonl``.
        prompt_length: tokens, of the longest prompt.
        plain: whether the tokenizer has no chat template.
        resume: whether to go on from the last checkpoint.

    Raises:
        UserError: something that verl would not do as the recipe says.
    """
    default: dict[str, Any] = {field.name: field.default for field in fields(DRPOConfig)}
    prompts, updates = recipe.prompts_per_rollout, recipe.updates_per_rollout
    if prompts % updates:
        raise UserError(
            f"updates_per_rollout: verl splits a rollout by prompts, of which there are {prompts}; expected a divisor of "
            f"{prompts}, got {updates}"
        )
    if why := _OTHER_PRECISIONS.get(recipe.train_precision):
        raise UserError(f"train_precision: {why}; expected fp32 or bf16 for verl")
    for name, why in _REFUSED.items():
        value = getattr(recipe, name)
        if value and value != Recipe.model_fields[name].default:
            raise UserError(f"{name}: {why}; leave it out")
    if any(spec.name == "overlong" for spec in recipe.reward):
        raise UserError(
            "reward: overlong needs the tokens of a completion, and verl gives a reward its text; expected verl's own "
            "(--verl reward.reward_manager.name=dapo, docs/verl.md)"
        )
    if recipe.aggregation == "prompt-mean":
        raise UserError("aggregation: verl has no prompt-mean; expected one of its own loss_agg_mode")
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    advantage = recipe.advantage or default["advantage"]
    if advantage not in _ADVANTAGES:
        raise UserError(f"advantage: verl has no {advantage}; expected {', '.join(_ADVANTAGES)}")
    estimator, by_std = _ADVANTAGES[advantage]
    temperature = recipe.temperature or 1.0
    settings = {
        "data.train_files": folder / "verl" / "train.jsonl",
        "data.val_files": folder / "verl" / "heldout.jsonl",
        "data.train_batch_size": prompts,
        "data.max_prompt_length": prompt_length,
        "data.max_response_length": recipe.max_completion_length,
        "data.seed": recipe.seed,
        "reward.custom_reward_function.path": "pkg://drpo.integrations.verl.reward",
        "+reward.custom_reward_function.reward_kwargs.recipe": folder / "recipe.yaml",
        "algorithm.adv_estimator": estimator,
        "algorithm.norm_adv_by_std_in_grpo": by_std,
        "actor_rollout_ref.model.path": Path(BUILTIN_MODELS.get(recipe.model, recipe.model)),
        "actor_rollout_ref.model.external_lib": "drpo.integrations.verl",
        f"{actor}.ppo_mini_batch_size": prompts // updates,
        f"{actor}.ppo_micro_batch_size_per_gpu": recipe.micro_batch_size or prompts // updates,
        f"{actor}.optim.lr": recipe.learning_rate,
        f"{actor}.data_loader_seed": recipe.seed,
        f"{actor}.loss_agg_mode": recipe.aggregation or default["aggregation"],
        f"{actor}.loss_scale_factor": recipe.horizon,
        f"{actor}.checkpoint.save_contents": "[model,optimizer,extra,hf_model]",
        **_loss(recipe),
        f"{rollout}.name": "vllm",
        f"{rollout}.n": recipe.num_generations,
        f"{rollout}.temperature": temperature,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": recipe.micro_batch_size or prompts // updates,
        f"{rollout}.seed": recipe.seed,
        f"{rollout}.val_kwargs.n": recipe.heldout_samples,
        f"{rollout}.val_kwargs.do_sample": True,
        f"{rollout}.val_kwargs.temperature": temperature,
        "trainer.logger": "[console,file]",
        "trainer.total_training_steps": recipe.rollouts,
        # verl drops the rows that do not fill a rollout.
        "trainer.total_epochs": math.ceil(recipe.rollouts / (train_rows // prompts)),
        "trainer.test_freq": recipe.evaluate_every,
        "trainer.save_freq": recipe.checkpoint_every,
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.default_local_dir": folder / "checkpoints",
        # verl takes up whatever it finds in default_local_dir otherwise.
        "trainer.resume_mode": "auto" if resume else "disable",
        "trainer.validation_data_dir": folder / "verl" / "validation",
        "trainer.n_gpus_per_node": 1,
        "hydra.run.dir": folder / "verl" / "hydra",
    }
    if plain:
        settings["actor_rollout_ref.model.custom_chat_template"] = PLAIN_TEMPLATE
    if recipe.train_precision == "fp32":
        settings |= {f"+{actor}.fsdp_config.mixed_precision": _FP32, f"{rollout}.dtype": "float32"}
    if recipe.lora is not None:
        modules = recipe.lora.target_modules
        settings |= {
            "actor_rollout_ref.model.lora_rank": recipe.lora.r,
            "actor_rollout_ref.model.lora_alpha": recipe.lora.alpha,
            "actor_rollout_ref.model.target_modules": modules if isinstance(modules, str) else f"[{','.join(modules)}]",
        }
    for option, value in recipe.trainer.items():
        check_option(option, value)
        if option not in _TRAINER:
            raise UserError(
                f"trainer.{option}: is an option of TRL's, which --engine verl has no word for; leave it out, or say what "
                "is meant with --verl KEY=VALUE"
            )
    for option, key in _TRAINER.items():
        settings[key] = recipe.trainer.get(option, default[option])
    return settings


def _loss(recipe: Recipe) -> dict[str, Any]:
    """The loss and what its ratio is taken against."""
    objective = recipe.objective.make()
    mode = next(mode for mode, name in LOSS_MODES.items() if name == recipe.objective.name)
    bypass = (recipe.anchor or objective.anchor) == "sampler"
    correction = {"bypass_mode": bypass, **_correction(recipe)}
    try:
        PolicyLoss(
            loss_mode=mode,
            hyperparameters=recipe.objective.hyperparameters,
            rollout_correction=RolloutCorrectionConfig(**correction),
        )
    except ValueError as error:
        raise UserError(f"--engine verl: {error}") from error
    where = "actor_rollout_ref.actor.policy_loss"
    return {
        f"{where}._target_": TARGET,
        f"{where}.loss_mode": mode,
        **{f"+{where}.hyperparameters.{name}": value for name, value in recipe.objective.hyperparameters.items()},
        f"+{where}.rollout_correction": "${algorithm.rollout_correction}",
        f"+{where}.use_v1": "${trainer.use_v1}",
        f"+{where}.histograms": True,
        **{f"algorithm.rollout_correction.{name}": value for name, value in correction.items()},
    }


def _correction(recipe: Recipe) -> dict[str, Any]:
    if recipe.correction is None:
        return {"rollout_is": None}
    made: Any = recipe.correction.make()
    level, _, kind = recipe.correction.name.partition("_")
    if kind == "truncate":
        return {"rollout_is": level, "rollout_is_threshold": made.cap}
    if kind == "mask":
        return {"rollout_is": level, "rollout_is_threshold": f"'{made.low}_{made.high}'"}
    if mode := _REJECTIONS.get(recipe.correction.name):
        # verl's bounds are those of μ/π_old.
        threshold = f"'{1 / made.high}_{1 / made.low}'" if mode == "seq_mean_k1" else made.delta
        return {"rollout_is": None, "rollout_rs": mode, "rollout_rs_threshold": threshold}
    raise UserError(
        f"correction: verl has no {recipe.correction.name}; expected token_truncate, token_mask, sequence_truncate, "
        f"sequence_mask, {', '.join(_REJECTIONS)}"
    )


def as_arguments(settings: dict[str, Any], more: Sequence[str]) -> list[str]:
    """The command line of ``main_ppo``; what the user adds comes last, and wins."""
    replaced = {_key(override) for override in more}
    kept = {key: value for key, value in settings.items() if _key(key) not in replaced}
    return [f"{key}={_as_hydra_reads(value)}" for key, value in kept.items()] + list(more)


def changed(settings: Sequence[str], more: Sequence[str]) -> list[str]:
    """Overrides of verl, and further ones in place of those with the same keys."""
    replaced = {_key(override) for override in more}
    return [setting for setting in settings if _key(setting) not in replaced] + list(more)


def _as_hydra_reads(value: Any) -> Any:
    if value is None:
        return "null"
    # A path may have characters in it that mean something to Hydra.
    return "'" + str(value).replace("'", "\\'") + "'" if isinstance(value, Path) else value


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
