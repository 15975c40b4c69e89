import gc
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile far longer than they run: XLA's own passes as ever, LLVM's expensive ones left out.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters take a third of the newer ones' time to write the same loops; one part has less overhead than 32.
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 " + os.environ.get("XLA_FLAGS", "")
)
# Torch's threads wait for one another by spinning. Its models here are tiny, and a worker has a core to itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers, and the processes that tests start, compile the same programs: one cache for the run, gone with it. To
    # write and read a small one takes longer than to compile it.
    _compiled = tempfile.TemporaryDirectory(prefix="wpjax-tests-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": _compiled.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}

import jax
import numpy as np
import pytest

from tests.helpers import run_cli
from tests.tiny import PAIR_SPECS, SPECS, HfModel, HfPair, as_pair, build, build_pair
from wpjax.behaviours import PromptBatch, PromptPair, Tokens
from wpjax.pairs import Pair, load_pair

jax.config.update("jax_numpy_dtype_promotion", "strict")
gc.set_threshold(50_000)  # programs and their traces are many objects that stay: look through them less often


def pytest_collection_finish():
    """What was imported stays: no collection looks through it again."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Forget a module's programs after it: all tests' together have more memory maps than Linux lets a process have."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def workplace(tmp_path):
    """The folder in which `wpjax` runs; test files whose commands share files have one of their own."""
    return tmp_path


@pytest.fixture
def wpjax(monkeypatch, capsys, workplace):
    """Run the command line in a folder: returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(workplace)

    def run(*arguments):
        capsys.readouterr()
        code = run_cli(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session", params=sorted(SPECS))
def hf_model(request, tmp_path_factory) -> HfModel:
    """Every architecture of the table, as a torch model and the folder it was saved to."""
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=PAIR_SPECS)
def hf_pair(request, tmp_path_factory) -> HfPair:
    """The architectures whose patches differ, as two torch models."""
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pair(hf_pair) -> Pair:
    """The same two models as ours; where a test file has an `hf_pair` of its own, that one's."""
    return as_pair(hf_pair)


@pytest.fixture(scope="session", params=["llama-gqa3", "gpt2-tied"])
def family_pair(request, tmp_path_factory) -> Pair:
    """One pair of each family, for what does not depend on the finer points of an architecture."""
    return as_pair(build_pair(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="session", params=["granite", "gpt2-tied", "gemma3", "cohere2", "olmo2", "mixtral"])
def wired_pair(request, tmp_path_factory) -> Pair:
    """One pair of each wiring of a layer."""
    return as_pair(build_pair(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="session")
def one_pair(tmp_path_factory) -> Pair:
    """One pair, for what does not depend on an architecture at all."""
    return as_pair(build_pair("llama-gqa3", tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="session")
def tiny_pair() -> Pair:
    """The embedded base and its expert, which have a tokenizer and speak."""
    return load_pair("tiny:base", "tiny:expert")


@pytest.fixture(scope="session")
def batch() -> PromptBatch:
    """Random prompts in the vocabulary of the table's models, two a query; they begin alike, and one begins another."""
    ids = np.random.default_rng(0).integers(0, 61, (6, 12)).astype(np.int32)
    ids[:, :3], ids[4, :5] = ids[0, :3], [*ids[0, :3], *ids[3, 3:5]]
    tokens = Tokens(ids, np.array([12, 7, 9, 12, 5, 11], np.int32))
    pairs = tuple(PromptPair(f"with {i}", f"without {i // 2}", i // 2) for i in range(6))
    return PromptBatch("random", "sweep", tokens, tokens, tuple(p.with_instruction for p in pairs), pairs)
