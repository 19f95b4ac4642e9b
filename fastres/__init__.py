"""Train the CIFAR-10 ResNets and PlainNets of He et al. (CVPR 2016), fast and faithfully.

    import fastres

    result = fastres.train(fastres.make_config("smoke"))
    print(result.test_error)
    predictor = fastres.load(result.run)  # a trained network as a function of images

Names are imported on first use, so that `import fastres` and the command line stay quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastres.config import RunConfig as RunConfig
    from fastres.config import make_config as make_config
    from fastres.errors import FastresError as FastresError
    from fastres.loop import train as train
    from fastres.predict import Predictor as Predictor
    from fastres.predict import load as load
    from fastres.result import RunResult as RunResult
    from fastres.sweep import train_seeds as train_seeds

__version__ = "0.1.0"

_HOME = {
    "RunConfig": "config",
    "make_config": "config",
    "FastresError": "errors",
    "Predictor": "predict",
    "RunResult": "result",
    "load": "predict",
    "train": "loop",
    "train_seeds": "sweep",
}
__all__ = [
    "FastresError",
    "Predictor",
    "RunConfig",
    "RunResult",
    "__version__",
    "load",
    "make_config",
    "train",
    "train_seeds",
]


def __dir__() -> list[str]:
    """What tab completion and `help(fastres)` find."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastres' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fastres.{_HOME[name]}"), name)
