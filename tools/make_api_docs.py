#!/usr/bin/env python
"""Write HTML pages of all modules from their docstrings, with docs/api.md in front (`make docs`):

python tools/make_api_docs.py --output build/docs

Modules that cannot be imported, as those that need a package which is not installed, are left out and named.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

import pdoc
from jinja2 import BaseLoader, ChoiceLoader, DictLoader

ROOT = Path(__file__).resolve().parents[1]
LANDING = ROOT / "docs/api.md"
PACKAGE = "megatron.early_exit"

TEMPLATES = {
    # Without a root module, whose page would be the first one, pages link to the index. Loggers are nobody's business.
    "module.html.jinja2": """{% set root_module_name = false %}
{% macro is_public(doc) %}{% if doc.name != "log" %}{{ default_is_public(doc) }}{% endif %}{% endmacro %}
{% extends "default/module.html.jinja2" %}""",
    "landing.html.jinja2": """{% extends "frame.html.jinja2" %}
{% block title %}megatron-early-exit{% endblock %}
{% block nav %}
    <h2>Modules</h2>
    <ul>{% for name, link in rooms %}<li><a href="{{ link }}">{{ name }}</a></li>{% endfor %}</ul>
    <h2>Pages</h2>
    <ul>{% for name, link in guides %}<li><a href="{{ link }}">{{ name }}</a></li>{% endfor %}</ul>
{% endblock %}
{% block content %}
    <main class="pdoc"><section class="module-info"><div class="docstring">{{ text | safe }}</div></section></main>
{% endblock %}""",
    "custom.css": """main.pdoc table { border-collapse: collapse; margin: 0.5rem 0 1rem; }
main.pdoc th, main.pdoc td { border: 1px solid #8884; padding: 0.2rem 0.6rem; text-align: left; vertical-align: top; }
""",
}


def build(output: Path, package: str = PACKAGE) -> dict[str, str]:
    """Write the pages; returns why modules were left out, by name."""
    pdoc.render.configure(docformat="markdown", show_source=False, search=False)
    loaders: list[BaseLoader] = [DictLoader(TEMPLATES)]
    if pdoc.render.env.loader is not None:
        loaders.append(pdoc.render.env.loader)
    pdoc.render.env.loader = ChoiceLoader(loaders)
    modules, left_out = _modules(package)
    for name, module in modules.items():
        _write(output / _page(name), pdoc.render.html_module(module, modules))
    _write(output / "index.html", _landing(list(modules), output))
    return left_out


def _modules(package: str) -> tuple[dict[str, pdoc.doc.Module], dict[str, str]]:
    """(modules by name, why others were left out)"""
    modules, left_out = {}, {}
    for name in pdoc.extract.walk_specs([package]):
        try:
            modules[name] = pdoc.doc.Module.from_name(name)
        except RuntimeError as error:  # that is what pdoc makes of all errors
            left_out[name] = str(error.__cause__)
    return modules, left_out


def _page(module: str) -> str:
    return f"{module.replace('.', '/')}.html"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _landing(names: list[str], output: Path) -> str:
    """The page that leads: what is public, the folders, the guides."""
    depth = PACKAGE.count(".") + 1
    return pdoc.render.env.get_template("landing.html.jinja2").render(
        text=pdoc.render_helpers.to_html(_with_links(LANDING.read_text(encoding="utf-8"), names, output)),
        rooms=[(name, _page(name)) for name in names if name.count(".") == depth],
        guides=[(_title(page), os.path.relpath(page, output)) for page in _guides()],
    )


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").replace("`", "")


def _guides() -> list[Path]:
    return [page for page in sorted((ROOT / "docs").glob("*.md")) if page != LANDING]


def _with_links(text: str, names: list[str], output: Path) -> str:
    """Links to files of modules lead to their pages, others to the files."""

    def link(found: re.Match[str]) -> str:
        target = (LANDING.parent / found[1]).resolve()
        module = ".".join(target.relative_to(ROOT).with_suffix("").parts)
        return f"]({_page(module) if module in names else os.path.relpath(target, output)})"

    return re.sub(r"\]\(((?!https?:)[^)#]+)\)", link, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build/docs", metavar="DIR", help="default: build/docs")
    args = parser.parse_args()
    # Annotations of generated constructors are shown as they stand where pdoc cannot resolve them.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    left_out = build(args.output.resolve())
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    print(f"wrote {args.output}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
