"""The build of a wheel: recipes/ and eval/ of the checkout become parts of the package.

In a checkout, `eval` is a package beside `sfd_scale`. A wheel must not claim this name for a whole environment. So the
package is `sfd_scale.eval` in it, and its imports are written so.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
IMPORT = re.compile(r"^(\s*from )eval(?=[. ])", re.MULTILINE)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "sfd_scale"
        for name in ("recipes", "eval"):
            shutil.rmtree(package / name, ignore_errors=True)
            shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in package.rglob("*.py"):
            file.write_text(IMPORT.sub(r"\1sfd_scale.eval", file.read_text(encoding="utf-8")), encoding="utf-8")


setup(cmdclass={"build_py": BuildPy})
