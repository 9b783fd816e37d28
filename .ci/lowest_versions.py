"""The lowest versions that setup.cfg names, as constraints for pip: of the package and, with `--extras`, of its extras.

Where an extra names a package again, it is the extra's that counts.
"""

import sys
from configparser import ConfigParser


setup = ConfigParser()
setup.read("setup.cfg")
bounds = setup["options"]["install_requires"].split()
if "--extras" in sys.argv:
    bounds += " ".join(setup["options.extras_require"].values()).split()
lowest = dict(bound.split(">=") for bound in bounds if ">=" in bound)
print(*(f"{name}=={version}" for name, version in lowest.items()), sep="\n")
