"""The corpora by name: which files they have, where those lie on the web, and how they get from there."""
import dataclasses
import errno
import fnmatch
import http.client
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from common import BLOCK, Refused, sha256_of
from reading import Rules, Source, bare, local, one_each, walk

HUB = "https://huggingface.co"
FIRST, STALLED = 20, 30  # seconds: to the first answer of all; without a byte in a download
ATTEMPTS = 6  # without a byte, 1 to 16 seconds apart
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclasses.dataclass
class Corpus:
    about: str
    fraction: float          # for validation, where it has no such files: every 1/fraction-th document
    train: tuple             # patterns of file names; the first that any file matches counts
    val: tuple = ()
    repository: str = None   # of the Hugging Face hub
    folders: dict = None     # subset: folder in it, the default first; a pattern for those without a name of their own
    url: str = None
    rules: Rules = dataclasses.field(default_factory=Rules)

    def subset(self, name):
        """(name, folder)"""
        name = name or next(iter(self.folders or {"": ""}))
        for known, folder in (self.folders or {"": ""}).items():
            if fnmatch.fnmatchcase(name, known):
                return name, folder.format(name)
        raise Refused(f"--subset: {name} is none of this corpus. Give one of {', '.join(self.folders or ['none'])}.")


STORIES = Rules("text", separator=b"<|endoftext|>")
CORPORA = {
    "c4": Corpus("allenai/c4, English", 0.001, ("c4-train.*.json*",), ("c4-validation.*.json*",), "allenai/c4",
                 {n: "{}" for n in ("en", "en.noblocklist", "en.noclean", "realnewslike")},
                 rules=Rules("jsonl")),
    "fineweb-edu": Corpus("HuggingFaceFW/fineweb-edu", 0.001, ("*.parquet",), (), "HuggingFaceFW/fineweb-edu",
                          {"sample-10BT": "sample/10BT", "sample-100BT": "sample/100BT", "sample-350BT": "sample/350BT",
                           "default": "data", "CC-MAIN-*": "data/{}"}),
    "openwebtext": Corpus("Skylion007/openwebtext", 0.0005, ("train-*.parquet",), (), "Skylion007/openwebtext",
                          {"plain_text": "plain_text"}),
    "tinystories": Corpus("roneneldan/TinyStories", 0.01, ("TinyStories-train.txt", "train-*.parquet"),
                          ("TinyStories-valid.txt", "validation-*.parquet"), "roneneldan/TinyStories", {"v1": ""},
                          rules=STORIES),
    "tinystories-v2": Corpus("roneneldan/TinyStories, the stories by GPT-4", 0.01, ("TinyStoriesV2-GPT4-train.txt",),
                             ("TinyStoriesV2-GPT4-valid.txt",), "roneneldan/TinyStories", {"v2": ""}, rules=STORIES),
    "tinyshakespeare": Corpus("1 MB of Shakespeare, one document", 0.1, ("input.txt", "tinyshakespeare.txt"),
                              url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                                  "input.txt"),
}


def matching(files, patterns, name):
    """the files that the first pattern with any takes, sorted"""
    for pattern in patterns:
        found = [f for f in files if any(fnmatch.fnmatchcase(n, pattern) for n in (name(f), bare(name(f))))]
        if found:
            return sorted(found)
    return []


def in_order(corpus, split):
    """validation first: it is short, and a run that is cut off has it"""
    return [("val", corpus.val), ("train", corpus.train)] if corpus.val else [(split, corpus.train)]


def from_files(name, given):
    """a corpus's files that lie here already: paths of files and directories"""
    corpus, files = CORPORA[name], []
    for place in map(Path, given):
        if not place.exists():
            raise Refused(f"{place}: there is no such file or directory. Check the path.")
        files += walk(place, ["*"]) if place.is_dir() else [place]
    sources = [local(path, split) for split, patterns in in_order(corpus, None)
               for path in matching(set(files), patterns, lambda path: path.name)]
    sources = list(one_each(sources))
    if not any(s.split != "val" for s in sources):
        raise Refused(f"{given[0]}: no file of {name} is there. Its names are like {' or '.join(corpus.train)}.")
    if all(s.split == "train" for s in sources):
        for s in sources:
            s.split = None  # no validation files: every k-th document is for it
    return sources


