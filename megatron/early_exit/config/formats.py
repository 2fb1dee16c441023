"""What a folder holds that is given as --load but has no checkpoint of ours. Looks at names of files alone."""

from __future__ import annotations

from pathlib import Path

DESCRIPTION_FILE = "model.yaml"
"""Model, exits and precision of a checkpoint."""

RUN_CONFIG_FILE = "run_config.yaml"
"""All settings of the run that wrote a checkpoint; a converted one has none. Earlier versions wrote it alone."""


def other_content(folder: str | Path) -> str | None:
    """What `folder` holds and what to do with it, or None: it has a checkpoint of ours, or nothing that is known."""
    folder = Path(folder)
    ours = (DESCRIPTION_FILE, RUN_CONFIG_FILE)
    if any(any(folder.glob(f"iter_*/{name}")) for name in ours):
        return None
    convert = "tools/convert_checkpoint.py {} " + f"{folder} --save NEW_FOLDER"
    if any((folder / name).is_file() for name in ours):
        return f"one checkpoint itself; give the folder above it, {folder.absolute().parent}"
    if any(folder.glob("mp_rank_*")) or any(folder.glob("*/mp_rank_*")):
        return (
            f"a checkpoint of Megatron-LM or of EE-LLM; convert it: {convert.format('from-megatron --load')} "
            "(of EE-LLM: from-legacy)"
        )
    if any(any(folder.glob(f"{place}.metadata")) for place in ("", "iter_*/", "release/")):
        return f"a checkpoint of Megatron-LM; convert it: {convert.format('from-megatron --load')}"
    weights = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")
    if any(any(folder.glob(pattern)) for pattern in weights):
        return f"a model of transformers; convert it: {convert.format('from-hf --input')}"
    return None
