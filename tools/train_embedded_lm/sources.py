"""The text that the embedded model reads: documentation and docstrings of open projects.

    python tools/train_embedded_lm/sources.py --work WORK

downloads one archive per project into WORK/archives (PyPI's sdists, and CPython's own), checks
each against its SHA-256 in sources.csv, and writes WORK/documents.jsonl.gz: one document a line,
{"name": "numpy/doc/source/user/basics.broadcasting", "text": ...}, sorted by name.

A document is a page of documentation with its markup taken off, or the docstrings of one module,
each under the signature it belongs to. Left out: changelogs, tests, tables of output, pages that
say nothing in words, and every paragraph that an earlier document has had already.
`--add NAME` writes a line of sources.csv for the newest release of a project.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

TABLE = Path(__file__).with_name("sources.csv")


@dataclass(frozen=True)
class Source:
    """A project's archive: PyPI's sdist, or what `url` names. `licence` is an SPDX expression."""

    name: str
    version: str
    licence: str
    sha256: str
    url: str = ""


def sources() -> list[Source]:
    with TABLE.open(newline="") as file:
        return [Source(**row) for row in csv.DictReader(file)]


def sdists(name: str) -> list[dict]:
    """What PyPI's index (PEP 691) says of a project's sdists, oldest first."""
    kind = "application/vnd.pypi.simple.v1+json"
    question = urllib.request.Request(f"https://pypi.org/simple/{name}/", headers={"Accept": kind})
    with urllib.request.urlopen(question, timeout=60) as answer:
        files = json.load(answer)["files"]
    files.sort(key=lambda file: file["upload-time"])
    return [f for f in files if f["filename"].endswith(".tar.gz")]


def fetch(source: Source, folder: Path) -> Path:
    """The archive, downloaded unless it is there; its checksum must be the table's."""
    target = folder / f"{source.name}-{source.version}{'.deb' * source.url.endswith('.deb')}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        url = source.url
        if not url:
            of_hash = {f["hashes"]["sha256"]: f["url"] for f in sdists(source.name)}
            url = of_hash[source.sha256]
        with urllib.request.urlopen(url, timeout=600) as answer:
            content = answer.read()
        partial = target.with_suffix(".partial")
        partial.write_bytes(content)
        partial.rename(target)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{target}: SHA-256 {found}, the table has {source.sha256}")
    return target


# ---- which files --------------------------------------------------------------------------------

_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_testing|conftest|benchmarks?|asv_bench|locales?|locale|translations?"
    r"|vendor|_vendor|_vendored|third_party|extern|externals|node_modules|build|licen[cs]es?"
    r"|release[-_]?notes?|releases?|changes?|changelogs?|whats_?new|news|history|authors|whatsnew"
    r"|credits|contributors|newsfragments|upcoming_changes|api_changes|prev_api_changes|NEWS|misc"
    r"|src/transformers/models|includes/_static|_templates|_themes?|unreleased_\d+|changelog_\d+)(/|\.|$|_)",
    re.IGNORECASE,
)  # fmt: skip
_PAGES = (".rst", ".md", ".txt")
_DOC_FOLDERS = re.compile(r"(^|/)(docs?|Doc|documentation|docs_src|doc_src|tutorials?)/")


def kind(path: str) -> str | None:
    """ "page", "module" or None, for a path inside the archive's one folder."""
    if _LEFT_OUT.search(path):
        return None
    suffix = PurePosixPath(path).suffix
    if suffix in _PAGES and (_DOC_FOLDERS.search(path) or path.startswith("README")):
        return None if path.endswith(("requirements.txt", "CMakeLists.txt")) else "page"
    in_doc = _DOC_FOLDERS.search(path) or path.startswith(("setup", "tools/"))
    return "module" if suffix == ".py" and not in_doc else None


# ---- pages --------------------------------------------------------------------------------------

