"""Formulas become MathML when the site is built: no script, no network, no font to load."""

import html
import re

import latex2mathml.converter

_FORMULA = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.S)


def on_page_content(content: str, **_: object) -> str:
    """Of a page: what the extension arithmatex has marked as formulas."""

    def convert(found: re.Match[str]) -> str:
        text = html.unescape(found[2]).strip()
        text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text)
        display = "block" if found[1] == "div" else "inline"
        mathml = latex2mathml.converter.convert(text, display=display)
        return f'<{found[1]} class="formula">{mathml}</{found[1]}>'

    return _FORMULA.sub(convert, content)
