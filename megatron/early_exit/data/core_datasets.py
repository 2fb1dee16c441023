"""Core's datasets with what they lack: loss masks, checked ids, index files that are whole and of the same data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import Dataset

from megatron.early_exit.data.batches import Batch
from megatron.early_exit.data.index_cache import cached_indices
from megatron.early_exit.data.loss_masks import has_mask, loss_mask_of_labels, mask_prefix, separate_texts
from megatron.early_exit.data.token_files import foreign_id


class TokenDataset(Dataset):
    """A core dataset whose samples are checked against the tokenizer.

    A sample is a `Batch` without the batch dimension.
    """

    def __init__(self, dataset: Any, vocab_size: int) -> None:
        """vocab_size: ids of the tokenizer, which can be fewer than the embedding has rows."""
        self.dataset = dataset
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        """[s] tensors and a mask [1, s, s] or None. Raises ValueError for an id that is none of the tokenizer's."""
        sample = self.dataset[index]
        smallest, largest = torch.cat((sample["tokens"], sample["labels"])).aminmax()
        if smallest < 0 or largest >= self.vocab_size:
            foreign = int(smallest if smallest < 0 else largest)
            raise ValueError(foreign_id(f"sample {index}{self._origin(index)}", foreign, self.vocab_size))
        return Batch(**{field: sample.get(field) for field in Batch._fields})

    def _origin(self, index: int) -> str:
        """Where the tokens of a sample come from."""
        dataset = self.dataset
        if isinstance(dataset, BlendedDataset):
            dataset, index = dataset.datasets[dataset.dataset_index[index]], dataset.dataset_sample_index[index]
        if not isinstance(dataset, GPTDataset) or dataset.dataset_path is None:
            return ""
        _, documents = dataset._query_document_sample_shuffle_indices(index)
        return f", from the documents {', '.join(map(str, documents.tolist()[:10]))} of {dataset.dataset_path},"


@dataclass
class StampedDatasetConfig(GPTDatasetConfig):
    """Core's configuration, and what tells one content of the files from another."""

    data_stamp: str = ""


class StampedGPTDataset(GPTDataset):
    """Core's dataset, with the loss mask that may lie beside its tokens. Its cached index files are found again only
    for the same data, and only if they are whole.

    Core knows data by their path: after preprocessing again to the same prefix it would use the sample index of the old
    files, silently.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str | None, *arguments: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *arguments)
        self._masks: StampedGPTDataset | None = None
        if dataset_path is not None and has_mask(dataset_path):
            masks = copy.copy(self)  # the same samples of other files
            masks.dataset = IndexedDataset(mask_prefix(dataset_path))
            self._masks = masks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        if self._masks is None:
            return sample
        marks, _ = self._masks._query_document_sample_shuffle_indices(index)
        marks = torch.from_numpy(marks).clamp(min=0)  # core pads with -1
        sample["loss_mask"] = sample["loss_mask"] * loss_mask_of_labels(marks)
        if self.config.reset_attention_mask or self.config.reset_position_ids:
            forbidden, positions = separate_texts(marks[:-1])
            if self.config.reset_attention_mask:
                sample["attention_mask"] = forbidden
            if self.config.reset_position_ids:
                sample["position_ids"] = positions
        return sample

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "data_stamp"]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        folder = self.config.path_to_cache or f"{self.dataset.path_prefix}/cache/{type(self).__name__}_indices"
        names = ("document_index", "sample_index", "shuffle_index")
        return cached_indices(self, folder, names, super()._build_document_sample_shuffle_indices)


class CachedBlendedDataset(BlendedDataset):
    """Core's blend, whose cached index files are used only if they are whole."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.config.path_to_cache:
            return super()._build_indices()
        names = ("dataset_index", "dataset_sample_index")
        return cached_indices(self, self.config.path_to_cache, names, super()._build_indices)


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """Core's builder, with the classes above."""

    @staticmethod
    def build_generic_dataset(cls: Any, *args: Any) -> Any:
        cls = CachedBlendedDataset if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *args)
