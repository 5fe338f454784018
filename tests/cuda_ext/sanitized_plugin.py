"""A pytest plugin that puts the sanitized build in the place of the installed extension."""

import importlib.util
import os
import sys

import gearfall

_NAME = "gearfall._cuda_ext"

_spec = importlib.util.spec_from_file_location(_NAME, os.environ["GEARFALL_SANITIZED_EXT"])
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_NAME] = _module
_spec.loader.exec_module(_module)
setattr(gearfall, "_cuda_ext", _module)  # noqa: B010 (the name is a submodule, not an attribute)