class Web:
    """requests; the hub's address and a token for it are in HF_ENDPOINT and HF_TOKEN, as for its own tools"""

    def __init__(self, what, instead="give them with --from"):
        self.what, self.instead = what, instead
        self.hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
        for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            if os.environ.get(key, "0").lower() in ("1", "true", "yes", "on"):
                raise self.unreachable(f"{key} is set, so nothing is fetched")

    def unreachable(self, why):
        return Refused(f"{self.what}: {why}. Fetch its files where there is web, and {self.instead}.")

    def open(self, url, start=0):
        request = urllib.request.Request(url, headers={"User-Agent": "prepare.py"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if os.environ.get("HF_TOKEN") and url.startswith(self.hub):
            # not for the storage that the hub sends its readers to
            request.add_unredirected_header("Authorization", "Bearer " + os.environ["HF_TOKEN"])
        return urllib.request.urlopen(request, timeout=STALLED)

    def ask(self, url):
        """(JSON, address of the next page or None); one attempt, in bounded time whatever the name server does"""
        result = []

        def work():
            try:
                with self.open(url) as answer:
                    link = answer.headers.get("Link", "")
                    result.append((json.load(answer), link[1:link.index(">")] if 'rel="next"' in link else None))
            except Exception as e:
                result.append(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(FIRST)
        host = urllib.parse.urlsplit(url).netloc
        if not result:
            raise self.unreachable(f"{host} does not answer within {FIRST} s")
        if isinstance(result[0], Exception):
            raise self.unreachable(f"{host}: {reason(result[0])}")
        return result[0]


def reason(error):
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}" + (", set HF_TOKEN" if error.code == 401 else "")
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def from_web(web, name, subset, revision):
    """(sources, revision): the corpus's files on the hub; revision: an interrupted run's, None for the newest"""
    corpus = CORPORA[name]
    _, folder = corpus.subset(subset)
    if corpus.url:
        return [Source(corpus.url.rsplit("/", 1)[1], 0, url=corpus.url)], None
    api = f"{web.hub}/api/datasets/{corpus.repository}"
    try:
        revision = revision or web.ask(f"{api}/revision/main")[0]["sha"]
        files, page = [], f"{api}/tree/{revision}/{folder}?recursive=true".replace("/?", "?")
        while page:
            entries, page = web.ask(page)
            files += [e for e in entries if e["type"] == "file"]
        sources = []
        for split, patterns in in_order(corpus, None):
            found = {f["path"]: f for f in files}
            for path in matching(found, patterns, lambda path: path.rsplit("/", 1)[-1]):
                url = f"{web.hub}/datasets/{corpus.repository}/resolve/{revision}/{urllib.parse.quote(path)}"
                sha256 = (found[path].get("lfs") or {}).get("oid")
                sources.append(Source(path, found[path]["size"], None, split, url, sha256))
    except (KeyError, TypeError, AttributeError):
        raise Refused(f"{name}: {web.hub} gives no list of its files. Fetch them by other means, for --from.") from None
    if not any(s.split != "val" for s in sources):
        raise Refused(f"{name}: {corpus.repository} has no files like {corpus.train[0]} in {folder or 'it'} any more. "
                      "Fetch them by other means, for --from.")
    return list(one_each(sources)), revision


class Downloads:
    """Fetches the sources in order, one ahead of the one in use, into a folder; forgets those that are used."""

    def __init__(self, web, folder, sources, revision=None):
        self.web, self.folder, self.sources = web, folder, sources
        self.revision = (revision or "")[:12]  # part of the names: files of another one are not taken up
        self.attempts = ATTEMPTS if sources[0].size else 1  # without a listing this is the first word with the web
        self.threads, self.errors, self.stopped = {}, {}, False

    def get(self, i):
        """the i-th source, with its path"""
        self.start(i)
        while self.threads[i].is_alive():  # with a time, so that Ctrl-C is heard
            self.threads[i].join(1)
        if i in self.errors:
            raise self.errors[i]
        self.start(i + 1)
        return self.sources[i]

    def start(self, i):
        if i < len(self.sources) and i not in self.threads:
            self.threads[i] = threading.Thread(target=self.work, args=(i,), daemon=True)
            self.threads[i].start()

    def work(self, i):
        try:
            self.folder.mkdir(exist_ok=True)
            self.sources[i].path = self.fetch(self.sources[i])
        except Exception as e:
            self.errors[i] = e

    def release(self, i):
        self.sources[i].path.unlink(missing_ok=True)

    def end(self, keep):
        self.stopped = True
        for thread in self.threads.values():
            thread.join(2)
        if not keep or (self.folder.exists() and not any(self.folder.iterdir())):
            shutil.rmtree(self.folder, ignore_errors=True)

    def fetch(self, source):
        path = self.folder / f"{self.revision}{source.name.replace('/', '_')}"
        if path.exists():
            return path
        part, failed = path.with_name(path.name + ".part"), 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if not source.size or before != source.size:
                    self.copy(source.url, part, before)
                if source.size and part.stat().st_size != source.size:
                    raise ConnectionError(f"{part.stat().st_size} of {source.size} bytes came")
                if source.sha256 and sha256_of(part) != source.sha256:
                    part.unlink()
                    raise ConnectionError("the sha256 is not that of the listing")
                os.replace(part, path)
                return path
            except (OSError, http.client.HTTPException) as e:
                if getattr(e, "errno", None) in DISK:
                    raise
                code = e.code if isinstance(e, urllib.error.HTTPError) else None
                if code == 416:
                    part.unlink(missing_ok=True)
                failed = 1 if part.exists() and part.stat().st_size > before else failed + 1
                if code in (401, 403, 404, 410) or failed >= self.attempts or self.stopped:
                    raise self.web.unreachable(f"{source.url}: {reason(e)}") from None
                time.sleep(2 ** failed / 2)

    def copy(self, url, part, start):
        """the rest of the file; all of it, where the server does not know of ranges"""
        with self.web.open(url, start) as answer, open(part, "ab" if answer.status == 206 else "wb") as f:
            expected, came = answer.headers.get("Content-Length"), 0
            while not self.stopped and (block := answer.read(BLOCK)):
                f.write(block)
                came += len(block)
        if self.stopped:
            raise ConnectionError("interrupted")
        if expected and came != int(expected):
            raise ConnectionError(f"{came} of {expected} bytes came")
