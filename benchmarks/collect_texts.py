"""Collect English paragraphs for distillation from Debian packages and source distributions.

    apt-get download fortunes wordnet-base debian-handbook …
    python benchmarks/collect_texts.py DIRECTORY OUT

Every ``.deb``, ``.tar.gz`` and ``.txt`` in ``DIRECTORY`` is one source; a ``.txt`` is a list of the
``Description-en`` fields of packages. ``OUT/NAME.txt`` gets its paragraphs, one per line: 40 to 900
characters, mostly letters, with English function words, each once over all sources.
``OUT/sources.json`` counts them. What a model is tested on must be another source than those it is
trained on, so each source has a file of its own.
"""

from __future__ import annotations

import argparse
import gzip
import html
import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS, MAX_CHARACTERS = 40, 900
MAX_FILE_BYTES = 2**26
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the of and to in a is that for it as with was be by on not he his but at are this have "
        "from or had which you an they were their one all we can her has there been if more when "
        "will would who so no she your may used my do its these other than",
    )
)
_SKIPPED = re.compile(r"(?s)<(script|style|pre|code|table|nav|head)\b.*?</\1>|<!--.*?-->")
_BLOCK = re.compile(r"(?i)</?(p|li|dd|dt|div|br|h\d|tr|td|section|blockquote|ul|ol|dl)\b[^>]*>")
_TAG = re.compile(r"<[^>]+>")
_TROFF = re.compile(r"\\(f.|\*\(..|\(..|[&|^%]|s[+-]?\d)")
_OTHER_LANGUAGE = re.compile(
    r"/(?!en)(ar|bg|ca|cs|da|de|el|es|eu|fa|fi|fr|gl|he|hr|hu|id|it|ja|ko|lt|lv|nb|nl|nn|pl|pt|ro|"
    r"ru|sk|sl|sr|sv|tr|uk|vi|zh)([_-]\w+)?(\.UTF-8)?/|[._](ar|cs|da|de|el|es|fi|fr|id|it|ja|ko|nb|"
    r"nl|pl|pt|pt-br|ro|ru|sv|tr|uk|vi|zh-\w+)\.(html|txt)"
)
DESCRIPTIONS = "Description-en"
BIBLE = re.compile(r"(?m)^\S+ ?\w*\d+:\d+ ")


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files in an archive, unpacked once more where gzipped."""
    if path.suffix == ".deb":
        data = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", path],  # noqa: S607
            check=True,
            capture_output=True,
        ).stdout
        archive = tarfile.open(fileobj=io.BytesIO(data))  # noqa: SIM115
    else:
        archive = tarfile.open(path)  # noqa: SIM115
    with archive:
        for member in archive:
            if not member.isfile() or not 200 < member.size < MAX_FILE_BYTES:
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            name, content = member.name, stream.read()
            if name.endswith(".tar.gz"):
                with tarfile.open(fileobj=io.BytesIO(content)) as inner:
                    for one in inner:
                        if one.isfile() and (part := inner.extractfile(one)) is not None:
                            yield f"{name}/{one.name}", part.read()
                continue
            if name.endswith((".gz", ".dz")):
                name, content = name[:-3], gzip.decompress(content)
            yield name, content


def paragraphs_of(name: str, text: str) -> Iterator[str]:
    """Yield the raw paragraphs of one file; nothing for files that hold no prose."""
    if _OTHER_LANGUAGE.search(name) or "/locale/" in name or "changelog" in name.lower():
        return
    suffix = Path(name).suffix
    if suffix in (".html", ".xhtml", ".htm", ".page"):
        text = _BLOCK.sub("\n\n", _SKIPPED.sub("\n\n", text))
        yield from html.unescape(_TAG.sub("", text)).split("\n\n")
    elif "/games/fortunes/" in name and not suffix:
        yield from re.split(r"\n%\n", text)
    elif re.search(r"/wordnet.*/data\.\w+$", name) or re.search(r"wordnet/data\.\w+$", name):
        for line in text.splitlines():
            gloss = line.partition(" | ")[2]
            yield gloss.replace('"', "")
    elif re.search(r"/man\d/", name):
        for block in re.split(r"\n\.(?:PP|P|LP|SH|SS|TP|IP|sp|Pp|Sh|It|Bl|El)\b.*", text):
            lines = [
                re.sub(r"^\.[BIR]{1,2} ", "", line)
                for line in block.splitlines()
                if not re.match(r"^[.'](?![BIR]{1,2} )", line)
            ]
            yield _TROFF.sub("", "\n".join(lines)).replace("\\-", "-")
    elif name.startswith("wesnoth") or "/wesnoth/" in name:
        yield from re.findall(r'_ ?"([^"]+)"', text)
    elif suffix == ".json" and "datasets-" in name:
        yield from re.split(r"\n\s*\n", text.replace("\\n", "\n").replace('\\"', '"'))
    elif name.endswith("_GroundTruth.txt"):
        yield from (line.rpartition("\t")[2] for line in text.splitlines())
    elif name == DESCRIPTIONS:
        yield from re.split(r"\n(?: \.)?\n", re.sub(r"(?m)^\S.*$", "", text))
    elif suffix == ".dict":
        yield from re.split(r"\n\s*\n|\n(?=\S)", re.sub(r"[{}]|\[[^]]*\]", "", text))
    elif suffix in (".txt", ".rst", ".md", ".info", ".pod", ".des", ".raw", ".cfg", "", ".lua"):
        if "bible" in name and BIBLE.search(text):
            yield from BIBLE.sub("\n\n", text).split("\n\n")
        else:
            yield from re.split(r"\n[ \t]*\n", text.replace("\r", ""))


def pieces(paragraph: str) -> Iterator[str]:
    """Yield the paragraph on one line, a long one in parts of whole sentences."""
    text = re.sub(r"\s+", " ", paragraph).strip(" *-•|")
    while len(text) > MAX_CHARACTERS:
        stop = text.rfind(". ", MIN_CHARACTERS, MAX_CHARACTERS) + 1
        if not stop:
            return
        yield text[:stop]
        text = text[stop + 1 :]
    yield text


def cleaned(text: str) -> str | None:
    """Return the text, or None if it is not English prose of a fit length."""
    if len(text) < MIN_CHARACTERS:
        return None
    letters = sum(c.isalpha() or c in " ,.;'" for c in text)
    if letters < 0.92 * len(text) or sum(c > "\u024f" for c in text) > 8:
        return None
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < 8 or sum(word in FUNCTION_WORDS for word in words) < 0.22 * len(words):
        return None
    return text if len(set(words)) > 0.5 * min(len(words), 40) else None


def texts_of(path: Path) -> Iterator[str]:
    """Yield the English paragraphs of one source."""
    files = [(DESCRIPTIONS, path.read_bytes())] if path.suffix == ".txt" else members(path)
    for name, content in files:
        if b"\0" not in content[:4096]:
            for paragraph in paragraphs_of(name, content.decode("utf-8", "replace")):
                for piece in pieces(paragraph):
                    if (text := cleaned(piece)) and "\ufffd" not in text:
                        yield text


def main() -> None:
    """Collect, remove duplicates, shuffle, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    directory = arguments.directory
    arguments.out.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    counts = {}
    sources = [path for end in (".deb", ".tar.gz", ".txt") for path in directory.glob(f"*{end}")]
    for path in sorted(sources):
        name = path.name.partition("_")[0].removesuffix(".tar.gz").removesuffix(".txt")
        found = []
        for text in texts_of(path):
            key = hash(re.sub(r"[^a-z]", "", text.lower())[:200])
            if key not in seen:
                seen.add(key)
                found.append(text)
        random.Random(0).shuffle(found)
        if found:
            (arguments.out / f"{name}.txt").write_text("\n".join(found) + "\n")
        counts[path.name] = len(found)
        print(f"{len(found):>8} {path.name}", flush=True)
    (arguments.out / "sources.json").write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
