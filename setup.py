"""What `setup.cfg` cannot say: the README's links, relative in the repository, are absolute on the package index."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup


HERE = Path(__file__).parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>(?![a-z]+:|#)[^)]+)\)")


def with_absolute_links(markdown: str, repository: str) -> str:
    """A page of the root of the repository, whose pictures and links work from anywhere."""
    kinds = {"!": "raw", "": "blob"}
    return LINK.sub(
        lambda link: f"{link['image']}[{link['text']}]({repository}/{kinds[link['image']]}/main/{link['target']})",
        markdown,
    )


metadata = ConfigParser()
metadata.read(HERE / "setup.cfg")
readme = (HERE / "README.md").read_text(encoding="utf-8")
setup(long_description=with_absolute_links(readme, metadata["metadata"]["url"]))
