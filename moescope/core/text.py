"""Text from outside, made harmless before it stands among our own words."""

from __future__ import annotations

import html

# Marks that turn the direction of writing: they would turn the words after them too.
_DIRECTION = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C), "\ufffd")


def undirected(text: str) -> str:
    """Text whose marks of direction are shown as U+FFFD.

    Example:
        >>> undirected("a" + chr(0x202E) + "b") == "a" + chr(0xFFFD) + "b"
        True
    """
    return text.translate(_DIRECTION)


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters and marks of direction are shown as U+FFFD.

    Example:
        >>> printable("a" + chr(27) + "[2J") == "a" + chr(0xFFFD) + "[2J"
        True
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in undirected(text))


def escaped(text: str) -> str:
    """Text for HTML: markup is shown letter by letter, marks of direction as U+FFFD.

    Example:
        >>> escaped("<b>")
        '&lt;b&gt;'
    """
    return html.escape(undirected(text))


def whole_characters(text: str) -> str:
    """Text as any library takes it: pairs of surrogates are joined, lone ones become U+FFFD.

    Example:
        >>> whole_characters("a" + chr(0xD800))
        'a\ufffd'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
