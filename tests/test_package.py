"""The package as a whole: what importing it loads, and what it exports."""

import inspect
import subprocess
import sys

import jaxnorm


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_neither_flax_nor_optax():
    modules = loaded_by("import jaxnorm")
    assert "jaxnorm" in modules
    assert not modules & {"flax", "optax", "chex", "sklearn", "rich", "torch"}


def test_everything_exported_is_documented_with_an_example():
    for name in jaxnorm.__all__:
        document = getattr(jaxnorm, name).__doc__
        assert document, name
        if inspect.isfunction(getattr(jaxnorm, name)):
            raises = [] if name == "save_statistics" else ["Raises:"]
            for part in ("Args:", "Returns:", *raises, "Example:", ">>>"):
                assert part in document, (name, part)
