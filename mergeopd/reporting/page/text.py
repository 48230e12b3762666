"""Show the characters of untrusted text that would be invisible, or would reorder the text around them."""

from __future__ import annotations

import re

# Control characters except tab and newline, characters that reorder text or have no width, lone surrogates,
# tags; not the two joiners, which belong to emoji and to several scripts.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Replace characters that cannot be seen by their number, `\u202e` by `⟨202E⟩`."""
    return _HIDDEN.sub(lambda match: f"⟨{ord(match[0]):02X}⟩", text)
