"""The site: Sphinx reads docs/*.md and notebooks by MyST-NB, and what `reference.py` makes of the code."""

import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import reference  # noqa: E402

import clipmoe_jax  # noqa: E402

project = "clipmoe_jax"
author = copyright = "The clipmoe_jax developers"
release = version = clipmoe_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["requirements.txt"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# Notebooks have no outputs in git. `sphinx-build -D nb_execution_mode=force` runs them, with the package
# installed, for a site with their pictures; it takes a quarter of an hour on 2 cores.
nb_execution_mode = "off"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 1800  # seconds a cell
nb_merge_streams = True
# Backticks in docstrings are code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures would repeat the shapes, which the text gives in words

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = "CLIP-MoE in JAX"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "use_fullscreen_button": False}


def setup(app):
    """Writes the pages that come from code, and leads links to pages outside of docs/ to their copies."""
    reference.write()
    app.connect("source-read", _relink)


def _relink(app, name, source):
    page = DOCS / f"{name}.md"
    source[0] = reference.relinked(source[0], page, page.parent)
