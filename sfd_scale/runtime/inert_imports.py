"""Reading recipes without the import of PyTorch, which takes seconds.

The settings of a class stand beside it, in a file that imports torch. To read a recipe, Python imports these files but
calls none of their code. In `inert_imports()` the slow libraries are empty stand-ins: every attribute is one class, to
call, to subscript and to inherit from. Sphinx builds documentation with such stand-ins (`autodoc_mock_imports`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Each takes more than 50 ms to import, or imports torch.
SLOW = frozenset({
    "deepspeed", "diffusers", "matplotlib", "numpy", "PIL", "pyarrow", "safetensors", "scipy", "sklearn", "streaming",
    "timm", "torch", "torch_fidelity", "torchao", "torchvision", "transformers", "triton", "wandb",
})  # fmt: skip
_OURS = ("sfd_scale", "eval")
_OPERATORS = ("__matmul__",)  # the code names them as functions


class _InertMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name not in _OPERATORS:
            raise AttributeError(name)  # Python and dataclasses ask for optional parts of their protocols
        return Inert

    def __getitem__(cls, item: object) -> Any:
        return Inert

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        # A decorator gives back what it decorates; another call gives the class.
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Inert


class Inert(metaclass=_InertMeta):
    """Every attribute of a stand-in module."""


class _InertModule(ModuleType):
    __path__: list[str] = []  # a package: its submodules are stand-ins, too

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in SLOW else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def inert_imports() -> Iterator[None]:
    """Import with stand-ins for the slow libraries. Use the imported classes as data only, and inside the block.

    At the end, the modules of this block are forgotten: a later import is a real one. If torch is imported already,
    the block changes nothing.
    """
    if "torch" in sys.modules:
        yield
        return
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in sys.modules.keys() - before:
            if name.partition(".")[0] in SLOW.union(_OURS):
                _forget(name)


def _forget(name: str) -> None:
    module = sys.modules.pop(name)
    package, _, own_name = name.rpartition(".")
    # `from package import module` takes the attribute of the package, which may stay.
    if package in sys.modules and vars(sys.modules[package]).get(own_name) is module:
        delattr(sys.modules[package], own_name)
