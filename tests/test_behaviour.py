"""The policy that samples is what it is said to be: as precise, as old, and its log-probs its own."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common import KernelPreference

from drpo import DRPOTrainer
from drpo.data.problems import builtin_problems
from drpo.precision import find_experts, make_rollout_model, multiply_in_fp8, quantized, round_in_blocks
from drpo.trainer.token_log import TokenLog
from support.mixtures import make_mixture
from support.rollouts import config, load_model, make_trainer

# What one fp32 model differs from itself by, in batches of other shapes.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def problems() -> Dataset:
    return Dataset.from_list([vars(problem) for problem in builtin_problems("train", 64, seed=0)])


def tokens_of_first_update(output: Path, problems: Dataset, **settings: Any) -> tuple[Tensor, Tensor]:
    """log π and log μ of a rollout's tokens before any update."""
    few = {"per_device_train_batch_size": 64, "updates_per_rollout": 1, "max_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(output, problems, **{**few, "audit_threshold": 10.0, **settings})
    trainer.token_log = TokenLog(trainer.processing_class)
    trainer.train()
    rows = trainer.token_log.take()
    return tuple(torch.tensor([x for row in rows for x in row[name]]) for name in ("logp", "behavior_logp"))  # type: ignore[return-value]


def distance(logp: Tensor, behavior_logp: Tensor) -> float:
    return (logp.exp() - behavior_logp.exp()).abs().mean().item()


def test_the_lower_the_precision_of_the_rollout_the_farther_it_is_from_the_trainer(
    tmp_path: Path, problems: Dataset
) -> None:
    gaps = [
        distance(*tokens_of_first_update(tmp_path, problems, rollout_precision=precision))
        for precision in ("fp32", "fp16", "bf16", "int8", "fp8", "nvfp4")
    ]
    assert sorted(gaps) == gaps
    assert gaps[0] < ROUNDING < gaps[1]
    assert gaps[-1] < 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_trainer_scores_the_same_tokens_otherwise_in_another_precision(
    tmp_path: Path, problems: Dataset, precision: str
) -> None:
    given = {"bf16": None, "rollout_precision": precision}
    low, sampled = tokens_of_first_update(tmp_path, problems, train_precision=precision, **given)
    full, sampled_again = tokens_of_first_update(tmp_path, problems, train_precision="fp32", **given)
    assert torch.equal(sampled, sampled_again)
    assert ROUNDING < distance(low, full) < 0.1
    # Both round, and not alike: where π carries fp32 between its layers, μ carries bf16.
    assert ROUNDING < distance(low, sampled) < 0.1


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "mxfp8", "nvfp4"])
def test_the_copy_samples_with_the_weights_of_now(tmp_path: Path, problems: Dataset, precision: Any) -> None:
    trainer = make_trainer(tmp_path, problems, rollout_precision=precision)
    policy = trainer.model
    ids = torch.tensor([trainer.processing_class("1+2=")["input_ids"]])
    for _ in range(2):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            expected = quantized(make_rollout_model(load_of(policy), precision), precision)(ids).logits
            trainer._rollout_sampler.behavior.begin_rollout(policy)
            with trainer._rollout_sampler.behavior.sampling(policy) as model:
                assert torch.equal(model(ids).logits, expected)
        assert model is not policy


def load_of(policy: nn.Module) -> nn.Module:
    model, _ = load_model()
    model.load_state_dict(policy.state_dict())
    return model


