"""Multi-GPU patch-parallel inference for diffusion transformers linearised by CLEAR."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clear_dist.drawing.generation import generate, upscale
    from clear_dist.options import Options
    from clear_dist.parallelize import interrupt, parallelize
    from clear_dist.stages import Upscaling

__all__ = ["Options", "Upscaling", "__version__", "generate", "interrupt", "parallelize", "upscale"]
__version__ = "0.1.0"


def _of(module: str, name: str) -> property:
    """A public name, imported when first used: `clear-dist --help` must not load torch."""

    def value(_: ModuleType) -> Any:
        return getattr(import_module(f"clear_dist.{module}"), name)

    def keep(_: ModuleType, __: ModuleType) -> None:
        """The import system binds `clear_dist.parallelize` to the module of that name; the function stays."""

    return property(value, keep)


class _Package(ModuleType):
    """Properties, because a package's own `__getattr__` is not asked for names that submodules have taken."""

    generate = _of("drawing.generation", "generate")
    Options = _of("options", "Options")
    Upscaling = _of("stages", "Upscaling")
    interrupt = _of("parallelize", "interrupt")
    parallelize = _of("parallelize", "parallelize")
    upscale = _of("drawing.generation", "upscale")


sys.modules[__name__].__class__ = _Package
