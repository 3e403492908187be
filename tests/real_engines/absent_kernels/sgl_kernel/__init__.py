"""Stands in for SGLang's GPU kernels, which are imported on a CPU, too: each name is there, and raises when called."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import torch


class AbsentKernel:
    """A kernel that is not there, or a part of one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{self._name} needs a GPU")

    def __getattr__(self, name: str) -> AbsentKernel:
        return absent(self._name, name)


class AbsentOperators(AbsentKernel):
    """The operators for a CPU, which models name when they are imported; those for a GPU are asked for, and missed."""

    def __getattr__(self, name: str) -> AbsentKernel:
        if not name.endswith("_cpu"):
            raise AttributeError(name)
        return super().__getattr__(name)


class AbsentModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds each module below this one, empty."""

    def find_spec(self, fullname: str, *where: Any) -> importlib.machinery.ModuleSpec | None:
        is_below = fullname.startswith(f"{__name__}.")
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_below else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """The usual kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        """Each name of it is there."""
        module.__getattr__ = lambda name: absent(module.__name__, name)  # type: ignore[method-assign]


def absent(owner: str, name: str) -> AbsentKernel:
    """What stands under a name. Python's own names are not made up: a module without `__path__` has none."""
    if name.startswith("__"):
        raise AttributeError(f"{owner} has no {name}")
    return AbsentKernel(f"{owner}.{name}")


def __getattr__(name: str) -> AbsentKernel:
    return absent(__name__, name)


sys.meta_path.append(AbsentModules())
torch.ops.sgl_kernel = AbsentOperators("torch.ops.sgl_kernel")  # type: ignore[assignment]
