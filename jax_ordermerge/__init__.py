"""Fine-tune a model in k data orders, measure the effect of the order, and merge the k models.

`import jax_ordermerge` costs milliseconds: names are loaded on first use (PEP 562).
"""

import importlib

__version__ = "0.2.0"

_PUBLIC = {
    "Config": "config",
    "ModelConfig": "arch",
    "UserError": "errors",
    "forward": "model.llama",
    "init_params": "model.llama",
    "load_config": "config",
    "load_params": "checkpoint.convert",
    "export": "checkpoint.convert",
    "make_mesh": "mesh",
    "order_indices": "data.order",
    "run": "experiment.pipeline",
    "stream": "rng",
    "tensor_table": "arch",
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jax_ordermerge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"jax_ordermerge.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
