"""Tokenizers: "bytes", sentencepiece models, tiktoken rank files, tokenizer.json of the package tokenizers.

Each has name, checksum (sha256 of its file), V, bos, eos; many(documents) -> ids of each, pack(documents) -> all in one
array. Special tokens that a text spells out are text. Where one token is both BOS and EOS (<|endoftext|>), it stands
once, before the document, as in the published shards of GPT-2.
"""
import hashlib
import json
import os
import struct
import unicodedata
from pathlib import Path

import numpy as np

import convert_tokenizer
from common import Refused, package, read_whole
from convert_tokenizer import BOS, EOS, PRESETS
from shards import kind

GIVE = "Give 'bytes', a sentencepiece .model, a tiktoken rank file, a tokenizer.json, tekken.json or vocab.json."


class Encoder:
    checksum = None

    @property
    def dtype(self):
        return kind(self.V)[2]

    def ids(self, where, text):
        return self.many([(where, text)])[0]

    def many(self, documents):
        """ids of each of the documents"""
        try:
            return self.encode([text.decode() for _, text in documents])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the packages in Rust raise panics, which are no Exceptions
            if len(documents) > 1:  # which of them is it?
                return [self.ids(*d) for d in documents]
            where = documents[0][0]
            if isinstance(e, UnicodeDecodeError):
                raise Refused(f"{where}: not UTF-8 at byte {e.start}. Repair it, or use --tokenizer bytes.") from None
            what = " ".join(str(e).split())[:200]
            raise Refused(f"{where}: {self.name} fails on this text ({what}). Leave the text out.") from None

    def pack(self, documents):
        """[(where, bytes)] -> all as BOS, tokens, EOS in one array, and the length of each"""
        parts, lengths = [], []
        bos, eos = [self.bos], [self.eos] if self.eos != self.bos else []
        for ids in self.many(documents):
            parts += [bos, ids, eos]
            lengths.append(1 + len(ids) + len(eos))
        return np.concatenate([np.asarray(p, self.dtype) for p in parts]), lengths


class Bytes(Encoder):
    """V = 258: ids 0..255 are the bytes, 256 BOS, 257 EOS"""
    name, V, bos, eos = "bytes", 258, 256, 257

    def many(self, documents):
        return [np.frombuffer(text, np.uint8) for _, text in documents]


class SentencePiece(Encoder):
    def __init__(self, path, data, bos, eos):
        sentencepiece = package("sentencepiece", path, "0.1.94")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise Refused(f"{path}: not a sentencepiece model. {GIVE}") from None
        self.V = self.model.vocab_size()
        self.bos = self.model.piece_to_id(bos) if bos else self.model.bos_id()
        self.eos = self.model.piece_to_id(eos) if eos else self.model.eos_id()
        unknown = [t for t in (bos, eos) if t and self.model.is_unknown(self.model.piece_to_id(t))]
        if unknown or min(self.bos, self.eos) < 0:
            raise Refused(f"{path}: the model has no such BOS or EOS. Name its tokens with --bos and --eos.")

    def encode(self, texts):
        return [self.model.encode(text) for text in texts]


# How each family cuts a text into the pieces that its byte pairs are merged within (cl100k as the package has it today:
# white space that ends a text is one piece). Possessive where that changes no match: a long run of spaces would overflow
# the stack otherwise.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SHORT, WORDS = r"'(?i:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
CL100K = rf"{SHORT}|{WORDS}|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
LLAMA3 = rf"{SHORT}|{WORDS}|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?:{SHORT})?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?:{SHORT})?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {"gpt2": GPT2, "cl100k": CL100K, "o200k": O200K, "llama3": LLAMA3, "llama4": O200K,
            "qwen": LLAMA3.replace("{1,3}+", "")}


class Tiktoken(Encoder):
    """a rank file, or Mistral's tekken.json, whose ids begin behind those of its special tokens"""
    form = None

    def __init__(self, path, data, preset):
        tiktoken = package("tiktoken", path)
        try:
            if convert_tokenizer.is_json(data):
                ranks, pattern, self.first = convert_tokenizer.tekken_table(json.loads(data))
                self.bos, self.eos, self.V = 1, 2, self.first + max(ranks.values()) + 1
            else:
                ranks, preset, self.bos, self.eos, self.V = convert_tokenizer.rank_table(data, preset)
                pattern, self.first = PATTERNS[preset], 0
                self.form = convert_tokenizer.NORMAL_FORMS.get(preset)
        except (convert_tokenizer.Refused, *convert_tokenizer.BROKEN) as e:
            what = e if isinstance(e, convert_tokenizer.Refused) else "a field is missing or has the wrong type"
            raise Refused(f"{path}: {what}. Fetch the file again, or name its rules with --preset.") from None
        self.model = tiktoken.Encoding("it", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, texts):
        if self.form:
            texts = [unicodedata.normalize(self.form, text) for text in texts]
        every = [self.model.encode_ordinary(text) for text in texts]
        return [[self.first + i for i in ids] for ids in every] if self.first else every