_ROLE = re.compile(r":[\w+:.-]+:`(?P<text>[^`]+)`")
_LINK = re.compile(r"`(?P<text>[^`<]+?)\s*<[^`>]+>`_{0,2}")
_TITLE_LINE = re.compile(r"^\s*([=\-~^\"'`#*+.:_])\1{2,}\s*$")
_KEPT_BODY = {  # directives whose body is text, and how it is introduced
    "note": "Note: ", "warning": "Warning: ", "tip": "Tip: ", "important": "Important: ",
    "caution": "Caution: ", "hint": "Hint: ", "attention": "Attention: ", "danger": "Danger: ",
    "seealso": "See also: ", "admonition": "", "rubric": "", "topic": "", "sidebar": "",
    "versionadded": "New in version ", "versionchanged": "Changed in version ",
    "deprecated": "Deprecated since version ", "code-block": "", "code": "", "sourcecode": "",
    "ipython": "", "doctest": "", "testcode": "", "highlight": None, "glossary": "", "math": None,
    "describe": "", "option": "", "cmdoption": "", "envvar": "", "attribute": "", "method": "",
    "function": "", "class": "", "exception": "", "data": "", "module": "", "opcode": "",
    "classmethod": "", "staticmethod": "", "decorator": "", "property": "", "setting": "",
    "templatetag": "", "templatefilter": "", "django-admin": "", "fieldlookup": "", "prompt": "",
    "parsed-literal": "", "epigraph": "", "pull-quote": "", "container": "", "dropdown": "",
    "tab-item": "", "tab-set": "", "grid": "", "grid-item-card": "", "console": "", "plot": None,
    "type": "", "confval": "", "currentmodule": None, "decoratormethod": "", "macro": "",
    "member": "", "var": "", "c:function": "", "py:function": "", "py:class": "",
    "py:method": "", "py:data": "", "py:attribute": "", "topic:": "", "impl-detail": "",
    "availability": "Availability: ", "event": "", "monitoring-event": "", "program": None,
}  # fmt: skip


def plain_inline(text: str) -> str:
    """Without roles, links and emphasis."""

    def role(match: re.Match[str]) -> str:
        inner = match["text"]
        if inner.endswith(">") and "<" in inner:
            return inner[: inner.rindex("<")].strip()
        return inner.rsplit(".", 1)[-1] if inner.startswith("~") else inner.lstrip("!")

    text = _ROLE.sub(role, text)
    text = _LINK.sub(lambda m: m["text"], text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]+)\]\((?:[^()\s]|\([^)]*\))*\)", r"\1", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"`([^`\n]+)`__?\b", r"\1", text)
    text = re.sub(r"(?<![\w*])\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])", r"\1", text)
    text = re.sub(r"\|([\w.-]+)\|", r"\1", text)
    text = re.sub(r"\[(\w+)\]_", r"[\1]", text)
    return re.sub(r"(\w)_\b(?=[\s.,;)]|$)", r"\1", text) if "_ " in text else text


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def plain_rst(text: str) -> str:
    """reStructuredText as one would read it aloud: no directives, labels, roles or underlines."""
    lines, out, i = text.expandtabs(4).splitlines(), [], 0
    while i < len(lines):
        line = lines[i].rstrip()
        directive = re.match(r"^(\s*)\.\.(\s+(?P<name>[\w:+-]+)::\s*(?P<rest>.*)|\s*|\s+.*)$", line)
        if directive is None:
            i += 1
            if _TITLE_LINE.match(line) or re.match(r"^\s*\+[-=+]+\+\s*$|^\s*=[= ]+=\s*$", line):
                continue
            if re.match(r"^\s*:[\w -]+:\s*$", line):  # a field without content
                continue
            out.append(line[:-1] if line.endswith("::") else line)
            continue
        level, name = len(directive[1]), (directive["name"] or "").split(":")[-1]
        i += 1
        introduced = _KEPT_BODY.get(name)
        keep = introduced is not None
        if keep and directive["rest"]:
            rest = (
                "" if name in ("code-block", "code", "sourcecode", "prompt") else directive["rest"]
            )
            if introduced or rest:
                out.append(directive[1] + introduced + rest)
        first = True
        while i < len(lines) and (not lines[i].strip() or indent_of(lines[i]) > level):
            body = lines[i].rstrip()
            i += 1
            if not keep:
                continue
            if first and re.match(r"^\s*:[\w-]+:", body):  # the directive's options
                continue
            if body:
                if first and introduced and not directive["rest"]:
                    body = directive[1] + introduced + body.strip()
                first = False
            # bodies hold directives of their own
            out.append(body)
            if re.match(r"^\s*\.\.\s", body):
                out.pop()
                i -= 1
                break
        else:
            if not keep:
                out.append("")
    return "\n".join(out)


def plain_markdown(text: str) -> str:
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*(```|~~~|:::|\{%|!!!|///).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^#+\s*", "", text, flags=re.MULTILINE)
    return re.sub(r"</?\w+[^<>\n]*/?>", "", text)


# ---- docstrings ---------------------------------------------------------------------------------


def signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for argument in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]:
        argument.annotation = None
    for argument in (node.args.vararg, node.args.kwarg):
        if argument is not None:
            argument.annotation = None
    return f"{node.name}({ast.unparse(node.args)})"


