# The types of the names that `__init__.py` loads on first use.
from jax_ordermerge.arch import ModelConfig as ModelConfig
from jax_ordermerge.arch import tensor_table as tensor_table
from jax_ordermerge.checkpoint.convert import export as export
from jax_ordermerge.checkpoint.convert import load_params as load_params
from jax_ordermerge.config import Config as Config
from jax_ordermerge.config import load_config as load_config
from jax_ordermerge.data.order import order_indices as order_indices
from jax_ordermerge.errors import UserError as UserError
from jax_ordermerge.experiment.pipeline import run as run
from jax_ordermerge.mesh import make_mesh as make_mesh
from jax_ordermerge.model.llama import forward as forward
from jax_ordermerge.model.llama import init_params as init_params
from jax_ordermerge.rng import stream as stream

__version__: str
