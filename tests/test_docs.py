"""What the documentation shows runs, and what it says agrees with the code and with the committed results."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trl import GRPOConfig

import test_fuzz
import test_objectives
from drpo import CORRECTIONS, OBJECTIVES, DRPOConfig, objectives
from drpo.cli.catalogue import describe_fields
from drpo.lab.grid import BESIDE, COMPARED, CORE, DELTAS, PENALTIES, PRESETS, best_rate
from drpo.lab.statistics import area_under, has_collapsed, probability_of_improvement
from drpo.run.recipe import Recipe
from drpo.run.specs import TaskSpec

ROOT = Path(__file__).parents[1]

sys.path.append(str(ROOT / "scripts"))
import findings  # noqa: E402

PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
SEEN = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


class TestContributing:
    """The worked example of adding an objective, as it stands there."""

    @pytest.fixture(scope="class")
    @staticmethod
    def blocks() -> list[str]:
        text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        return [textwrap.dedent(block) for block in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)]

    @pytest.fixture
    def capped(self, blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        (tmp_path / "capped.py").write_text(blocks[0], encoding="utf-8")
        spec = importlib.util.spec_from_file_location("capped", tmp_path / "capped.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "capped", module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(OBJECTIVES, "capped", module.Capped)
        return module

    def test_keeps_the_contract(self, capped: ModuleType) -> None:
        for spread in (0.1, 2.0, 1000.0):
            test_objectives.test_the_gradient_is_minus_advantage_times_ratio_times_weight("capped", spread, False)
        test_objectives.test_the_loss_passes_gradcheck_away_from_kinks("capped", False)
        test_fuzz.test_loss_weight_and_gradient_are_finite_and_match_an_independent_reference(name="capped")

    def test_has_the_values_worked_by_hand(self, capped: ModuleType, blocks: list[str]) -> None:
        cases = eval(blocks[1], {"pytest": pytest, "Capped": capped.Capped})
        assert len(cases) == 2
        for case in cases:
            test_objectives.test_weight_and_loss_are_those_worked_by_hand(*case.values)

    def test_shows_a_row_of_the_table_s_shape(self, blocks: list[str]) -> None:
        header = next(line for line in PAPERS.splitlines() if line.startswith("| objective |"))
        assert blocks[2].count("|") == header.count("|")


def test_every_list_of_objectives_has_all_of_them() -> None:
    family = SEEN[SEEN.index("The family, by kind:") :]
    table = family[: family.index("```")]
    assert set(re.findall(r"`(\w+)`", table)) == set(OBJECTIVES)
    assert f"and {len(OBJECTIVES) - 1} others" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {kind.__name__ for kind in OBJECTIVES.values()} <= set(objectives.__all__)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_its_row_with_file_anchor_and_defaults(name: str) -> None:
    objective = OBJECTIVES[name]
    (row,) = [line for line in PAPERS.splitlines() if line.startswith(f"| `{name}` |")]
    file = f"{objective.__module__.split('.')[-1]}.py"
    assert f"[{file}](../src/drpo/objectives/{file})" in row
    assert (ROOT / "src" / "drpo" / "objectives" / file).is_file()
    _, _, anchor, operator, outside, scope, side, *_ = re.split(r"(?<!\\)\|", row)
    assert anchor.strip().startswith({"sampler": "μ", "old": "π_old"}[objective.anchor])
    if (region := objective.region) is not None:
        columns = [objective.operator, region.where.replace("|", "\\|"), region.scope.name, region.side.name]
        assert [column.strip() for column in (operator, outside, scope, side)] == columns


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_has_its_row_with_its_region(name: str) -> None:
    correction = CORRECTIONS[name]
    (row,) = [line for line in PAPERS.splitlines() if line.startswith(f"| `{name}` |")]
    _, _, edge, operator, outside, scope, side, default, *_ = re.split(r"(?<!\\)\|", row)
    assert edge.strip().startswith(correction.region.edge.name.split(",")[0])
    region = correction.region
    columns = [correction.operator, region.where.replace("|", "\\|"), region.scope.name, region.side.name]
    assert [column.strip() for column in (operator, outside, scope, side)] == columns
    assert default.strip().startswith("–".join(f"{field.default:g}" for field in dataclasses.fields(correction)))


@pytest.mark.parametrize("kind", [*OBJECTIVES.values(), *CORRECTIONS.values()])
def test_every_field_says_what_it_is_for(kind: type) -> None:
    described = describe_fields(kind)
    assert [field.name for field in dataclasses.fields(kind) if not described.get(field.name)] == []


def option_row(name: str, default: Any, description: str) -> str:
    shown = "required" if default is None else f"`{default!r}`" if default != "None" else "–"
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", description).replace("|", "\\|")
    return f"| `{name}` | {shown} | {text} |"


def test_every_field_of_a_recipe_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for prefix, kind in (("", Recipe), ("task.", TaskSpec)):
        for name, field in kind.model_fields.items():
            value = field.get_default(call_default_factory=True)
            default = None if field.is_required() else "None" if value is None else value
            assert option_row(prefix + name, default, field.description or "") in page


def test_every_option_of_the_trainer_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    described = describe_fields(DRPOConfig)
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = [field for field in dataclasses.fields(DRPOConfig) if field.name not in inherited]
    for field in own:
        default = "None" if field.default is None else field.default
        assert option_row(field.name, default, described[field.name]) in page


def rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / "results" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_of_all_objectives_is_that_of_the_committed_runs() -> None:
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows("objectives.csv"):
        runs.setdefault((row["objective"], row["hyperparameters"]), []).append(row)
    assert {name for name, _ in runs} <= set(OBJECTIVES)
    assert len(runs) >= 26
    for (name, hyperparameters), seeds in runs.items():
        given: dict[str, Any] = json.loads(hyperparameters)
        accuracies = [float(row["accuracy_after"]) for row in seeds]
        said = ", ".join(f"{field} {value:g}" for field, value in given.items()) or "–"
        divergence = statistics.fmean(float(row["mean_divergence"]) for row in seeds)
        assert [row["seed"] for row in seeds] == ["0", "1", "2"]
        assert (
            f"| `{name}` | {said} | {' / '.join(f'{a:.3f}' for a in accuracies)} | "
            f"{statistics.fmean(accuracies):.3f} | {divergence:.4f} |"
        ) in SEEN


def test_the_table_of_variances_is_that_of_the_committed_results() -> None:
    for row in rows("topk_variance.csv"):
        top_k = row["top_k"] if row["top_k"] != row["vocabulary"] else f"all {int(row['vocabulary']):,}"
        assert (
            f"| {row['total_variation']} | {top_k} | {float(row['mass_of_top_k']):.3f} | "
            f"{float(row['penalty_variance_over_drpo']):.2g} | {float(row['gradient_variance_over_drpo']):.3f} |"
        ) in SEEN


def test_the_table_of_the_grader_s_cost_is_that_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    for row in rows("grader.csv"):
        assert (
            f"| {row['completions']} | {row['method']} | {int(row['per_second']):,} | {row['p50_ms']} | {row['p99_ms']} |"
        ) in page


class TestPerformance:
    PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")

    def test_the_fused_loss_is_as_measured(self) -> None:
        measured = rows("fused_loss.csv")
        shape = ("tokens", "width", "vocabulary", "dtype", "busy")
        for row in measured:
            if row["busy"] == "1":
                if row["time_over_products"]:
                    assert f"| {row['peer']} | {row['time_over_products']} |" in self.PAGE
            elif [row[name] for name in shape] == [measured[0][name] for name in shape]:
                time, memory = row["time_over_products"] or "does not run here", row["extra_mib"] or "–"
                assert f"| {row['peer']} | {time} | {memory} |" in self.PAGE
            elif row["peer"] == "drpo" and row["width"] == measured[0]["width"]:
                by = "tokens" if row["tokens"] != measured[0]["tokens"] else "vocabulary"
                numbers = f"{float(row['seconds']):.3f} | {float(row['extra_mib']):.1f}"
                assert f"| {by} | {int(row[by]):,} | {numbers} |" in self.PAGE

    def test_the_training_phase_is_as_measured(self) -> None:
        found: dict[tuple[str, str], dict[str, str]] = {}
        for row in rows("training_phase.csv"):
            times = found.setdefault((row["lengths"], row["without_advantage"]), {})
            times[row["trainer"]] = row["times_faster_than_trl"]
        for (lengths, share), times in found.items():
            assert times.pop("TRL") == "1.00"
            assert f"| {lengths} | {float(share):.0%} | {' | '.join(times.values())} |" in self.PAGE

    def test_the_training_phase_by_lengths_is_as_measured(self) -> None:
        times: dict[str, list[str]] = {}
        for row in rows("training_lengths.csv"):
            if row["trainer"] == "drpo":
                times.setdefault(row["prompt"], []).append(row["times_faster_than_trl"])
        for prompt, ratios in times.items():
            assert f"| {prompt} | {' | '.join(ratios)} |" in self.PAGE

    def test_generation_is_as_measured(self) -> None:
        times = {(row["lengths"], row["what"]): row for row in rows("generation.csv")}
        for lengths in ("flat", "sampled", "one long"):
            ours, shared, theirs = (times[lengths, what] for what in ("drpo", "prompts shared", "Transformers"))
            cells = (
                lengths,
                ours["mean_tokens"],
                ours["median_seconds"],
                shared["times_of_drpo"],
                theirs["times_of_drpo"],
            )
            assert f"| {' | '.join(cells)} |" in self.PAGE
        assert f"`logsumexp` {times['one draw', 'Transformers']['times_of_drpo']} times as long" in self.PAGE

    def test_attention_is_as_measured(self) -> None:
        times = {(row["model"], row["pass"], row["keys"], row["precision"]): row for row in rows("attention.csv")}
        for *case, _ in times:
            cells = [*case, *(times[*case, precision]["times_faster"] for precision in ("fp32", "bf16"))]
            assert f"| {' | '.join(cells)} |" in self.PAGE

    def test_the_time_to_accuracy_is_as_measured(self) -> None:
        reached = {
            (row["model"], row["seed"], row["trainer"]): row["seconds_to_target"]
            for row in rows("time_to_accuracy.csv")
        }
        for model, seed in {(model, seed) for model, seed, _ in reached}:
            trl, ours = reached[model, seed, "TRL"], reached[model, seed, "drpo"]
            cells = [trl, ours, f"{float(trl) / float(ours):.2f}"] if ours else [trl, "–", "–"]
            assert f"| {seed} | {' | '.join(cells)} |" in self.PAGE

    def test_a_gpu_is_as_measured(self) -> None:
        times: dict[str, dict[str, str]] = {}
        memory: dict[str, dict[str, str]] = {}
        for row in rows("gpu/fused_loss.csv"):
            ratio = row["time_over_products"]
            times.setdefault(row["tokens"], {})[row["peer"]] = f"{float(ratio):.2f}" if ratio else "out of memory"
            memory.setdefault(row["tokens"], {})[row["peer"]] = f"{float(row['extra_mib'] or 0):.0f}"
        for tokens, ratios in times.items():
            columns = [ratios[peer] for peer in ("drpo", "TRL", "cut-cross-entropy", "PyTorch")]
            columns += [memory[tokens][peer] for peer in ("drpo", "TRL")]
            assert f"| {int(tokens):,} | {' | '.join(columns)} |" in self.PAGE
        phases = {(row["without_advantage"], row["trainer"]): row for row in rows("gpu/training_phase.csv")}
        for (share, trainer), row in phases.items():
            if trainer == "drpo":
                columns = [phases[share, "TRL"]["seconds"], row["seconds"], row["times_faster_than_trl"]]
                assert f"| {float(share):.0%} | {' | '.join(columns)} |" in self.PAGE
        for row in rows("gpu/low_precision.csv"):
            columns = [row[name] for name in ("rollout", "log_ratio_mean", "log_ratio_p99", "time_over_bf16")]
            assert f"| {' | '.join(columns)} |" in self.PAGE


class TestOffPolicy:
    PAGE = (ROOT / "docs" / "off-policy.md").read_text(encoding="utf-8")

    def test_the_gaps_of_engines_are_as_measured(self) -> None:
        for row in rows("engine_gap.csv"):
            gaps = [f"{float(row[name]):.2g}".replace("e-0", "e-") for name in ("mean", "p99")]
            assert f"| {row['engine']} | {row['rollout']} | {row['train']} | {' | '.join(gaps)} |" in self.PAGE

    def test_the_gaps_that_routers_make_are_as_measured(self) -> None:
        means: dict[tuple[str, str], dict[str, float]] = {}
        for row in rows("router_gap.csv"):
            mean, p99, elsewhere = (float(row[name]) for name in ("mean", "p99", "other_tokens"))
            numbers = f"{mean:.2g} | {p99:.2g} | {elsewhere:.1%}"
            assert f"| {row['model']} | {row['rollout']} | {row['train']} | {numbers} |" in self.PAGE
            means.setdefault((row["rollout"], row["train"]), {})[row["model"]] = mean
        for of_models in means.values():
            assert of_models["mixture with replay"] < min(of_models["mixture"], of_models["dense"])

    def test_an_engine_without_new_weights_is_as_far_off_as_measured(self) -> None:
        of_rollout = {
            row["rollout"]: float(row["engine/divergence/mean"])
            for row in rows("off_policy.csv")
            if row["cause"] == "vLLM that gets no new weights"
        }
        assert (
            f"for {of_rollout['2']:.3f} at the second rollout and {of_rollout['30']:.3f} at the thirtieth" in self.PAGE
        )

    def test_another_prompt_scatters_the_first_tokens_as_measured(self) -> None:
        gaps: dict[bool, list[float]] = {True: [], False: []}
        for row in rows("mistakes.csv"):
            if row["fault"] == "a space more in the sampler's prompt":
                gaps[int(row["token"]) < 2].append(abs(float(row["logp"]) - float(row["behavior_logp"])))
        first, later = (statistics.fmean(gaps[is_first]) for is_first in (True, False))
        assert f"the first two by {first:.2f} nats on average and the later ones by {later:.2f}" in self.PAGE


def test_a_real_model_learns_as_measured() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    seeds: dict[str, list[dict[str, str]]] = {}
    for row in rows("real_model.csv"):
        if row["accuracy"]:
            seeds.setdefault(row["seed"], []).append(row)
    assert len(seeds) == 3
    for seed, (before, *_, after) in seeds.items():
        shown = (f"{float(r['accuracy']):.2f} [{float(r['low']):.2f}, {float(r['high']):.2f}]" for r in (before, after))
        assert f"| {seed} | {' | '.join(shown)} | {float(after['train_seconds']) / 60:.1f} |" in page
        assert float(after["accuracy"]) - float(before["accuracy"]) >= 0.3
        assert float(after["low"]) > float(before["high"])


def test_what_a_checkpoint_costs_is_as_measured() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    measured = {row["what"]: row for row in rows("checkpoint.csv")}
    assert f"in {float(measured['drpo']['times_trl']):.1f} times its time" in page
    assert f"takes {float(measured['drpo, no checksums']['times_trl']):.2f} times TRL's" in page
    assert {f"{float(row['bytes_of_trl']):.2f}" for row in measured.values()} == {"1.00"}


class TestFindings:
    PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")

    def test_the_exact_study_is_as_summed(self) -> None:
        moments = {(row["mismatch"], row["arm"]): row for row in rows("lab_exact.csv")}
        for (mismatch, arm), row in moments.items():
            if mismatch == "stale":
                numbers = " | ".join(f"{float(row[name]):.3f}" for name in ("bias", "deviation", "cosine"))
                assert f"| {arm} | {numbers} |" in self.PAGE
        for mismatch, largest in (("bf16", 0.001), ("fp8", 0.04)):
            surrogate = float(moments[mismatch, "pg"]["deviation"])
            others = [float(row["deviation"]) for (name, _), row in moments.items() if name == mismatch]
            assert max(abs(deviation / surrogate - 1) for deviation in others) < largest
        rare = {
            arm: sum(float(row[name]) for name in ("μ≤0.001", "μ≤0.01"))
            for (kind, arm), row in moments.items()
            if kind == "stale"
        }
        assert f"{rare['pg']:.0%}".replace("%", " %") + " comes from tokens with μ ≤ 0.01" in self.PAGE
        assert min(rare.values()) > 0.36

    def test_its_tables_are_made_from_the_results(self) -> None:
        assert findings.with_tables(self.PAGE) == self.PAGE

    @pytest.mark.parametrize("setting", ["bf16", "sanity"])
    def test_what_the_settings_show_is_in_the_results(self, setting: str) -> None:
        rows = {run: row for run, row in findings.read_runs().items() if run.setting == setting}
        runs = {run: area_under(row["accuracy"]) for run, row in rows.items()}
        arms, slow = (*COMPARED, *BESIDE), {"drpo(0.05)", "gspo"}
        assert {best_rate(setting, arm, runs) for arm in arms} == {5e-5}
        tuned_runs = {run: area for run, area in runs.items() if run.learning_rate == 5e-5}
        assert all(0.905 <= area <= 0.965 for run, area in tuned_runs.items() if run.arm not in slow)
        others = {arm: [area for run, area in tuned_runs.items() if run.arm == arm and run.seed] for arm in arms}
        assert {len(others[arm]) for arm in COMPARED} == {5}
        over_ppo = {arm: probability_of_improvement(others["ppo"], others[arm]) for arm in arms}
        assert {arm for arm, better in over_ppo.items() if not better.low <= 0.5 <= better.high} == slow
        assert all(over_ppo[arm].value < 0.5 for arm in slow)
        assert not any(has_collapsed(rows[run]["accuracy"]) for run in tuned_runs)
        fast = {run.arm: run for run in runs if run.learning_rate == 2e-4}
        assert {arm for arm, run in fast.items() if not has_collapsed(rows[run]["accuracy"])} == {"gspo"}
        without = {"pg", "spo", "drpo(12.5)", "cispo"}
        assert max(runs[fast[arm]] for arm in without) < 0.125
        assert min(runs[fast[arm]] for arm in set(arms) - without) > 0.205
        assert max(runs[fast[arm]] for arm in set(arms) - without - {"gspo"}) < 0.495
        if setting == "sanity":
            last = [rows[run]["accuracy"][-1] for run in tuned_runs if run.arm not in slow]
            assert 0.925 <= min(last) <= max(last) <= 0.995

    def test_what_the_ablations_show_is_in_the_results(self) -> None:
        runs, plan = findings.read_runs(), PRESETS["arms"]({})
        means: dict[tuple[str, float], list[float]] = {}
        collapsed: dict[tuple[str, float], list[bool]] = {}
        for run in plan:
            accuracy = runs[run]["accuracy"]
            means.setdefault((run.arm, run.learning_rate), []).append(area_under(accuracy))
            collapsed.setdefault((run.arm, run.learning_rate), []).append(has_collapsed(accuracy))
        assert {len(of_cell) for of_cell in means.values()} == {3}
        for rate in (1.4e-4, 2e-4):
            better = probability_of_improvement(means["drpo(0.2)", rate], means["drpo_unweighted", rate])
            assert better.low <= 0.5 <= better.high
            assert not any(collapsed[arm, rate][seed] for arm in ("drpo_kl(5)", "drpo_tv(5)") for seed in range(3))
            assert max(means["drpo_k3(5)", rate]) < min(means["drpo(0.2)", rate])
        assert all(all(collapsed[f"{name}(0.08)", 2e-4]) for name in PENALTIES)
        assert max(*means["drpo_kl(5)", 1.4e-4], *means["drpo_tv(5)", 1.4e-4]) < min(means["drpo(0.2)", 1.4e-4])
        assert min(means["drpo_tv(5)", 2e-4]) > max(means["drpo(0.2)", 2e-4])
        parents = (*means["dppo_tv(0.15)", 2e-4], *means["drpo(0.2)", 2e-4])
        assert max(means["mask_drpo", 2e-4]) < min(parents)
        assert not any(collapsed["gspo", 2e-4])
        assert max(means["cispo", 2e-4]) < 0.08
        before = [runs[run]["accuracy"][0] for run in plan]
        assert f"one that solves {statistics.median(before):.0%} before".replace("%", " %") in self.PAGE

    def test_what_the_runs_show_is_in_the_results(self) -> None:
        cells = findings.read_cells()
        safe = [row["accuracy"][-1] for (_, rate, _), rows in cells.items() for row in rows if rate == 5e-5]
        assert 0.94 <= min(safe) <= max(safe) <= 0.985
        slow = {arm: findings.estimate(findings.areas(cells, arm, 1e-4)).value for arm in CORE}
        assert max(slow.values()) - min(slow.values()) < 0.07
        assert not any(has_collapsed(row["accuracy"]) for arm in CORE for row in cells[arm, 1e-4, findings.UPDATES])
        regions = [arm for arm in CORE if arm not in findings.WITHOUT_REGION]
        assert min(min(findings.areas(cells, arm, 2e-4)) for arm in regions) >= 0.25
        assert max(max(findings.areas(cells, arm, 2e-4)) for arm in findings.WITHOUT_REGION) <= 0.205
        broken = [has_collapsed(row["accuracy"]) for arm in regions for row in cells[arm, 2e-4, findings.UPDATES]]
        assert broken.count(False) == 1
        for arm, rate in itertools.product(("drpo(0.2)", "dppo_tv(0.15)"), (1.4e-4, 2e-4)):
            ours, ppo = (findings.areas(cells, name, rate) for name in (arm, "ppo"))
            better = probability_of_improvement(ppo, ours)
            assert better.low <= 0.5 <= better.high
        collapsed = {arm: [has_collapsed(row["accuracy"]) for row in cells[arm, 1.4e-4, 16]] for arm in CORE}
        assert all(any(collapsed[arm]) for arm in findings.WITHOUT_REGION)
        assert not any(any(collapsed[arm]) for arm in ("ppo", "dppo_tv(0.15)", "drpo(0.2)"))
        swept = {
            (kind, delta): [has_collapsed(row["accuracy"]) for row in cells[f"{kind}({delta:g})", 1.4e-4, 16]]
            for kind, delta in itertools.product(("drpo", "dppo_tv"), DELTAS)
        }
        assert {len(runs) for runs in swept.values()} == {5}
        assert not any(any(swept["drpo", delta]) for delta in (0.1, 0.15, 0.2, 0.4, 1.0))
        assert sum(swept["drpo", 0.05]) == 1
        by_seed = [
            {row["seed"]: row["accuracy"] for row in cells[f"dppo_tv({delta:g})", 1.4e-4, 16]}
            for delta in (1.0, 2.5, 12.5)
        ]
        assert by_seed[0] == by_seed[1] == by_seed[2]
        plateau = [findings.areas(cells, f"drpo({delta:g})", 1.4e-4) for delta in (0.15, 0.2, 0.4)]
        ppo = findings.areas(cells, "ppo", 1.4e-4)
        assert all((better := probability_of_improvement(ppo, ours)).low <= 0.5 <= better.high for ours in plateau)
        tight = findings.areas(cells, "drpo(0.05)", 1e-4)
        assert max(tight) < min(min(findings.areas(cells, arm, 1e-4)) for arm in regions if arm != "drpo(0.05)")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/papers.md",
        "docs/objectives.md",
        "docs/math.md",
        "docs/performance.md",
        "docs/verl.md",
        "docs/off-policy.md",
        "docs/doctor.md",
        "docs/findings.md",
        "docs/trl.md",
        "docs/command-line.md",
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert ((ROOT / page).parent / target).exists(), target
