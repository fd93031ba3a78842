"""``drpo doctor --verl``: whether verl would compute what its configuration seems to ask for."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drpo.doctor.findings import Finding
from drpo.doctor.fixes import refused
from drpo.doctor.verl_values import ACTOR, ROLLOUT, wrong_values
from drpo.doctor.verl_worker import in_a_worker
from drpo.errors import UserError

LOSS = f"{ACTOR}.policy_loss"
CORRECTION = "algorithm.rollout_correction"


def examine(path: Path, overrides: Sequence[str] = (), *, workers: bool = True) -> list[Finding]:
    """Everything that can be said of a configuration of verl without its model.

    Args:
        path: a configuration that ``--config-path`` and ``--config-name`` would take, or one that verl has composed.
        overrides: of Hydra, as on verl's command line.
        workers: whether to start Ray and look for the loss in a worker.

    Raises:
        UserError: there is nothing to examine, or no verl.
    """
    try:
        import drpo.integrations.verl  # noqa: F401
    except ImportError as error:
        raise UserError(f"--verl {path}: {error}") from error
    from drpo.integrations.verl.hydra import from_file

    config = from_file(path, overrides)
    if not is_of_verl(config):
        raise UserError(f"--verl {path}: has no {LOSS}; expected a configuration of verl's PPO trainer")
    findings = of_config(config)
    if workers and _is_ours(config) and all(finding.verdict != "stop" for finding in findings):
        findings += in_a_worker(_mode(config), _get(config, "actor_rollout_ref.model.external_lib"))
    return findings


def of_config(config: Any) -> list[Finding]:
    """What can be said of a composed configuration of verl's PPO trainer without Ray."""
    if wrong := list(wrong_values(config)):
        return wrong
    findings = [*_loss(config), *_anchor(config), *_sampling(config), *_update(config), *_data(config)]
    return [*findings, *_as_verl_checks(config, findings)]


def is_of_verl(config: Any) -> bool:
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    try:
        return isinstance(config, DictConfig) and _get(config, LOSS) is not None
    except OmegaConfBaseException:  # an interpolation that leads nowhere
        return False


def _get(config: Any, key: str, default: Any = None) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key, default=default, throw_on_missing=False)


def _mode(config: Any) -> str:
    return str(_get(config, f"{LOSS}.loss_mode"))


def _is_ours(config: Any) -> bool:
    from drpo.integrations.verl import LOSS_MODES

    return _mode(config) in LOSS_MODES


def _policy_loss(config: Any) -> Any:
    """The PolicyLoss of the configuration; a ValueError says why there is none."""
    from hydra.errors import InstantiationException
    from verl.utils.config import omega_conf_to_dataclass

    try:
        return omega_conf_to_dataclass(_get(config, LOSS))
    except InstantiationException as error:
        raise error.__cause__ or error from error


def _loss(config: Any) -> Iterator[Finding]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.workers.config import ActorConfig

    from drpo.integrations.verl import LOSS_MODES
    from drpo.integrations.verl.config import NOT_READ, TARGET
    from drpo.registry import unknown_name

    mode = _mode(config)
    if mode not in POLICY_LOSS_REGISTRY:
        yield refused(ValueError(unknown_name("loss_mode", mode, POLICY_LOSS_REGISTRY)), f"{LOSS}.loss_mode")
        return
    if mode not in LOSS_MODES:
        if _get(config, f"{LOSS}._target_") == TARGET:
            yield _refused(config, "the loss_mode of an objective of this library, or verl's own _target_")
        else:
            yield from _loss_of_verl(config, mode)
        return
    if _get(config, f"{LOSS}._target_") != TARGET:
        yield Finding(
            "stop",
            f"{LOSS}._target_ is verl's own, which does not say what loss_mode={mode} is anchored on",
            "'hydra.searchpath=[pkg://drpo.integrations.verl.configs]' +drpo=loss",
        )
        return
    try:
        loss = _policy_loss(config)
    except ValueError as error:
        yield refused(error)
    else:
        objective = loss.make_objective()
        values = ", ".join(f"{name} = {value:g}" for name, value in asdict(objective).items())
        yield Finding("ok", f"loss {mode}: {type(objective).__name__}({values})")
        if getattr(objective, "delta", 0) >= 1 and mode in ("drpo", "mask_drpo"):
            low, high = objective.weight_bounds
            yield Finding(
                "warning",
                f"delta = {objective.delta:g} confines the gradient weight to [{low:.3g}, {high:.3g}]: it never turns corrective",
                f"++{LOSS}.hyperparameters.delta=0.2, if the edge of the trust region is to be reached",
            )
    for name in NOT_READ:
        default, value = ActorConfig.__dataclass_fields__[name].default, _get(config, f"{ACTOR}.{name}")
        if value != default:
            yield Finding(
                "stop",
                f"{ACTOR}.{name}={value} is not read by loss_mode={mode}",
                f"{ACTOR}.{name}={default}, and the bounds of the objective in {LOSS}.hyperparameters",
            )


