"""verl's own engine and Ray's own workers, with the plug-in in them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drpo.integrations.verl.cpu.settings import environment
from support import rollouts

SUPPORT = Path(__file__).parent / "support"
MODULE = "drpo.integrations.verl"


def python(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300)


def test_the_gradient_through_verl_s_engine_is_drpo_trainer_s(tmp_path: Path) -> None:
    port = str(20_000 + os.getpid() % 20_000)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script = str(SUPPORT / "verl_gradient.py")
    done = python(script, str(tmp_path), "drpo", "64", "8", env=environment() | alone)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = rollouts.gradient_of_one_update(
        tmp_path / "trl", per_device_train_batch_size=64, aggregation="token-mean", advantage="mean"
    )
    norm = torch.stack([gradient.norm() for gradient in ours.values()]).norm().item()
    assert norm > 1e-2
    for micro_batch_size in (64, 8):
        verl = load_file(tmp_path / f"{micro_batch_size}.safetensors")
        assert set(verl) == set(ours)
        difference = max((verl[name] - ours[name]).abs().max().item() for name in ours)
        print(f"micro-batches of {micro_batch_size}: largest difference {difference:.1e}, norm {norm:.2f}")
        assert difference <= 1e-6


BROKEN = textwrap.dedent("""\
    import sys

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "drpo.integrations.verl.losses":
                raise ImportError("broken on purpose")

    sys.meta_path.insert(0, Broken())
""")


def test_a_broken_plug_in_is_loud(tmp_path: Path) -> None:
    """verl goes on after a plug-in that fails, and says so at level DEBUG."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    # What the driver does with the configuration before it starts Ray.
    instantiate = f"import hydra.utils; hydra.utils.instantiate({{'_target_': '{MODULE}.PolicyLoss'}})"
    done = python("-c", f"import verl; print('verl goes on', flush=True); {instantiate}", env=env)
    assert done.stdout.endswith("verl goes on\n")
    assert "drpo.integrations.verl is NOT loaded, and verl has none of its losses: broken on purpose" in done.stderr
    assert done.returncode != 0
    # The warnings before it name no exception.
    assert "ImportError: broken on purpose" in done.stderr


NO_PLUGINS = {"VERL_USE_EXTERNAL_PLUGINS": "none"}


@pytest.fixture(scope="module")
def local_ray() -> Any:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.long
@pytest.mark.parametrize(
    ("variables", "external_lib", "expected"),
    [
        pytest.param({}, None, True, id="entry-point"),
        pytest.param({**NO_PLUGINS, "VERL_USE_EXTERNAL_MODULES": MODULE}, None, True, id="environment"),
        pytest.param(NO_PLUGINS, MODULE, True, id="external_lib"),
        pytest.param(NO_PLUGINS, None, False, id="none"),
    ],
)
def test_a_ray_worker_has_the_loss_by_each_route(
    local_ray: Any, variables: dict[str, str], external_lib: str | None, expected: bool
) -> None:
    model = rollouts.MODEL

    def modes() -> list[str]:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        from verl.workers.config import HFModelConfig

        # As every worker does; it imports external_lib.
        HFModelConfig(path=model, external_lib=external_lib, override_config={"attn_implementation": "eager"})
        return list(POLICY_LOSS_REGISTRY)

    # Ray takes a worker again for the same variables.
    variables = {**variables, "CASE": f"{sorted(variables)} {external_lib}"}
    options = {"num_cpus": 1, "runtime_env": {"env_vars": variables}}
    found = local_ray.get(local_ray.remote(modes).options(**options).remote(), timeout=300)
    assert "vanilla" in found
    assert ("drpo" in found) is expected
