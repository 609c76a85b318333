"""How the weights of model folders are read: in which dtype, to which devices, to compute or only to be saved again."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nla_jax.io.folders import dtypes_of, load_params, open_params, read_config
from nla_jax.models.kernels import with_kernel
from nla_jax.models.sharding import TRAIN, shardings
from nla_jax.models.transformer import TransformerConfig, abstract_params
from nla_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Reading:
    """`dtype`: of whole parameters and computation (None: that of each folder, float16 computing in float32).
    `attention`: a kernel of models/kernels.py. `mesh`: every parameter is read straight into its training place there.
    `remat`: a policy of `jax.checkpoint_policies`. `trained`: parameters are float32. `saved`: they stay in their files,
    and are read tensor by tensor when they are saved (`views.ByLayer`)."""

    dtype: Any = None
    attention: str = "xla"
    mesh: Mesh | None = None
    remat: str | None = None
    trained: bool = False
    saved: bool = False

    def config(self, folder: Path) -> TransformerConfig:
        """The model of a folder. Raises `InputError` for a policy or a kernel that there is not."""
        if self.remat and not (isinstance(self.remat, str) and hasattr(jax.checkpoint_policies, self.remat)):
            raise InputError(f"remat {self.remat!r} is no policy of jax.checkpoint_policies; nothing_saveable is one.")
        config = with_kernel(read_config(folder, dtypes_of(folder, self.dtype)[1]), self.attention, self.mesh)
        return dataclasses.replace(config, remat=self.remat or None)

    def params(self, folder: Path, config: TransformerConfig, *, truncated: bool = False) -> dict:
        """The parameters of a folder that will be trained; of a `config` that may be cut, `truncated` without head."""
        dtype = jnp.float32 if self.trained else dtypes_of(folder, self.dtype)[0]
        return self._read(folder, config, truncated, dtype)

    def frozen(self, folder: Path, config: TransformerConfig) -> dict:
        """The parameters of the base of adapters."""
        return self._read(folder, config, False, dtypes_of(folder, self.dtype)[0])

    def _read(self, folder: Path, config: TransformerConfig, truncated: bool, dtype: Any) -> dict:
        if self.saved:
            return open_params(folder, config, truncated=truncated, dtype=dtype, scales=np.float32)
        layout = shardings(self.mesh, abstract_params(config, truncated), TRAIN) if self.mesh else None
        return load_params(folder, config, truncated=truncated, dtype=dtype, scales=np.float32, layout=layout)
