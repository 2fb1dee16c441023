"""Chat templates from files: how conversations are written as prompts, in Jinja."""

from __future__ import annotations

import re
from pathlib import Path


def read_chat_template(path: Path) -> str:
    """The text of the template that --chat-template names. Raises OSError if it cannot be read, ValueError if it is not
    Jinja."""
    import jinja2

    try:
        text = path.read_text(encoding="utf-8")
        # {% generation %} is transformers' own tag, for training.
        without = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(without)
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--chat-template {path} is no Jinja template: line {error.lineno}: {error.message}") from None
    return text
