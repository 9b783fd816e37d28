"""How Sphinx builds these pages: `make docs`. Nothing is fetched, and a warning is an error."""

import re
from configparser import ConfigParser
from pathlib import Path

import vitae_hf


SETUP = ConfigParser()
SETUP.read(Path(__file__).parents[1] / "setup.cfg")

project = "vitae-hf"
author = SETUP["metadata"]["author"]
copyright = f"2026, {author}"
version = release = vitae_hf.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is committed with what it shows; tests/test_notebook.py runs it
suppress_warnings = ["toc.empty_glob"]

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
    "ignore-module-all": True,
}
autodoc_inherit_docstrings = False  # those of torch and Transformers are theirs
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

# Names of other libraries are no links, since nothing is fetched; a name of this package that is not there is an error.
LIBRARIES = "PIL|abc|argparse|collections|datasets|evaluate|gr|gradio|httpx|huggingface_hub|jinja2|numpy|os|pathlib"
LIBRARIES += "|pickle|torch|torchvision|transformers|PreTrainedModel|PreTrainedConfig|StrictDataclassError"
nitpick_ignore_regex = [
    (r"py:.*", rf"\.?({LIBRARIES})(\..*)?"),
    (r"py:class", r".*\._\w+"),  # private bases
    (r"py:obj", r".*\.AnyTrainer"),  # a type variable
    (r"py:class", r"(?!vitae_hf).*"),  # words about a type: "a tensor", "defaults to"
]

copybutton_selector = "div.highlight-bash pre, div.highlight-python pre, div.cell_input pre"  # not what they print

html_theme = "furo"
html_title = f"vitae-hf {version}"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
html_theme_options = {
    "source_repository": SETUP["metadata"]["url"],
    "source_branch": "main",
    "source_directory": "docs/",
}
html_copy_source = False


OUTSIDE = re.compile(r"(?<!!)(\[[^\[\]]*\]\()\.\./")


def link_repository(app, docname: str, source: list[str]) -> None:
    """Files outside this folder are no pages: links to them lead to the repository."""
    source[0] = OUTSIDE.sub(rf"\1{SETUP['metadata']['url']}/blob/main/", source[0])


NAME_OR_CODE = re.compile(r"\[`(?P<name>[\w.]+)`\]|`(?P<code>[^`]+)`|(?P<bar>\|)")


def restructured(match: re.Match) -> str:
    """A [`Name`], a piece of `code` or a bar of a docstring, in reStructuredText."""
    end = r"\ " if match.string[match.end() :][:1].isalnum() else ""
    if match["name"]:
        return f":py:obj:`{match['name']} <.{match['name']}>`{end}"
    return f"``{match['code']}``{end}" if match["code"] else r"\|"


def as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written as those of Transformers are: [`Name`] is a link, and examples stand in fences."""
    text = "\n".join(line for line in lines if not line.strip().startswith("```"))
    lines[:] = NAME_OR_CODE.sub(restructured, text).splitlines()
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # or napoleon would take what is before a colon for a type


def setup(app) -> None:
    app.connect("source-read", link_repository)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon
