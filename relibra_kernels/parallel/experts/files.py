"""Folders of safetensors as Hugging Face writes them: where each tensor is, and new ones, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...planner.errors import FormatError, InputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Names of gate, up and down of one expert in files that hold every expert by itself.
_OF_ONE_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# (in the model, in files): of Mixtral, of Nemotron-H
_ALIASES = ((".mlp.", ".block_sparse_moe."), ("model.", "backbone."))


class Files:
    """The tensors of a folder.

    Attributes:
        bytes_read: so far.
    """

    def __init__(self, folder: Path):
        try:
            from safetensors import safe_open
        except ModuleNotFoundError as error:
            raise InputError("checkpoint folders of Hugging Face need the package safetensors: install it") from error
        self._open: Any = safe_open
        self.folder, self.bytes_read = folder, 0
        self._opened: dict[str, Any] = {}
        try:
            if (folder / INDEX).is_file():
                self._file_of: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            elif (folder / SINGLE).is_file():
                self._file_of = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
            else:
                raise FormatError(f"{folder} has neither {INDEX} nor {SINGLE}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error

    def key(self, name: str) -> str | None:
        """The name in the files of what the model calls `name`; None where they have none."""
        names = [name, *(name.replace(ours, theirs) for ours, theirs in _ALIASES)]
        return next((name for name in names if name in self._file_of), None)

    def has(self, name: str) -> bool:
        return self.key(name) is not None

    def of_experts(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """("prefix.{}.", parts) of a parameter of all experts that the files hold by expert; None where they do not."""
        prefix, _, attribute = name.rpartition(".")
        for parts in _OF_ONE_EXPERT:
            for ours, theirs in (("", ""), *_ALIASES):
                base = prefix.replace(ours, theirs) if ours else prefix
                wanted = {"gate_up_proj": parts[:2], "up_proj": parts[1:2], "down_proj": parts[2:]}.get(attribute)
                if wanted and f"{base}.0.{wanted[0]}.weight" in self._file_of:
                    return base + ".{}.", tuple(f"{part}.weight" for part in wanted)
        return None

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._file_of:
            raise FormatError(f"{self.folder} lacks {key}")
        return tuple(self._file(self._file_of[key]).get_slice(key).get_shape())

    def tensor(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of it."""
        key = self.key(name)
        assert key is not None
        of = self._file(self._file_of[key]).get_slice(key)
        value: Tensor = of[:] if row is None else of[row : row + 1][0]
        self.bytes_read += value.numel() * value.element_size()
        return value

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            try:
                self._opened[name] = self._open(str(self.folder / name), framework="pt")
            except Exception as error:  # whatever a torn file makes of reading
                raise FormatError(f"{self.folder / name} cannot be read: {type(error).__name__}: {error}") from error
        return self._opened[name]


class Writer:
    """Files of at most so many bytes beside their place, and an index."""

    def __init__(self, target: Path, shard_bytes: int):
        self._target, self._most = target, shard_bytes
        self._folder = target.with_name(target.name + ".partial")
        self._waiting: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._files: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._size + size > self._most:
            self._flush()
        self._waiting[key] = tensor.detach().to("cpu", copy=True).contiguous()
        self._size, self._total = self._size + size, self._total + size

    def finish(self, like: Path | None, model: nn.Module, failed: bool) -> None:
        """Rename files and folder into place once everything is written. Where something failed, leave nothing."""
        if failed:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        self._flush()
        count, weight_map = len(self._files), {}
        for number, keys in enumerate(self._files):
            name = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"{number}").rename(self._folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
        config: Any = getattr(model, "config", None)
        if like is not None:
            for file in like.iterdir():
                if file.is_file() and not file.name.startswith("model") and file.suffix != ".bin":
                    shutil.copy(file, self._folder)
        elif hasattr(config, "save_pretrained"):
            config.save_pretrained(self._folder)
        self._folder.rename(self._target)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._files:
            shutil.rmtree(self._folder, ignore_errors=True)  # left by a run that died
            self._folder.mkdir(parents=True)
        save_file(self._waiting, self._folder / f"{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._waiting, self._size = {}, 0
