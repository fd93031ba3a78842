import os
import signal
from collections.abc import Iterator

import pytest
import torch

# No test talks to a model hub; TRL's notices about its experimental options are not ours to show.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
if not torch.cuda.is_available():
    # Triton reads it when it is imported: kernels then run on the CPU, slowly.
    os.environ["TRITON_INTERPRET"] = "1"

# After what libraries read when they are imported.
from datasets import Dataset

from drpo.data.problems import builtin_problems
from support.model_folder import here  # noqa: F401


@pytest.fixture(scope="session")
def problems() -> Dataset:
    return Dataset.from_list([vars(problem) for problem in builtin_problems("train", 32, seed=0)])


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as in a shell's foreground: where these tests run in its background, it is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
