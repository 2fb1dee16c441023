"""What a folder holds that is given as --load but has no checkpoint of ours. Looks at names of files alone."""

from __future__ import annotations

import re
from pathlib import Path

from megatron.early_exit.config.checkpoint_files import (
    DESCRIPTION_FILE,
    METADATA_FILE,
    RELEASE,
    RUN_CONFIG_FILE,
    TOKENIZER_FOLDER,
    TOKENIZER_SETTINGS_FILE,
)


def is_own(folder: Path) -> bool:
    """Whether `folder` is one checkpoint of this project. Megatron-Bridge has a file of the same name as ours."""
    settings = folder / RUN_CONFIG_FILE
    return (folder / DESCRIPTION_FILE).is_file() or (
        settings.is_file() and re.search("^exits:", settings.read_text("utf-8", "replace"), re.MULTILINE) is not None
    )


def other_content(folder: str | Path) -> str | None:
    """What `folder` holds and what to do with it, or None: it has a checkpoint of ours, or nothing that is known."""
    folder = Path(folder)
    if any(map(is_own, folder.glob("iter_*"))):
        return None
    if is_own(folder):
        return f"one checkpoint itself; give the folder above it, {folder.absolute().parent}"
    has = lambda *patterns: any(any(folder.glob(pattern)) for pattern in patterns)
    if has(f"iter_*[0-9]/{TOKENIZER_FOLDER}/{TOKENIZER_SETTINGS_FILE}"):
        return None  # ours, but its description is missing
    convert = "tools/convert_checkpoint.py {} " + f"{folder} --save NEW_FOLDER"
    megatron = convert.format("from-megatron --load")
    if has("mp_rank_*", "*/mp_rank_*"):
        return f"a checkpoint of Megatron-LM or of EE-LLM; convert it: {megatron} (of EE-LLM: from-legacy)"
    if has(*(f"{place}{METADATA_FILE}" for place in ("", "iter_*[0-9]/", f"{RELEASE}/"))):  # no `.partial`
        return f"a checkpoint of Megatron-LM or Megatron-Bridge; convert it: {megatron}"
    if has("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf"):
        return f"a model of transformers; convert it: {convert.format('from-hf --input')}"
    return None
