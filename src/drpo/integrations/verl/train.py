"""``drpo train --engine verl``: verl's own trainer on a recipe, with the run folder that ``drpo report`` reads."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoTokenizer

from drpo.data.problems import BUILTIN_MODELS, Problem, tokenize_prompt
from drpo.errors import TrainingInterruptedError, UserError
from drpo.files import append_jsonl, read_jsonl, write_json
from drpo.integrations.verl.cpu.settings import environment as environment_on_cpu
from drpo.integrations.verl.hydra import compose_main_ppo
from drpo.integrations.verl.overrides import as_arguments, changed, overrides
from drpo.integrations.verl.problems import write_rows
from drpo.redact import find_secret
from drpo.report.verl_log import rename_metrics
from drpo.run.build import load_problems
from drpo.run.folder import RunFolder
from drpo.run.progress import Progress
from drpo.run.recipe import Recipe


class VerlError(Exception):
    """verl's trainer has failed; the message says where its own words are."""


@dataclass(frozen=True)
class Plan:
    """A recipe as a run of verl's trainer, of which nothing has been written.

    Args:
        settings: of verl's own, which win over what follows from the recipe.
        arguments: of ``main_ppo``.
        config: what verl composes of them.
        checkpoint: what the run goes on from; None of a run from the start.
    """

    recipe: Recipe
    folder: RunFolder
    problems: Sequence[Problem]
    heldout: Sequence[Problem]
    settings: Sequence[str]
    arguments: Sequence[str]
    config: Any
    checkpoint: Path | None = None


def plan(recipe: Recipe, folder: RunFolder, more: Sequence[str] = (), *, resume: bool = False) -> Plan:
    """What verl would be started with.

    Args:
        recipe: the run.
        folder: where everything will go; verl's own output to ``verl/`` in it.
        more: overrides for verl, which win over what follows from the recipe.
        resume: whether to go on with the run in the folder, which keeps the overrides that it was given.

    Raises:
        UserError: something that verl would not do as the recipe says, or no checkpoint to go on from.
    """
    for setting in more:
        if find_secret([setting]):
            raise UserError(
                f"--verl {setting}: holds a secret, which would be written to the run folder; expected it in the environment"
            )
    # verl's workers load it again, long after the folder is there.
    recipe.make_reward()
    problems = load_problems(recipe, "train", recipe.rollouts * recipe.prompts_per_rollout)
    heldout = load_problems(recipe, "heldout", recipe.heldout_problems)
    if not heldout:
        raise UserError("task.heldout: is missing; verl's trainer needs held-out problems")
    source = str(BUILTIN_MODELS.get(recipe.model, recipe.model))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        raise UserError(f"model: {recipe.model} has no tokenizer that can be loaded ({error})") from error
    if recipe.task.stop is not None:
        raise UserError("task.stop: verl ends completions as the model does; leave it out")
    recipe.task.apply(tokenizer)
    # verl cuts what is longer, held-out prompts too.
    longest = max(len(tokenize_prompt(problem, tokenizer)) for problem in (*problems, *heldout))
    settings = overrides(
        recipe, folder.path.absolute(), len(problems), longest, plain=not tokenizer.chat_template, resume=resume
    )
    extra = changed(folder.verl_settings or [], more) if resume else list(more)
    arguments = as_arguments(settings, extra)
    config = compose_main_ppo(arguments, extra)
    if "file" not in config.trainer.logger:
        raise UserError(
            f"--verl trainer.logger={config.trainer.logger}: leaves out file, which the run's rows are read from; expected "
            "it among them"
        )
    return Plan(recipe, folder, problems, heldout, extra, arguments, config, _checkpoint(config) if resume else None)


def _checkpoint(config: Any) -> Path:
    """The checkpoint that verl's trainer would go on from.

    Raises:
        UserError: there is none.
    """
    if config.trainer.resume_mode == "resume_path":
        checkpoint = Path(str(config.trainer.resume_from_path))
    else:
        # verl writes it last, once all of a checkpoint is there.
        tracker = Path(config.trainer.default_local_dir) / "latest_checkpointed_iteration.txt"
        if not tracker.is_file():
            raise UserError(
                f"--resume: verl's trainer has finished no checkpoint in {tracker.parent} (it saves one every "
                f"{config.trainer.save_freq} rollouts); expected a run from the start in another --output"
            )
        checkpoint = tracker.parent / f"global_step_{tracker.read_text().strip()}"
    if not checkpoint.is_dir():
        raise UserError(
            f"--resume: {checkpoint} is not there; expected --verl trainer.resume_mode=resume_path --verl "
            "trainer.resume_from_path=FOLDER, a global_step_* that is"
        )
    return checkpoint


def _check_devices(config: Any) -> None:
    """Refuse to wait without an end: Ray gives verl's workers no GPU where there is none."""
    settings = config.ray_kwargs.ray_init
    is_elsewhere = (
        os.environ.get("RAY_ADDRESS") or settings.get("address") or Path("/tmp/ray/ray_current_cluster").exists()
    )
    if config.trainer.device == "cuda" and not (torch.cuda.is_available() or is_elsewhere or settings.get("num_gpus")):
        raise UserError(
            "--engine verl: there is no GPU here and no Ray cluster, and verl would wait for one; expected RAY_ADDRESS of "
            "a cluster, or --engine verl-cpu, which tries verl's trainer out on this machine's CPU"
        )


