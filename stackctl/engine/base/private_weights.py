"""Weights that stacks are folded into, in memory of their own; those of the base stay mapped to its files, untouched.

Writing into a mapped file makes the system fault and copy every page of it, one at a time. Here sums go to memory that
the next stack uses again, and a weight is the base's again without reading anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from stackctl.machine.resources import c_library
from stackctl.registry.base_models import weight_files

_ALIGNMENT = 64
"""Bytes: what vector instructions like best."""


class PrivateWeights:
    """Memory for some weights of a folder's model; those that are not mapped to its files stay where they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, Tensor] = {}
        self._moved: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def move(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Give the mapped ones of some weights, by name, other memory, whose values are not defined yet.

        Returns the base's values of these, in mapped memory. Nothing is moved where the system does not tell what is
        mapped (Linux does).
        """
        ranges = _mapped_ranges(self._folder)
        mapped = {name: weight for name, weight in weights.items() if _lies_in(weight, ranges)}
        self._make_room({name: weight for name, weight in mapped.items() if name not in self._places})
        for name, weight in mapped.items():
            self._moved[name] = weight, weight.data
            weight.data = self._places[name]
        return {name: self._moved[name][1] for name in mapped}

    def restore(self) -> set[str]:
        """Make every weight that was moved the base's again; returns their names. The memory is kept for the next."""
        names = set(self._moved)
        for weight, mapped in self._moved.values():
            weight.data = mapped
        self._moved.clear()
        return names

    def _make_room(self, weights: Mapping[str, Tensor]) -> None:
        sizes = {name: -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT for name, weight in weights.items()}
        if not (total := sum(sizes.values())):
            return
        memory, start = torch.empty(total, dtype=torch.uint8), 0
        for name, weight in weights.items():
            self._places[name] = memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            start += sizes[name]


class MappedModules:
    """The matrices of modules, as far as they are mapped to a folder's files."""

    def __init__(self, folder: Path, modules: Sequence[nn.Module]) -> None:
        self._folder, self._modules = folder, modules

    @property
    def sizes(self) -> list[int]:
        """Mapped bytes of each module."""
        return [sum(weight.nbytes for weight in self._mapped(number)) for number in range(len(self._modules))]

    def copy(self, number: int) -> None:
        """Give a module copies of its mapped weights, in memory of the process."""
        with torch.inference_mode(False):  # stacks are folded into these
            for weight in self._mapped(number):
                mapped = weight.data
                weight.data = mapped.clone()
                forget_pages(mapped)

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        return _mapped_ranges(self._folder)

    def _mapped(self, number: int) -> list[nn.Parameter]:
        weights = self._modules[number].parameters()
        return [weight for weight in weights if weight.dim() > 1 and _lies_in(weight, self._ranges)]


def forget_pages(mapped: Tensor) -> None:
    """Let go of a mapped tensor's pages, to which nothing was written; they come from the file again when asked for."""
    first, last = mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    if (size := last // mmap.PAGESIZE * mmap.PAGESIZE - start) > 0:
        c_library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Where this process has a folder's weights mapped privately."""
    files = {str(path.resolve()) for path in weight_files(folder)}
    ends, ranges = tuple(f" {path}\n" for path in files), []
    with contextlib.suppress(OSError), Path("/proc/self/maps").open(errors="surrogateescape") as maps:
        for line in maps:
            if line.endswith(ends):  # few do, of thousands
                place, rights, *_, path = line.rstrip("\n").split(maxsplit=5)
                if path in files and rights.endswith("p"):
                    start, end = place.split("-")
                    ranges.append((int(start, 16), int(end, 16)))
    return ranges


def _lies_in(weight: Tensor, ranges: list[tuple[int, int]]) -> bool:
    first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    on_cpu = weight.device.type == "cpu" and weight.is_contiguous()
    return on_cpu and any(start <= first and last <= end for start, end in ranges)
