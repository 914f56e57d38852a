"""Turns manual-page markup (the man macros) into readable plain text.

Not a typesetter: it knows the macros and escapes that manual pages use for text, joins filled lines into
paragraphs, keeps unfilled ones, and leaves out the sections that name people or repeat a licence.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^\]]*\]|\(..|.)"  # fonts
    r"|s[+-]?\d"  # sizes
    r"|\*(?:\[([^\]]*)\]|\((..)|(.))"  # strings: groups 1 to 3
    r"|\[([^\]]*)\]|\((..)"  # characters: groups 4 and 5
    r"|[hvwkoxmM](?:'[^']*'|\[[^\]]*\])|[nk](?:\[[^\]]*\]|\(..|.)"  # motions and registers
    r"|(.))"  # one character: group 6
)
_NAMED = {
    "aq": "'", "bu": "•", "en": "–", "em": "—", "co": "©", "lq": "“", "rq": "”", "dq": '"',
    "ul": "_", "hy": "-", "bv": "|", "br": "|", "rs": "\\", "at": "@", "ha": "^", "ti": "~",
    "oq": "‘", "cq": "’", "mu": "×", "->": "→", "<-": "←", "+-": "±", "<=": "≤", ">=": "≥",
    "de": "°", "sc": "§", "ga": "`", "dg": "†", "r!": "¡", "r?": "¿", "Fo": "«", "Fc": "»",
    "C'": "", "C`": "", 'R"': "”", 'L"': "“", "Aq": "'", "--": "—", "R": "®", "Tm": "™", "mi": "-",
    "pl": "+", "eq": "=", "sl": "/", "or": "|", "ss": "ß", "fo": "‹", "fc": "›", "di": "÷",
    "mc": "µ",
}  # fmt: skip
_SINGLE = dict(zip("-e 0~'`t.\\", "-\\   ´`\t.\\", strict=True))
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_FONT_MACROS = {"B", "I", "SM", "SB", "R"}
_ALTERNATING_MACROS = {"BR", "IR", "RB", "RI", "BI", "IB"}
_PARAGRAPH_MACROS = {"PP", "LP", "P", "sp", "HP", "IP", "TP", "RS", "RE", "Sp", "UR", "MT"}
_UNFILLED_MACROS, _FILLED_MACROS = {"nf", "EX", "Vb"}, {"fi", "EE", "Ve"}
_CJK = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")
_LEFT_OUT_SECTIONS = re.compile(
    r"AUT(H?OR|EUR)|AUTOREN|COPYRIGHT|TRAD|ÜBERSETZUNG|LIZENZ|LICEN|FEHLER MELDEN|SIGNALER DES|INFORMAR DE"
    r"|COLOPHON|DANKSAGUNG|ATTRIBUT|REMERCIEMENTS|CREDIT|HISTORY"
    r"|作者|著者|著作|版权|版權|中文版|论坛|译者|翻訳|跋|この文書|バグ報告|报告|謝辞|属性",
    re.IGNORECASE,
)


def strip_escapes(line: str) -> str:
    """`line` without roff escapes: fonts and motions dropped, named characters replaced."""

    def character(match: re.Match[str]) -> str:
        for group in (1, 2, 3, 4, 5):
            name = match.group(group)
            if name is not None:
                return chr(int(name[1:], 16)) if re.fullmatch(r"u[0-9A-F]{4,5}", name) else _NAMED.get(name, "")
        return _SINGLE.get(match.group(6) or "", "")

    return _ESCAPE.sub(character, re.sub(r'\\".*', "", line))


def macro_arguments(rest: str) -> list[str]:
    """The arguments of a macro line: words, or phrases in double quotes."""
    pairs = _ARGUMENT.findall(rest.strip().replace("\\ ", "\\~"))
    return [strip_escapes(quoted.replace('""', '"') if quoted else word) for quoted, word in pairs]


def join_filled(lines: list[str]) -> str:
    """One paragraph out of filled lines; no space goes between two East Asian characters."""
    paragraph = ""
    for line in (line.strip() for line in lines):
        if paragraph and line and not (_CJK.match(paragraph[-1]) and _CJK.match(line[0])):
            paragraph += " "
        paragraph += line
    return re.sub(r"[ \t]+", " ", paragraph)


class _PageReader:
    """Reads a page's lines one by one and gathers its text."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.filled: list[str] = []
        self.skipping = self.unfilled = self.tag_follows = False

    def flush(self) -> None:
        """End the paragraph that is being filled."""
        if self.filled:
            self.out.append(join_filled(self.filled))
            self.filled.clear()

    def read_text(self, text: str) -> None:
        """A line of text, whether plain or from a font macro."""
        if self.skipping:
            return
        if self.unfilled or not text.strip():
            self.flush()
            self.out.append(text.rstrip())
            return
        self.filled.append(text)
        if self.tag_follows:
            self.flush()
        self.tag_follows = False

    def read_layout(self, name: str, rest: str) -> None:
        """A macro that sets no text in a line: headings, paragraphs, examples."""
        self.flush()
        if name == "SH":
            self.skipping = bool(_LEFT_OUT_SECTIONS.search(" ".join(macro_arguments(rest))))
        if name in ("SH", "SS") and not self.skipping:
            self.out.extend(["", " ".join(macro_arguments(rest))])
        elif name in _UNFILLED_MACROS or name in _FILLED_MACROS:
            self.unfilled = name in _UNFILLED_MACROS
        elif name == "IP" and not self.skipping:
            self.filled.extend(macro_arguments(rest)[:1])
        self.tag_follows = name in ("TP", "TQ")
        if name in _PARAGRAPH_MACROS and self.out and self.out[-1]:
            self.out.append("")

    def read(self, line: str) -> None:
        """Any line."""
        match = re.match(r"[.']\s*([A-Za-z]*)\s?(.*)", line)
        if match is None:
            self.read_text(strip_escapes(line))
            return
        name, rest = match.group(1), match.group(2)
        if name not in _FONT_MACROS and name not in _ALTERNATING_MACROS:
            self.read_layout(name, rest)
            return
        text = ("" if name in _ALTERNATING_MACROS else " ").join(macro_arguments(rest))
        if text:
            self.read_text(text)


def page_text(source: str) -> str | None:
    """The readable text of a manual page, or None for a page in macros that are not read here.

    Those are mdoc pages, pages that define macros of their own, and pages that only include another.
    """
    source = re.sub(r"^\.TS.*?^\.TE", "", source, flags=re.MULTILINE | re.DOTALL)  # tables do not read as text
    start = re.search(r"^\.TH ", source, re.MULTILINE)
    if start is None:
        return None
    body = source[start.start() :]
    if re.search(r"^\.\s*(so|de (?!Sp|Vb|Ve|IX))\b", body, re.MULTILINE):
        return None
    reader = _PageReader()
    for line in body.splitlines()[1:]:
        reader.read(line)
    reader.flush()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(reader.out)).strip()
