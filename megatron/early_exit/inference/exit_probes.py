"""Probes: small networks that say, from the hidden states that an exit's head reads, whether the exit's token is the
final head's. `tools/evaluate.py probes` trains them; they lie in the folder of the checkpoint.

A probe decides at the cost of a small part of a layer, where the exit's own head costs several on a small model. Its
output needs no calibration: thresholds are certified for it (`certificates.py`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron.early_exit.config.checkpoint_files import PROBES_FILE
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.platform.files import replaced

RMS_EPSILON = 1e-6
"""Added to the root mean square of hidden states."""


@dataclass(frozen=True)
class ProbeNetwork:
    """The probe of one exit: sigmoid(fc2 . relu(fc1 (x / (rms(x) + RMS_EPSILON)) + fc1_bias) + fc2_bias), in fp32."""

    fc1: np.ndarray
    """[width, h]"""
    fc1_bias: np.ndarray
    """[width]"""
    fc2: np.ndarray
    """[1, width]"""
    fc2_bias: np.ndarray
    """[1]"""


_TENSORS = ("fc1", "fc1_bias", "fc2", "fc2_bias")


@dataclass(frozen=True)
class AboutProbes:
    """What probes were trained on."""

    fingerprint: ExitFingerprint
    """The model as it was loaded."""
    hidden_size: int
    width: int
    prompts: tuple[str, ...]
    """`prompts.prompt_digest` of each prompt, ascending: certificates must come from others."""
    training: dict[str, Any]
    """Settings and figures, by layer where they are of an exit."""


@dataclass(frozen=True)
class ExitProbes:
    """Those of all exits that tokens may leave at."""

    about: AboutProbes
    networks: Mapping[int, ProbeNetwork]
    """By the layer that names the exit."""

    @property
    def digest(self) -> str:
        """Differs if the weights of a probe do."""
        digest = hashlib.sha256()
        for layer, network in sorted(self.networks.items()):
            digest.update(f"{layer}:".encode())
            for name in _TENSORS:
                digest.update(np.ascontiguousarray(getattr(network, name), dtype="<f4").tobytes())
        return digest.hexdigest()

    def mismatch(self, weights: str, exit_layers: tuple[int, ...], hidden_size: int) -> str | None:
        """Why they are not of the model with these weights (`checkpoint.read_model.fingerprint`); None: they are."""
        theirs = self.about.fingerprint
        if theirs.weights != weights:
            return "they were trained for another checkpoint, or for one that was written again"
        if theirs.exit_layers != exit_layers or sorted(self.networks) != sorted(exit_layers):
            numbers = " ".join(map(str, sorted(self.networks)))
            return f"they were trained for the exits {numbers}; the model has {' '.join(map(str, exit_layers))}"
        shapes = {"fc1": (self.about.width, hidden_size), "fc1_bias": (self.about.width,), "fc2": (1, self.about.width),
                  "fc2_bias": (1,)}  # fmt: skip
        for layer, network in self.networks.items():
            for name, shape in shapes.items():
                if getattr(network, name).shape != shape:
                    return f"{name} of exit {layer} has the shape {getattr(network, name).shape}, not {shape}"
        return None

    def save(self, folder: Path) -> None:
        """Write `PROBES_FILE` into `folder`, at once or not at all."""
        from safetensors.numpy import save_file

        tensors = {
            f"exit_{layer}.{name}": np.ascontiguousarray(getattr(network, name), dtype=np.float32)
            for layer, network in self.networks.items()
            for name in _TENSORS
        }
        with replaced(folder / PROBES_FILE) as partial:
            save_file(tensors, partial, metadata={"about": msgspec.json.encode(self.about).decode()})

    @classmethod
    def load(cls, folder: Path) -> ExitProbes | None:
        """What `save` wrote, or None if there is none. Raises ValueError if it cannot be read."""
        path = folder / PROBES_FILE
        if not path.exists():
            return None
        from safetensors import safe_open

        try:
            with safe_open(path, framework="np") as file:
                about = msgspec.json.decode(file.metadata()["about"], type=AboutProbes)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            layers = sorted({int(name.partition(".")[0].removeprefix("exit_")) for name in tensors})
            networks = {
                layer: ProbeNetwork(*(tensors[f"exit_{layer}.{name}"] for name in _TENSORS)) for layer in layers
            }
        except Exception as error:  # of the file, of a tensor in it, of what should be in it
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); remove it, or train the probes again"
            ) from error
        return cls(about, networks)