def docstrings(source: str) -> str | None:
    """The docstrings of a module, each under its signature, with form feeds between them; None
    where there is little to read."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    parts = []
    about = ast.get_docstring(tree)
    if about:
        parts.append(about)
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.ClassDef):
            todo[:0] = node.body
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and len(text) >= 60:
            parts.append(f"{signature(node)}\n\n{text}")
    return "\f".join(parts) if sum(map(len, parts)) >= 200 else None


# ---- what is worth reading ----------------------------------------------------------------------


def tidy(text: str) -> str:
    """Inline markup off; no trailing blanks, no second empty line, no lines of data."""
    lines = []
    for line in plain_inline(text).splitlines():
        line = line.rstrip()
        wordlike = sum(c.isalpha() or c == " " for c in line)
        if len(line) > 300 or (len(line) > 12 and wordlike < 0.45 * len(line)):
            continue
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


class Paragraphs:
    """Keeps what no earlier document had."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def new(self, text: str) -> str:
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= 80:
                key = hashlib.blake2b(words.lower().encode(), digest_size=12).digest()
                if key in self.seen:
                    continue
                self.seen.add(key)
            kept.append(paragraph)
        return "\n\n".join(kept)


def is_worth_reading(text: str) -> bool:
    """English in sentences: long enough, mostly letters, not a list of names and headings."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    latin = sum(c < "\x7f" for c in text)
    paragraphs = [p for p in text.split("\n\n") if p.strip()]
    said = sum(len(p) for p in paragraphs if len(p) >= 60)
    return (
        len(text) >= 600
        and letters >= 0.75 * len(text)
        and latin >= 0.97 * len(text)
        and said >= 0.7 * len(text)
    )


def opened(archive: Path) -> tarfile.TarFile:
    """A tar file, or the one inside a Debian package (an ar archive)."""
    content = archive.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        return tarfile.open(archive)
    at = 8
    while content[at : at + 8] != b"data.tar":
        size = int(content[at + 48 : at + 58])
        at += 60 + size + size % 2
    size = int(content[at + 48 : at + 58])
    return tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size]))


def read(archive: Path, name: str) -> Iterator[tuple[str, str]]:
    """(name, text) of an archive's documents."""
    with opened(archive) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if "/html/_sources/" in path:  # pages as Sphinx read them, in a package of its output
                path = "doc/" + path.rpartition("/html/_sources/")[2].removesuffix(".txt")
            what = kind(path) if member.isfile() and member.size < 4 << 20 else None
            file = tar.extractfile(member) if what else None
            if file is None:
                continue
            try:
                raw = file.read().decode()
            except UnicodeDecodeError:
                continue
            if what == "module":
                # each by itself: a directive ends with its docstring
                pieces = [plain_rst(piece) for piece in (docstrings(raw) or "").split("\f")]
            else:
                pieces = [plain_markdown(raw) if path.endswith(".md") else plain_rst(raw)]
            text = "\n\n\n".join(map(tidy, pieces))
            yield f"{name}/{PurePosixPath(path).with_suffix('')}", text


def documents(archives: list[tuple[Source, Path]]) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(2) as pool:
        read_all = pool.map(lambda pair: list(read(pair[1], pair[0].name)), archives)
        found = sorted(pair for pairs in read_all for pair in pairs)
    paragraphs, kept = Paragraphs(), []
    for name, text in found:
        text = paragraphs.new(text).strip("\n") + "\n"
        if is_worth_reading(text):
            kept.append((name, text))
    return kept


# ---- the split ----------------------------------------------------------------------------------

# Whole projects that the model never reads, besides one document in 50 of all others.
HELD_OUT = frozenset(["flask", "h5py", "joblib", "lmfit", "seaborn"])


def is_held_out(name: str) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return name.partition("/")[0] in HELD_OUT or int.from_bytes(digest, "big") % 50 == 0


def read_documents(work: Path, split: str) -> dict[str, str]:
    """ "train" or "heldout" of what `main` wrote: name -> text."""
    with gzip.open(work / "documents.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    held_out = split == "heldout"
    return {row["name"]: row["text"] for row in rows if is_held_out(row["name"]) == held_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "LICENCE"))
    args = parser.parse_args()
    if args.add:
        name, licence = args.add
        file = sdists(name)[-1]
        version = file["filename"].removesuffix(".tar.gz").rpartition("-")[2]
        row = asdict(Source(name, version, licence, file["hashes"]["sha256"]))
        fresh = not TABLE.exists()
        with TABLE.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        return
    every = sources()
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda s: fetch(s, args.work / "archives"), every))
    total: dict[str, int] = {}
    with gzip.open(args.work / "documents.jsonl.gz", "wt", encoding="utf-8") as file:
        for name, text in documents(list(zip(every, paths, strict=True))):
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
            project = name.partition("/")[0]
            total[project] = total.get(project, 0) + len(text.encode())
    for project, size in sorted(total.items(), key=lambda pair: -pair[1]):
        print(f"{project:<20} {size / 1e6:8.2f} MB")
    print(f"{'in all':<20} {sum(total.values()) / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()
