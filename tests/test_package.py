"""The package as others import it."""

import subprocess
import sys

import wpjax


def test_every_public_name_is_there():
    assert {"load_pair", "fit_anchor", "sweep", "validate", "write_report"} <= set(wpjax.__all__)
    for name in wpjax.__all__:
        assert getattr(wpjax, name).__module__.startswith("wpjax"), name


def test_importing_it_imports_nothing_large():
    code = "import sys, wpjax; print(*{'jax', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
