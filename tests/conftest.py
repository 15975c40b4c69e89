import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from tests.tiny import SPECS, HfModel, build

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session", params=sorted(SPECS))
def hf_model(request, tmp_path_factory) -> HfModel:
    """Every architecture of the table, as a torch model and the folder it was saved to."""
    return build(request.param, tmp_path_factory.mktemp(request.param))