def _refused(config: Any, fix: str) -> Finding:
    try:
        _policy_loss(config)
    except ValueError as error:
        return Finding("stop", str(error), fix)
    return Finding("ok", f"loss {_mode(config)}")


def _loss_of_verl(config: Any, mode: str) -> Iterator[Finding]:
    yield Finding("ok", f"loss {mode}: verl's own")
    if mode == "dro":
        yield Finding(
            "warning",
            "loss_mode=dro is verl's Direct Reward Optimisation, not DRPO",
            f"{LOSS}.loss_mode=drpo, if DRPO is meant",
        )
    if mode in ("dppo_tv", "dppo_kl"):
        bound, threshold = _get(config, f"{ACTOR}.clip_ratio_c"), _get(config, f"{ACTOR}.clip_ratio_high")
        if bound is not None and bound < 20:
            yield Finding(
                "stop",
                f"verl's {mode} truncates the ratio at {ACTOR}.clip_ratio_c={bound:g}, which the paper found unstable; its "
                f"threshold is clip_ratio_low and clip_ratio_high ({threshold:g})",
                f"{LOSS}.loss_mode=drpo/{mode}, which has neither, or {ACTOR}.clip_ratio_c=1000",
            )


def _anchor(config: Any) -> Iterator[Finding]:
    bypass = bool(_get(config, f"{CORRECTION}.bypass_mode"))
    if not _get(config, "trainer.use_v1", True):
        yield Finding("stop", "trainer.use_v1=False: the legacy trainer overwrites loss_mode", "trainer.use_v1=True")
        return
    if not bypass:
        yield Finding("ok", "anchor: the trainer's old policy, π_old, scored before the first update of each rollout")
        return
    if not _get(config, f"{ROLLOUT}.calculate_log_probs"):
        yield Finding(
            "stop",
            "bypass_mode takes the sampler's log-probs for the old policy's, and the sampler returns none",
            f"{ROLLOUT}.calculate_log_probs=True",
        )
    yield Finding("ok", "anchor: the sampler, μ (its log-probs stand in for the old policy's)")


def _sampling(config: Any) -> Iterator[Finding]:
    for name, off in (("top_p", 1), ("top_k", -1), ("repetition_penalty", 1)):
        value = _get(config, f"{ROLLOUT}.{name}", off)
        if value not in (off, 0 if name == "top_k" else off):
            yield Finding(
                "stop",
                f"{ROLLOUT}.{name}={value}: samples come from a filtered distribution, the trainer's log-probs from the whole",
                f"{ROLLOUT}.{name}={off}",
            )
    if (value := _get(config, f"{ROLLOUT}.min_p")) not in (None, 0):
        yield Finding(
            "stop",
            f"{ROLLOUT}.min_p={value}: verl's rollout has no such setting, and it would filter what is sampled from",
            f"~{ROLLOUT}.min_p",
        )
    if not _get(config, f"{ROLLOUT}.do_sample", True):
        yield Finding(
            "stop",
            f"{ROLLOUT}.do_sample=False: greedy samples are not of the distribution that the trainer scores",
            f"{ROLLOUT}.do_sample=True",
        )
    mode, temperature = _get(config, f"{ROLLOUT}.logprobs_mode"), _get(config, f"{ROLLOUT}.temperature")
    if mode not in (None, "processed_logprobs", "raw_logprobs"):
        yield Finding(
            "stop",
            f"{ROLLOUT}.logprobs_mode={mode}: the ratio needs log-probs of the sampled tokens",
            f"{ROLLOUT}.logprobs_mode=processed_logprobs",
        )
    elif temperature != 1 and mode == "raw_logprobs":
        yield Finding(
            "stop",
            f"{ROLLOUT}.logprobs_mode={mode} are log-probs at temperature 1, and tokens are drawn at {temperature:g}",
            f"{ROLLOUT}.logprobs_mode=processed_logprobs",
        )


