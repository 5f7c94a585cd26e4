"""How Sphinx builds these pages."""

import sys
from functools import partial
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.util import logging

import anynorm
from anynorm.dialects import DIALECTS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cells import CELLS


def cell_table() -> str:
    """The table of what is tested where, from the one that the tests run by."""
    libraries = {"numpy": "NumPy", "strict": "array-api-strict", "torch": "PyTorch", "jax": "JAX"}
    libraries |= {"mlx": "MLX", "ndonnx": "ndonnx", "others": "sparse, cubed, autograd, and one of the tests' own"}
    libraries |= {"dask": "Dask", "cupy": "CuPy", "fast": "NumPy and PyTorch, with numba"}
    libraries |= {"frameworks": "NumPy, beside Keras, Flax, Equinox, Haiku and MLX"}
    lines = ["| cell | library | device | run by |", "|---|---|---|---|"]
    for cell in CELLS:
        command = f"nox --no-venv -t {cell.tags[0]}" if cell.tags else f'nox -s "tests({cell.id})"'
        where = "CUDA, where there is one" if cell.device == "cuda" else cell.device.upper()
        lines.append(f"| `{cell.id}` | {libraries[cell.library]} | {where} | `{command}` |")
    return "\n".join(lines)


def dialects() -> str:
    """What each framework calls the numbers of a norm, from the table that they are read by."""
    lines = ["| dialect | norm | eps | entries |", "|---|---|---|---|"]
    for name, dialect in DIALECTS.items():
        for each in dialect.spellings:
            shown = ", ".join(f"`{place}`" for place in each.entries.values()).replace("|", "\\|")
            lines.append(f"| `{name}` | {each.kind} | {'' if each.eps is None else f'{each.eps:g}'} | {shown} |")
    return "\n".join(lines)


def defaults() -> str:
    """What each framework means where its checkpoint does not say so."""
    lines = ["| dialect | momentum here | correction here | outer keys |", "|---|---|---|---|"]
    for name, dialect in DIALECTS.items():
        outer = ", ".join(f"`{key}`" for key in dialect.outer)
        lines.append(f"| `{name}` | {dialect.momentum:g} | {dialect.correction} | {outer} |")
    return "\n".join(lines)


def reports() -> str:
    """The benchmarks' reports that were written."""
    folder = Path(__file__).with_name("benchmarks")
    names = [name for name in ("cpu", "cuda") if (folder / f"{name}.md").exists()]
    return "\n".join(["```{toctree}", *names, "```"]) if names else "No report was written yet."


project = "anynorm"
author = "The anynorm authors"
copyright = "2026, the anynorm authors"  # noqa: A001
version = release = anynorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # all of them are run
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": (),  # a page shows what the script prints
    "image_srcset": ["2x"],
    "doc_module": ("anynorm",),
    "backreferences_dir": "gallery/uses",
    "write_computation_times": False,
    "min_reported_time": 3600,
    "show_signature": False,
}
templates_path = ["_templates"]
myst_enable_extensions = ["dollarmath", "substitution"]
myst_substitutions = {"cells": cell_table(), "reports": reports()}
myst_substitutions |= {"dialects": dialects(), "defaults": defaults()}
myst_heading_anchors = 3
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Array": "Array", "Axis": "Axis", "AllReduce": "AllReduce", "StrPath": "StrPath"}
autodoc_member_order = "bysource"
autosummary_filename_map = {"anynorm.moments": "anynorm.moments-function"}  # beside Moments, where case makes no name
python_maximum_signature_line_length = 100
viewcode_line_numbers = True
default_role = "py:obj"
exclude_patterns = ["_build", "_templates", "examples", "gallery/uses"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"
html_title = f"anynorm {version}"
html_copy_source = False
html_show_sphinx = False


def mathml(translator, node, *, display: bool) -> None:
    """A formula as MathML, which browsers draw without a script, and without a network."""
    try:
        formula = tex2mathml(node.astext(), as_block=display)
    except MathError as error:
        logging.getLogger(__name__).warning("%s", error, location=node)
        raise nodes.SkipNode from error
    translator.body.append(f'<div class="math">{formula}</div>' if display else formula)
    raise nodes.SkipNode


def wide_pages(_app, pagename: str, _template: str, context: dict, _doctree) -> None:
    """The reports of the benchmarks have wide tables, and all of the page for them."""
    if pagename in ("benchmarks/cpu", "benchmarks/cuda"):
        context["furo_hide_toc"] = True
        name = "torch.nn.functional</span></code></p></th>"
        body = context["body"].replace(name, name.replace("functional", "<wbr>functional"))
        context["body"] = f'<div class="wide">{body}</div>'


def how_tos(_app, doctree) -> None:
    """Where the README leads to the folder of the scripts, here their pages are."""
    for node in doctree.findall(pending_xref):
        if node["reftarget"] == "examples":
            node.update_all_atts({"refdomain": "std", "reftype": "doc", "reftarget": "/gallery/index"}, replace=True)


def setup(app) -> None:
    """What Sphinx has no option for."""
    inline, block = (partial(mathml, display=display) for display in (False, True))
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("doctree-read", how_tos)
    app.connect("html-page-context", wide_pages, priority=900)  # after furo