class TokenizerJson(Encoder):
    def __init__(self, path, data, bos, eos):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core
        # before 0.15.1 encode_special_tokens is taken, and does nothing
        tokenizers = package("tokenizers", path, "0.15.1")
        try:
            self.model = tokenizers.Tokenizer.from_str(data.decode())
            lost = convert_tokenizer.lost(json.loads(data))
        except Exception as e:  # the package raises no narrower one
            raise Refused(f"{path}: not a tokenizer.json ({' '.join(str(e).split())[:100]}). {GIVE}") from None
        if lost:
            raise Refused(f"{path}: {lost}. Give another tokenizer.")
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True
        # does not work out where in the text each token is; package before 0.20: slower
        self.fast = getattr(self.model, "encode_batch_fast", self.model.encode_batch)
        ids = self.model.get_vocab(with_added_tokens=True)
        self.V = max(ids.values()) + 1
        self.bos, self.eos = (next((ids[t] for t in ([given] if given else usual) if t in ids), None)
                              for given, usual in ((bos, BOS), (eos, EOS)))
        if self.bos is None or self.eos is None:
            raise Refused(f"{path}: its tokens for BOS and EOS are not known. Name them with --bos and --eos.")

    def encode(self, texts):
        return [e.ids for e in self.fast(texts, add_special_tokens=False)]


def load(name, preset=None, bos=None, eos=None):
    """the tokenizer called "bytes", or that of the file name; what sort of file it is, its first bytes tell"""
    if name == "bytes":
        if bos or eos:
            raise Refused(f"--tokenizer bytes: {convert_tokenizer.SETTLED}.")
        return Bytes()
    data = read_whole(name, GIVE)
    if data.startswith(b"SGPTTOK"):
        raise Refused(f"{name}: this file is the trainer's. Give the model that it was converted from.")
    try:
        data = convert_tokenizer.with_merges(data, name, preset)
    except (convert_tokenizer.Refused, UnicodeDecodeError) as e:
        raise Refused(f"{name}: {e}. {GIVE}") from None
    if convert_tokenizer.is_rank_file(data) or convert_tokenizer.is_tekken(data):
        if bos or eos:
            raise Refused(f"{name}: {convert_tokenizer.SETTLED}.")
        encoder = Tiktoken(name, data, preset)
    elif convert_tokenizer.is_json(data):
        encoder = TokenizerJson(name, data, bos, eos)
    else:
        encoder = SentencePiece(name, data, bos, eos)
    encoder.name, encoder.checksum = Path(name).name, hashlib.sha256(data).hexdigest()
    return encoder


def converted(encoder, name, preset=None, bos=None, eos=None):
    """the trainer's file of the same tokenizer, for what makes text of ids; None: it needs none, for bytes"""
    if name == "bytes":
        return None
    try:
        data = convert_tokenizer.convert(read_whole(name, GIVE), preset, bos, eos, name)
        ends = struct.unpack_from("<III", data, 12)
        if ends != (encoder.V, encoder.bos, encoder.eos):
            raise convert_tokenizer.Refused(f"V, BOS and EOS are {ends} there")
    except convert_tokenizer.BROKEN:
        why = "a field is missing or has the wrong type"
    except convert_tokenizer.Refused as e:
        why = e
    else:
        return data
    raise Refused(f"{name}: the trainer cannot use it: {why}. Give another tokenizer, or --without-generate: then a "
                  "trained model has no samples, generate and bits per byte.")


def add_options(parser):
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|FILE",
                        help="bytes, a sentencepiece .model, a tiktoken rank file (Llama 3's tokenizer.model, "
                             "r50k_base.tiktoken for GPT-2, ...), a tokenizer.json (bytes)")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="whose rules a rank file has, if its size does not tell")
    parser.add_argument("--bos", metavar="TOKEN", help="the token before a document (the usual names are known)")
    parser.add_argument("--eos", metavar="TOKEN", help="the token behind a document")


def from_options(args):
    return args.tokenizer, args.preset, args.bos, args.eos