def _update(config: Any) -> Iterator[Finding]:
    prompts, samples = _get(config, "data.train_batch_size"), _get(config, f"{ROLLOUT}.n")
    batch, epochs = _get(config, f"{ACTOR}.ppo_mini_batch_size"), _get(config, f"{ACTOR}.ppo_epochs")
    if prompts % batch:
        yield Finding(
            "stop",
            f"{ACTOR}.ppo_mini_batch_size={batch} prompts does not divide data.train_batch_size={prompts}",
            f"{ACTOR}.ppo_mini_batch_size={max(n for n in range(1, min(batch, prompts) + 1) if prompts % n == 0)}",
        )
    else:
        updates = prompts // batch * epochs
        yield Finding(
            "ok",
            f"{prompts} prompts x {samples} = {prompts * samples} samples a rollout, {updates} updates of {batch * samples}"
            + (f" ({epochs} epochs)" if epochs > 1 else ""),
        )
        if updates == 1:
            yield Finding(
                "warning",
                "one update a rollout: π is what sampled, up to the engines' rounding, and a trust region has nothing to bound",
                f"{ACTOR}.ppo_mini_batch_size={max(1, prompts // 4)}",
            )
    estimator = _get(config, "algorithm.adv_estimator")
    if estimator == "gae":
        yield Finding("warning", "algorithm.adv_estimator=gae trains a critic", "algorithm.adv_estimator=grpo")
    if samples == 1 and estimator == "grpo":
        yield Finding("stop", "one sample a prompt: every advantage is 0", f"{ROLLOUT}.n=8")
    if estimator == "grpo" and _get(config, "algorithm.norm_adv_by_std_in_grpo"):
        yield Finding(
            "warning",
            "advantages are divided by their group's standard deviation; the paper centres them only",
            "algorithm.norm_adv_by_std_in_grpo=False",
        )
    if _get(config, f"{ACTOR}.loss_agg_mode") == "seq-mean-token-sum-norm" and not _get(
        config, f"{ACTOR}.loss_scale_factor"
    ):
        yield Finding(
            "warning",
            "seq-mean-token-sum-norm divides by the padded length of each micro-batch, which differs between them",
            f"{ACTOR}.loss_scale_factor={_get(config, 'data.max_response_length')}",
        )
    if _get(config, f"{ACTOR}.fsdp_config.model_dtype") in ("bf16", "bfloat16"):
        yield Finding(
            "warning",
            "weights in bf16: most updates at a learning rate of 1e-6 are lost to rounding",
            f"{ACTOR}.fsdp_config.model_dtype=fp32",
        )


def _data(config: Any) -> Iterator[Finding]:
    for name in ("train_files", "val_files"):
        files = _get(config, f"data.{name}")
        for file in [files] if isinstance(files, str) else files or []:
            if "://" not in file and not Path(file).expanduser().is_file():
                yield Finding(
                    "warning", f"data.{name}: {file}: no such file here", f"drpo data verl FILE.jsonl --out {file}"
                )


def _as_verl_checks(config: Any, found: Sequence[Finding]) -> Iterator[Finding]:
    """What verl itself refuses at once; nothing if the loss has been refused already, at which verl stops."""
    if any(finding.verdict == "stop" for finding in found):
        return
    from hydra.errors import InstantiationException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        # It prints that it is content, and warns that there is no critic.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            validate_config(config, need_reference_policy(config), need_critic(config))
    except InstantiationException as error:
        yield refused(RuntimeError(error.__cause__ or error), "verl refuses")
    except Exception as error:  # an assertion or any other, each in its own words
        # Of the engine, which only has to be where verl's trainer runs.
        if "vllm version None" in str(error):
            yield Finding("warning", f"verl refuses here: {error}", "pip install 'verl[vllm]', where its trainer runs")
        else:
            yield refused(error, "verl refuses")
    else:
        yield Finding("ok", "verl's own checks pass")
