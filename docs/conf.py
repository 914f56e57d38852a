"""How Sphinx builds these pages: `make docs`, without the network."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "sphinx"))

project = "moescope"
author = "the moescope developers"
copyright = "the moescope developers, Apache-2.0"  # noqa: A001  the name is Sphinx's

extensions = ["myst_nb", "sphinx_copybutton", "mathml", "contents"]
exclude_patterns = ["sphinx/**", "**/.ipynb_checkpoints"]
nitpicky = True
smartquotes = False  # two dashes are those of a flag

# Pages are Markdown as code hosts show it: anchors from headings, formulas between dollars, nothing else added.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nb_execution_mode = "off"  # notebooks are shown as they were saved; tests run them
suppress_warnings = ["mystnb.unknown_mime_type"]  # figures are saved as pictures beside the interactive form

html_theme = "furo"
html_title = "moescope"
html_math_renderer = "mathml"
html_static_path = ["sphinx/static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
html_permalinks_icon = "#"
html_theme_options = {"navigation_with_keys": True}

copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"