def train(planned: Plan, *, overwrite: bool = False) -> dict[str, Any]:
    """Start ``python -m verl.trainer.main_ppo`` and return the run's summary.

    Raises:
        UserError: there is nothing to train on.
        VerlError: verl stopped before the end.
        TrainingInterruptedError: a signal stopped this process.
    """
    _check_devices(planned.config)
    environment = environment_on_cpu() if planned.config.trainer.device == "cpu" else dict(os.environ)
    recipe, folder = planned.recipe, planned.folder
    own, updates = folder.path.absolute() / "verl", recipe.updates_per_rollout
    with folder.locked(), Progress(recipe.rollouts * updates, updates, show=True) as progress:
        if planned.checkpoint is None:
            engine = {package: version(package) for package in ("verl", "ray")}
            folder.create(recipe, overwrite, engine=engine, verl_settings=planned.settings)
            if own.exists():
                shutil.rmtree(own)
            done = 0
        else:
            # A process that was killed may have left what verl logged last.
            Log(recipe, folder, progress).take()
            done = int(planned.checkpoint.name.removeprefix("global_step_"))
            folder.rewind(done * updates)
            # verl empties its log when it begins.
            if (own / "log.jsonl").is_file():
                (own / "log.jsonl").replace(own / f"log-before-{done}.jsonl")
            write_json(folder.info, json.loads(folder.info.read_text()) | {"verl_settings": list(planned.settings)})
        write_rows(planned.problems, own / "train.jsonl", "train")
        write_rows(planned.heldout, own / "heldout.jsonl", "heldout")
        (own / "overrides.txt").write_text("\n".join(planned.arguments) + "\n", encoding="utf-8")
        log = Log(recipe, folder, progress)
        progress.begin(done * updates)
        progress.console.print(f"verl's trainer writes to {own / 'output.log'}", soft_wrap=True)
        try:
            with (own / "output.log").open("ab") as output:
                code = run_to_its_end(
                    [sys.executable, "-m", "verl.trainer.main_ppo", *planned.arguments],
                    environment | {"VERL_FILE_LOGGER_PATH": str(own / "log.jsonl")},
                    output,
                    log.take,
                )
        finally:
            log.take()
        if code or not folder.metrics.is_file():
            raise VerlError(f"verl stopped with exit code {code}; see {own / 'output.log'}")
        if model := _last_model(Path(planned.config.trainer.default_local_dir)):
            shutil.copytree(model, folder.model, dirs_exist_ok=True)
        return folder.write_summary(recipe, engine="verl")


PATIENCE = 20.0
"""Seconds that a program is left to end in, once it was asked to."""


def run_to_its_end(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes], meanwhile: Callable[[], None]
) -> int:
    """The exit code of a program that does not outlive this process, however this process ends.

    Args:
        meanwhile: is called every second.

    Raises:
        TrainingInterruptedError: this process was asked to end (SIGTERM).
    """

    def interrupt(number: int, _frame: Any) -> None:
        raise TrainingInterruptedError(number)

    with subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
    ) as process:
        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            while True:
                try:
                    return process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    meanwhile()
        finally:
            signal.signal(signal.SIGTERM, before)
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _end_with_parent() -> None:
    """Have Linux ask this process to end when its parent has, by SIGKILL too."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class Log:
    """verl's log and evaluations as rows of the run folder, written as they come."""

    def __init__(self, recipe: Recipe, folder: RunFolder, progress: Progress) -> None:
        self._folder, self._updates, self._progress = folder, recipe.updates_per_rollout, progress
        self._heldout_samples = recipe.heldout_samples
        self._own = folder.path / "verl"
        self._read = 0
        rows = read_jsonl(folder.metrics)
        self._rollout, self._seconds = (rows[-1]["rollout"], rows[-1]["seconds"]) if rows else (0, 0.0)
        self._evaluated = {row["rollout"] for row in read_jsonl(folder.evaluations)}

    def take(self) -> None:
        """Write what verl has logged since the last time, and show it."""
        if not (self._own / "log.jsonl").is_file():
            return
        with (self._own / "log.jsonl").open("rb") as file:
            file.seek(self._read)
            lines = file.readlines()
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._read += len(line)
            logged = json.loads(line)
            self._write(logged["step"], logged["data"])

    def _write(self, rollout: int, data: dict[str, Any]) -> None:
        where = {"update": rollout * self._updates, "rollout": rollout}
        # The evaluation before the first rollout has a row of its own.
        if "actor/grad_norm" in data and rollout > self._rollout:
            self._rollout = rollout
            self._seconds += data["timing_s/step"]
            row = {**where, "seconds": self._seconds, **rename_metrics(data, self._updates)}
            append_jsonl(self._folder.metrics, row)
            self._progress.show_update(where["update"], row)
        # A run that goes on evaluates once more what it had evaluated.
        evaluation = self._own / "validation" / f"{rollout}.jsonl"
        if evaluation.is_file() and rollout not in self._evaluated:
            self._evaluated.add(rollout)
            self._write_evaluation(evaluation, where)

    def _write_evaluation(self, path: Path, where: dict[str, Any]) -> None:
        samples = [
            {
                "prompt": sample["input"],
                "answer": sample["gts"],
                "completion": sample["output"],
                "reward": sample["score"],
            }
            for sample in read_jsonl(path)
        ]
        accuracy = self._folder.append_evaluation(where, samples, self._heldout_samples)
        self._progress.show_accuracy(accuracy, where["update"])


def _last_model(checkpoints: Path) -> Path | None:
    models = checkpoints.glob("global_step_*/actor/huggingface")
    return max(models, key=lambda path: int(path.parts[-3].removeprefix("global_step_")), default=None)
