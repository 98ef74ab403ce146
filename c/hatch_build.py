"""Hatchling's build hook: compiles the C core into the package, for wheels and editable installs alike.

The compiling itself is build.py's, beside this file, which also runs by hand and with sanitizers.
"""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("xdpnet_build", root / "c" / "build.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError("c/build.py: not in this source tree")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build(root)
        build_data["pure_python"] = False
        # The module has the stable ABI: it is for this Python and every later one.
        build_data["tag"] = f"cp311-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