def test_the_log_probs_are_those_of_the_low_precision_policy(tmp_path: Path, problems: Dataset) -> None:
    seen: dict[str, Any] = {}

    class Watched(DRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            completion_ids, log_probs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            seen.update(
                prompt=prompt_ids[0],
                ids=completion_ids[0],
                log_probs=log_probs[0],
                model=self._rollout_sampler.behavior._model,
            )
            return completion_ids, log_probs

    trainer = make_trainer(tmp_path, problems, kind=Watched, rollout_precision="fp8", audit_threshold=10.0)
    trainer.train()
    ids = torch.tensor([[*seen["prompt"], *seen["ids"]]])
    with torch.no_grad():
        logits = seen["model"](ids).logits.float()[0, len(seen["prompt"]) - 1 : -1]
    expected = logits.log_softmax(dim=1).gather(1, torch.tensor(seen["ids"]).unsqueeze(1)).squeeze(1)
    # bf16 of one token at a time and of the whole sequence
    assert (expected - torch.tensor(seen["log_probs"])).abs().mean() < 0.02


def test_products_of_mxfp8_are_those_of_torchaos_emulation() -> None:
    layers = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
    expected, states = copy.deepcopy(layers), torch.randn(3, 5, 64, dtype=torch.bfloat16)
    quantize_(expected, MXDynamicActivationMXWeightConfig(kernel_preference=KernelPreference.EMULATED))
    assert torch.equal(quantized(layers, "mxfp8")(states), expected(states))


def test_nvfp4_keeps_the_numbers_that_it_has_and_rounds_others_to_the_nearest() -> None:
    # The largest number of a block, 6, makes its scale 1. After 4, 6 is next; e2m1 has no 5, and a tie goes to the even mantissa.
    numbers = torch.tensor([6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -6.0, -0.5, 4.9, 5.1, 2.4, 2.6, 0.2, 0.3])
    exact = [6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -6.0, -0.5, 4.0, 6.0, 2.0, 3.0, 0.0, 0.5]
    blocks = torch.stack([numbers, 2 * numbers])
    # A scale is e4m3, which has 1 and 2: another block's numbers are not rounded by its neighbor's.
    assert round_in_blocks(blocks.flatten(), "nvfp4").tolist() == [*exact, *(2 * number for number in exact)]


@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("size", [1.0, 0.02, 0.002])
def test_weights_are_rounded_alike_whatever_their_size(precision: str, size: float) -> None:
    torch.manual_seed(0)
    weight = size * torch.randn(64, 128)
    error = (round_in_blocks(weight, precision, scaled_as_a_whole=True) - weight).norm() / weight.norm()
    assert error < {"mxfp8": 0.04, "nvfp4": 0.11}[precision]


@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_a_token_is_rounded_alike_in_any_batch(precision: str) -> None:
    states = torch.randn(4, 128) * torch.tensor([[0.01], [1.0], [3.0], [100.0]])
    together = round_in_blocks(states, precision)
    assert all(
        torch.equal(round_in_blocks(row, precision), rounded) for row, rounded in zip(states, together, strict=True)
    )


def test_fp8_training_leaves_the_weights_and_their_names_as_they_are_and_has_a_gradient() -> None:
    model, _ = load_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = copy.deepcopy(model)
    multiply_in_fp8(converted)
    assert list(converted.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in converted.state_dict().items())
    assert type(converted.lm_head) is nn.Linear
    ids = torch.arange(3, 19).view(2, 8)
    for each in (model, converted):
        each(ids).logits.log_softmax(dim=2)[..., 5].mean().backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None
        exact = model.get_parameter(name).grad
        assert torch.nn.functional.cosine_similarity(parameter.grad.flatten(), exact.flatten(), dim=0) > 0.8, name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rollout_precision": "fp4"}, "rollout_precision: unknown precision 'fp4'; did you mean 'nvfp4'?"),
        ({"train_precision": "int8"}, "train_precision: unknown precision 'int8'"),
        ({"train_precision": "fp32", "bf16": True}, "train_precision='fp32' contradicts bf16=True"),
        ({"train_precision": "fp8"}, "train_precision='fp8' contradicts bf16=False"),
        ({"train_precision": "fp16", "bf16": True}, "train_precision='fp16' contradicts bf16=True"),
        (
            {"train_precision": "fp16"},
            "fp16 needs a GPU, where Accelerate scales the loss; expected train_precision='bf16'",
        ),
        ({"rollout_lag": -1}, "rollout_lag is -1; expected a whole number, at least 0"),
        ({"rollout_lag": 1.5}, "rollout_lag is 1.5; expected a whole number, at least 0"),
        ({"rollout_lag": 2, "use_vllm": True}, "rollout_lag=2: vLLM samples by its own weights; leave it out"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=r"precision|rollout_lag") as error:
        config(tmp_path, **settings)
    assert expected in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_weights_in_another_precision_than_training_keeps_are_refused(
    tmp_path: Path, problems: Dataset, precision: str
) -> None:
    model, _ = load_model(torch.bfloat16)
    expected = f"train_precision='{precision}' keeps weights in fp32, and the model has .* in bfloat16"
    with pytest.raises(ValueError, match=expected):
        make_trainer(tmp_path, problems, model=model, train_precision=precision, bf16=None)


@pytest.mark.parametrize(("precision", "is_refused"), [("fp32", True), ("bf16", False)])
def test_frozen_weights_beneath_adapters_may_be_bf16_where_training_computes_in_it(
    tmp_path: Path, problems: Dataset, precision: str, is_refused: bool
) -> None:
    model, _ = load_model(torch.bfloat16)
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {"model": model, "peft_config": adapters, "train_precision": precision, "bf16": None}
    with pytest.raises(ValueError, match="keeps weights in fp32") if is_refused else nullcontext():
        make_trainer(tmp_path, problems, **given)


class Aged(DRPOTrainer):
    """Keeps the weights at the beginning of each rollout, and what was sampled with which log-probs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights: list[dict[str, Tensor]] = []
        self.rollouts: list[dict[str, Tensor]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        output = super()._generate_and_score_completions(inputs)
        self.rollouts.append({name: value.clone() for name, value in output.items() if isinstance(value, Tensor)})
        return output


def sampled_log_probs(weights: dict[str, Tensor], rollout: dict[str, Tensor]) -> Tensor:
    """Of the tokens of a rollout, one by one, under these weights."""
    model, _ = load_model()
    model.load_state_dict(weights)
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    width = rollout["completion_ids"].shape[1]
    log_probs = logits[:, -width - 1 : -1].log_softmax(dim=2)
    return log_probs.gather(2, rollout["completion_ids"].unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("lag", [0, 1, 4, 16])
def test_samples_are_of_the_policy_so_many_rollouts_ago_and_say_so(tmp_path: Path, problems: Dataset, lag: int) -> None:
    rollouts = lag + 3
    settings = {"updates_per_rollout": 1, "max_steps": rollouts, "drop_zero_advantage": False, "audit_threshold": 1.0}
    trainer = make_trainer(tmp_path, problems, kind=Aged, rollout_lag=lag, **settings)
    trainer.token_log = TokenLog(trainer.processing_class)
    trainer.train()
    # In the first rollouts there is nothing older than the beginning.
    ages = [min(rollout, lag) for rollout in range(rollouts)]
    assert [int(rollout["age"].unique()) for rollout in trainer.rollouts] == ages
    assert {row["age"] for row in trainer.token_log.take()} == set(ages)
    logged = [row["rollout/age"] for row in trainer.state.log_history if "rollout/age" in row and "loss" in row]
    assert logged == (ages if lag else [])
    for index in (0, lag, rollouts - 1):
        rollout = trainer.rollouts[index]
        counted = rollout["completion_mask"].bool()

        def gap(weights: dict[str, Tensor], rollout: dict[str, Tensor] = rollout, counted: Tensor = counted) -> float:
            difference = sampled_log_probs(weights, rollout) - rollout["sampling_per_token_logps"]
            return difference[counted].abs().max().item()

        assert gap(trainer.weights[index - ages[index]]) < 1e-4
        if ages[index]:
            assert gap(trainer.weights[index]) > 1e-3
            assert gap(trainer.weights[index - ages[index] + 1]) > 1e-3


@pytest.mark.parametrize("settings", [{"rollout_lag": 2}, {"rollout_lag": 1, "rollout_precision": "int8"}])
def test_a_resumed_run_samples_from_the_same_past_weights(
    tmp_path: Path, problems: Dataset, settings: dict[str, Any]
) -> None:
    given = {"updates_per_rollout": 1, "audit_threshold": 1.0, "save_strategy": "steps", "save_steps": 4, **settings}
    whole, resumed = (make_trainer(tmp_path, problems, kind=Aged, max_steps=7, **given) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(resumed.rollouts) == 3
    for mine, expected in zip(resumed.rollouts, whole.rollouts[4:], strict=True):
        for name, tensor in expected.items():
            assert torch.equal(mine[name], tensor), name
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_resumed_run_is_not_audited_on_samples_of_older_weights(
    tmp_path: Path, problems: Dataset, capsys: pytest.CaptureFixture[str], precision: str | None
) -> None:
    given = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 8, "rollout_precision": precision}
    whole, resumed = (make_trainer(tmp_path, problems, max_steps=12, rollout_lag=2, **given) for _ in range(2))
    whole.train()
    assert whole.audit is not None
    capsys.readouterr()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.audit is None
    assert "Audit" not in capsys.readouterr().out
    logged = [row for row in resumed.state.log_history if row["step"] > 8]
    assert logged
    assert not any(name.startswith("audit/") for row in logged for name in row)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_experts_multiply_in_fp8_as_linear_layers_do() -> None:
    mixture = make_mixture()
    experts = find_experts(mixture)[0]
    layers = nn.ModuleList([nn.Linear(32, 32, bias=False), nn.Linear(16, 32, bias=False)])
    gate_up, down = layers
    with torch.no_grad():
        gate_up.weight.copy_(experts.gate_up_proj[3])
        down.weight.copy_(experts.down_proj[3])
    states, chosen = torch.randn(5, 32), torch.full((5, 1), 3)
    exact = experts(states, chosen, torch.ones(5, 1))
    multiply_in_fp8(mixture)
    multiply_in_fp8(layers)
    outputs = experts(states, chosen, torch.ones(5, 1))
    expected = layers[1](experts._apply_gate(layers[0](states)))
    torch.testing.assert_close(outputs, expected)
    assert (outputs - exact).norm() > 0.01 * exact.norm()
    outputs.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(experts.gate_up_proj.grad[3], layers[0].weight.grad)
    torch.testing.assert_close(experts.down_proj.grad[3], layers[1].weight.grad)
    assert not experts.down_proj.grad[2].any()


def test_a_copy_of_a_mixture_in_fp8_multiplies_with_its_own_experts() -> None:
    mixture = make_mixture()
    multiply_in_fp8(mixture)
    copied = copy.deepcopy(mixture)
    for ours, theirs in zip(find_experts(mixture), find_experts(copied), strict=True):
        assert theirs.forward.__self__ is theirs is not ours


@pytest.mark.parametrize(
    ("architecture", "precision", "message"),
    [
        ("GptOss", "fp8", "fp8 does not know the layout of GptOssExperts"),
        ("Qwen3Moe", "int8", "rollout_precision='int8' quantizes linear layers, which a mixture's experts are not"),
        ("Qwen3Moe", "nvfp4", "rollout_precision='nvfp4' quantizes linear layers, which a mixture's experts are not"),
    ],
)
def test_experts_that_a_precision_would_leave_out_are_refused(architecture: str, precision: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rollout_model(make_mixture(architecture), precision)
