"""RLTR, Reinforcement Learning with Transferable Reward, in one file.

Paper: "Beyond Correctness: Learning Robust Reasoning via Transfer" (Lee, Abbasloo, Tack, Shin;
arXiv 2602.08489). A generator learns to reason so that *another* model can pick its reasoning up
half-way and still reach the right answer: each rollout is cut at a random point, a frozen receiver
continues from there, and the share of right endings is a reward beside the usual one.

    1  y_1..y_G ~ pi(. | x)                      G rollouts a problem           sample_rollouts
    2  R_ans = 1[answer(y) = g]                  right final answer             score_answers
    3  tau ~ U(0,1], prefix = y[:floor(tau |y|)] cut the reasoning              cut_prefix
    4  z ~ M(. | x, prefix)                      the receiver goes on           TransferReward
    5  R_trans = mean_K 1[answer(prefix+z) = g]  was it transferable?           TransferReward
    6  R = a R_ans + b R_trans + c R_fmt         b = 0 is RLVR                  combine_rewards
    7  A = (R - mean_group) / (std_group + eps)  against its own group          group_advantages
    8  ascend 1/T sum min(rho A, clip(rho) A)    policy gradient (GRPO)         update

The paper's: steps 1-7 with K = 1, GRPO, one frozen receiver, tau uniform, binary rewards.
Ours, where what we know of the paper leaves it open (each is a flag or one function):
  1. a = b = 1, c = 0.1; models, lr and sizes as in `Config`; the receiver samples at temperature 1.
  2. One token mean over the whole batch (T in step 8); the ratio is clipped at 0.8 and 1.28.
  3. Groups whose rewards are all equal hold no information: they leave the update and T.
  4. `--cuts K` averages K independent cuts and continuations: a denser, dearer R_trans.
  5. The stop token is stripped before the cut, so that tau = 1 still leaves the receiver a turn.
  6. The receiver may write what the generator had left plus a margin; a prefix too long scores 0.

    python rltr.py                                    # built-in tiny models: any laptop, no network
    python rltr.py --transfer-weight 0                # the same task with the answer reward alone
    python rltr.py --model Qwen2.5-1.5B --steps 500   # one GPU: MATH, receiver its -Instruct model
    python rltr.py --resume runs/NAME                 # goes on where that run stopped"""

from __future__ import annotations

import argparse, cmath, collections, csv, dataclasses, fcntl, functools, itertools, json, math
import operator, os, random, re, resource, shutil, signal, sys, threading, time, unicodedata
import warnings, weakref
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

try:                          # comes with torch on CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ======================================================================================= settings
PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."

def option(default, text, minimum=None):
    return field(default=default, metadata={"help": text, "minimum": minimum})

@dataclass
class Config:
    """One flat record of settings; field names, defaults and help texts are the command line."""
    model: str = option("", "generator: a folder or hub name; empty: the built-in tiny task (TINY)")
    receiver: str = option("Qwen2.5-1.5B-Instruct", "frozen receiver: a folder or hub name, 'self'")
    data: str = option("math", "gsm8k, math, math500, aime24, amc23, a hub id, or a local file")
    split: str = option("", "split of a hub data set; empty: its training split")
    limit: int = option(0, "use only the first N problems (0: all)", 0)
    prompt: str = option(PROMPT, "what the models are asked, with {question} in it")
    out: str = option("", "run folder; empty: a free name like runs/MODEL-rltr-seed0")
    # -- the algorithm
    steps: int = option(500, "policy-gradient steps", 1)
    prompts: int = option(32, "problems a step", 1)
    group: int = option(8, "G: rollouts a problem", 2)
    max_new_tokens: int = option(1024, "longest completion in tokens", 1)
    temperature: float = option(1.0, "sampling temperature; the loss uses the same", 0.01)
    answer_weight: float = option(1.0, "a: weight of the right final answer", 0)
    transfer_weight: float = option(1.0, "b: weight of the transfer reward; 0 is RLVR", 0)
    format_weight: float = option(0.1, "c: weight of stopping by itself with a boxed answer", 0)
    cuts: int = option(1, "K: cuts a rollout, each with its own tau and continuation", 1)
    receiver_temperature: float = option(1.0, "temperature of the receiver (0: greedy)", 0)
    receiver_margin: int = option(64, "receiver tokens beyond what the generator had left", 0)
    normalize_std: bool = option(True, "divide advantages by the group's standard deviation")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this", 0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + this", 0)
    # -- the optimizer
    lr: float = option(2e-6, "learning rate of the fp32 master weights", 0)
    warmup: int = option(10, "steps of linear warm-up; constant afterwards", 0)
    weight_decay: float = option(0.0, "AdamW weight decay", 0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", 0)
    epochs: int = option(1, "passes over a batch; 1 with 1 minibatch is on-policy", 1)
    minibatches: int = option(1, "optimizer steps a pass", 1)
    token_budget: int = option(0, "padded tokens in a micro-batch (0: what the memory allows)", 0)
    gradient_checkpointing: bool = option(False, "recompute activations: slower, less memory")
    offload: bool = option(False, "master weights and Adam's moments in host memory")
    max_rows: int = option(0, "rows in the KV cache at once (0: what the free memory allows)", 0)
    # -- the run
    seed: int = option(0, "seed of everything random", 0)
    save_every: int = option(50, "steps between checkpoints (0: only at the end)", 0)
    keep: int = option(2, "checkpoints to keep", 1)
    show_every: int = option(25, "steps between groups shown to read (0: never)", 0)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    eval_data: str = option("", "problems for a closing before/after table (empty: no table)")
    eval_k: int = option(64, "completions a problem in that table", 1)

# With no --model, these replace the defaults of the fields that the user did not set.
TINY = dict(model="tiny/generator", receiver="tiny/receiver", data="tiny/train.jsonl",
            eval_data="tiny/test.jsonl", prompt="{question}", max_new_tokens=32, receiver_margin=4,
            steps=150, lr=5e-4, cuts=4, transfer_weight=2.0, device="cpu")

# What may differ when a run is resumed; anything else would make it another run.
HARMLESS = {"steps", "save_every", "keep", "show_every", "eval_data", "eval_k", "out"}

class UserError(Exception):
    """Something the user can put right: main prints it as one line and exits with 2."""

def require(condition, message: str):
    if not condition:
        raise UserError(message)

# What random numbers are drawn for. rng(seed, purpose, step, ...) is a function of its keys alone:
# streams do not disturb each other, and a resumed run has no generator state to restore.
DATA, ROLLOUT, CUT, CONTINUATION, EVALUATION = range(1, 6)

def rng(*keys: int) -> np.random.Generator:
    return np.random.default_rng(keys)

# With torchrun N processes, the ranks, run this file, each on a GPU of its own. All of them know
# all rollouts; each samples and learns from its share. Rank 0 writes and speaks.
RANK, RANKS = 0, 1

def join_ranks():
    """Started by torchrun: meet the other ranks."""
    global RANK, RANKS
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
        RANK, RANKS = torch.distributed.get_rank(), torch.distributed.get_world_size()

def share(count: int) -> slice:
    """This rank's part of `count` rows."""
    return slice(count * RANK // RANKS, count * (RANK + 1) // RANKS)

def gather(rows: list) -> list:
    """The rows of all ranks, end to end, on every rank; who calls it waits for the others."""
    parts = [rows] * RANKS
    if RANKS > 1:
        torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]

# ======================================================================================= problems
SOURCES = {"gsm8k": ("openai/gsm8k", "main"), "math": ("nlile/hendrycks-MATH-benchmark", None),
           "math500": ("HuggingFaceH4/MATH-500", None), "aime24": ("math-ai/aime24", None),
           "amc23": ("math-ai/amc23", None)}

@dataclass(frozen=True)
class Problem:
    question: str
    answer: str          # the bare gold answer: "18", "\\frac{3}{4}"

def load_problems(source: str, split: str | None = None, limit: int | None = None,
                  prefer: str = "train") -> list[Problem]:
    """Problems of a short name (SOURCES), a hub id, or a local .jsonl, .json, .csv, .parquet file.
    Columns: question | problem | prompt, and answer | solution, of which GSM8K's `#### 18` or the
    last `\\boxed{}` is taken. split None: the one called `prefer`, or the only one there is; a
    local file is one split. Raises UserError naming the source and the row."""
    rows = _read_rows(source, split, prefer)
    require(isinstance(rows, list) and all(isinstance(row, dict) for row in rows),
            f"{source}: not a list of objects")
    require(rows, f"{source}: no rows")
    question, answer = (next((c for c in names if c in rows[0]), None) for names in (
        ("question", "problem", "prompt"), ("answer", "solution")))
    require(question and answer, f"{source}: needs a column question, problem or prompt and a "
            f"column answer or solution; it has {', '.join(map(str, rows[0]))}")
    problems = []
    for number, row in enumerate(rows[:limit or None], 1):
        cells = (row.get(question), row.get(answer))
        asked, text = (str(c).strip() if isinstance(c, (str, int, float)) else "" for c in cells)
        gold = extract_answer(text) or ("" if answer == "solution" or "####" in text else text)
        require(asked, f"{source}: row {number} has an empty {question}")
        require(gold, f"{source}: row {number} has no answer in its {answer}")
        problems.append(Problem(asked, gold))
    return problems

def _read_rows(source: str, split: str | None, prefer: str) -> list[dict]:
    kind = Path(source).suffix
    require(kind != ".parquet" or Path(source).is_file(), f"{source}: no such file")
    try:
        if kind in (".jsonl", ".json", ".csv"):
            with open(source, encoding="utf-8", newline="") as file:
                if kind == ".jsonl":
                    return [json.loads(line) for line in file if line.strip()]
                return json.load(file) if kind == ".json" else list(csv.DictReader(file))
        use_cache_if_offline()
        import datasets
        if kind == ".parquet":
            return list(datasets.Dataset.from_parquet(source))
        splits = datasets.load_dataset(*SOURCES.get(source, (source, None)))
    except ImportError:
        raise UserError(f"{source}: pip install datasets, or give a local .jsonl file") from None
    except Exception as error:            # each reader has failures of its own: say which
        raise UserError(f"{source}: cannot be read: {error}") from None
    split = split or (prefer if prefer in splits or len(splits) > 1 else next(iter(splits)))
    require(split in splits, f"{source}: no split {split}; it has {', '.join(splits)}")
    return list(splits[split])

def use_cache_if_offline():
    """Where no hub answers, look in the local cache only, instead of retrying for minutes."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:                     # its HTTP library and so its errors differ by version
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"

def draw_problems(problems: list, count: int, seed: int, step: int) -> list:
    """The problems of a step, a function of (seed, step): permutations of the data, end to end."""
    first, size = step * count, len(problems)
    epochs = {e: rng(seed, DATA, e).permutation(size)
              for e in range(first // size, (first + count - 1) // size + 1)}
    return [problems[epochs[i // size][i % size]] for i in range(first, first + count)]

# ======================================================================================== answers
#
# RL finds every wrong answer that passes, so in doubt the verdict is "not equal". Model text is
# never executed; the length of answers, the size of numbers and the number of steps are limited.

CHECKS = collections.Counter()  # to log: 'missing', 'unparsed', 'compared_as_text' (unparsed too)
MAX_BOX, MAX_CHARS, MAX_STEPS, MAX_BITS = 10_000, 600, 400, 8_000
SYMBOLS = {form: row.split()[0] for row in (  # the first form of a row stands for all
    r'* \cdot \times × · ⋅', r'/ \div ÷ ⁄', '- − – —', r'± \pm', r'= \approx ≈', r'≠ \ne \neq !=',
    r'< \lt', r'> \gt', r'≤ \le \leq \leqslant <=', r'≥ \ge \geq \geqslant >=', r'∈ \in', r'∪ \cup',
    '^ **', r'% \%', r'⦃ \{', r'⦄ \}', r'∞ \infty \infinity', r'π \pi', r'\frac \dfrac \tfrac',
    r'∖ \setminus', r'√ \sqrt', r"' \prime ′ ’", r'° \circ \degree') for form in row.split()}
REWRITES = [(re.compile(pattern), new) for pattern, new in (  # the rest; the order matters
    ('[⁰¹²³⁴-⁹⁺⁻]+', r'^{\g<0>}'), ('[¼-¾⅐-⅞]', r' \g<0>'),  # x² 2½
    (r'[^\x00-\x7f]+', lambda m: unicodedata.normalize('NFKC', m[0])),
    (r'\\begin ?\{[pb]?matrix\}', '(('), (r'(\\\\\s*)?\\end ?\{[pb]?matrix\}', '))'),
    (r'(?<=\d)(?:\{,\}|,\\!|\\[,;: ]|[~ ]) ?(?=(?:\d{3})+(?!\d| ?/))', ''),  # 1{,}000  1\,000
    (r'\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|limits)(?![A-Za-z])\.?|\\!', ''),
    (r'\\\\', '),('), ('&', ','), (r'\\[,;:> ]|\\q?quad(?![A-Za-z])|[~\s]+', ' '),  # matrix
    (r'\\?[$€£¥]|\\[()\[\]]|\\(?:math(?:bb|bf|cal|it|sf)|boldsymbol|vec)(?![A-Za-z])', ''),
    (r'(?<=[\d}]) ?\\(?:mathrm|text) ?\{ ?([A-Za-cf-hj-z])(?![A-Za-z.])', r' \\text{\1unit'),  # 5 m
    (r'\\(?:text[a-z]*|mathrm|[mh]box|operatorname) ?\{([^{}]*)\}', r' \1 '),
    (r'(?<![\\A-Za-z])(sqrt|sin|cos|tan|ln|log|exp|pi|infinity)(?![A-Za-z])', r'\\\1 '),
    (r'\\[A-Za-z]+|\\[{}%]|[<>!]=|\*\*|[^\x00-\x7f]', lambda m: SYMBOLS.get(m[0], m[0])),
    (r'(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])', lambda m: m[0].replace('.', '')),  # 1.000.000
    (r'(?<=\d)(?<!\d{4}),(?=\d{3}(?!\d)[^)\]⦄]*$)', ''),  # outside of brackets 1,000 is a number
    (r"\^ ?\{? ?(°|'[' ]*)\}?", r'\1'), (r'\bdegrees?\b', '°'), (r'\bper ?cent\b', '%'),
    (r'(?<=\d) ?\^? ?\{? ?(?:st|nd|rd|th)\b ?\}?', ''), (r'\\frac ?(\d) ?(\d)', r'\\frac{\1}{\2}'),
    (r'\b(?=hundred|dozen|thousand|[mb]illion)', r'\\nounit '), (r'(?<=\d) ?x ?(?=10\^)', '*'),
    (r'(?<![\w.^}])(\d+) (\d+) ?/ ?(\d+)(?![\d.])', r'\1\\frac{\2}{\3}'),  # 1 2/3
    (r'(?<![\d.^_])(\d+) ?(\\frac ?\{ ?\d+ ?\} ?\{ ?\d+ ?\})', r'(\1+\2)'),  # a mixed number
    (r',? *\b(?:and|or)\b', ','), (r'\s+', ' '), (r'(?<=\W) | (?=\W)', ''), (r'^ +|[ .,;:]+$', ''),
    (r'([_^])\{(\w)\}(?!\w)', r'\1\2'), (r'^(?:[Aa]ll real numbers$|\{?R\}?(?=$|∖))', '(-∞,∞)'),
    (r'([(\[])([^(),]*),([^(),]*)([)\]])∖⦃([^,⦄]*)⦄', r'\1\2,\5)∪(\5,\3\4'))]  # (1,3) without {2}
GREEK = 'alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|omega|Delta|Omega'
NAME = rf"(?:[A-Za-zπ°∞]|\\(?:{GREEK})(?![A-Za-z])|\d+(?=_))'*(?:_(?:\{{[^{{}}]*\}}|\w))?"  # 21_3
TOKEN = rf'\s*({NAME}|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{{1,3}}(?!\d))?|\\[A-Za-z]+|\S)'
NAMED = re.compile(r"(?!\(\W*\d)([A-Za-z\\{},:/'| ]|\([\w,.|-]*\)|_\w|_\{[^{}]*\})+")  # x, f(2)
TEXT = re.compile(r"[A-Za-z '.!?()-]*(?:[A-Za-z]{3}|\b[nN][oO]\b)[A-Za-z '.!?()-]*")
UNIT = re.compile(r'(.*[0-9π)}.]) ?((?:\b[A-Za-z]{3,}\b|%|°|(?:[cmk]m|k?g|ft|in|lbs?|hrs?|mph)\b)'
                  r'(?:[ */.]|\^\{?-?\d\}?|%|°|\b[A-Za-z]+\b)*)')
FUNCTIONS = {'\\sin': cmath.sin, '\\cos': cmath.cos, '\\tan': cmath.tan, '\\exp': cmath.exp,
             '\\sec': lambda z: 1 / cmath.cos(z), '\\ln': cmath.log, '\\log': cmath.log10,
             '\\arcsin': cmath.asin, '\\arccos': cmath.acos, '\\arctan': cmath.atan}
CONSTANTS = {'π': math.pi, 'e': math.e, 'i': 1j, '°': math.pi / 180}
CLOSING = {'(': ')', '[': ']', '{': '}', '|': '|'}
OPERATORS = {'+': (0, 1, operator.add), '-': (0, 1, operator.sub), '*': (1, 3, operator.mul),
             '/': (1, 3, operator.truediv), '^': (4, 4, operator.pow)}  # level, right side's level
POINTS = 997, 1009, -1013  # moduli for the variables' values: all are negative at the last point

def understood(condition):
    if not condition:
        raise ValueError('an answer is not understood or too large')

def bits(value):  # the number of bits of a Fraction, 0 for a float
    return sum(map(int.bit_length, value.as_integer_ratio())) if type(value) is Fraction else 0

@functools.lru_cache(1000)
def value_of(text, point):
    """The value of an expression: a Fraction if possible, else a float or complex number."""
    tokens = [''] + re.findall(TOKEN, text, re.A)[::-1]
    def parse(level):
        """A sum (level 0), product (1), bare argument (2), factor (3), exponent (4), atom (5)."""
        token = tokens.pop()
        if token in ('+', '-'):
            value = parse(3) * (1 if token == '+' else -1)
        elif token in CLOSING:
            value = abs(parse(0)) if token == '|' else parse(0)
            understood(tokens.pop() == CLOSING[token])
        elif token == '\\frac':
            value = parse(5) / parse(5)
        elif token == '√':
            index = parse(5) if tokens[-1] == '[' else 2
            value = complex(parse(5)) ** (1 / index)
        elif token in FUNCTIONS:
            exponent = parse(4) if tokens[-1] == '^' and tokens.pop() else 1
            understood(exponent != -1)  # sin^{-1} x is not a power
            value = FUNCTIONS[token](parse(5 if tokens[-1] in CLOSING else 2)) ** exponent
        elif re.fullmatch(NAME, token):
            value = CONSTANTS.get(token) or Fraction(int(token.encode().hex(), 16)**5 % point, 499)
        else:
            value = Fraction(token)
        while token := tokens[-1]:
            understood(bits(value) <= MAX_BITS)
            if token == '!' and level < 4:  # 4^{2}! is not 4^{2!}
                understood(tokens.pop() and isinstance(value, Fraction) and value in range(501))
                value = Fraction(math.factorial(int(value)))
            elif token in OPERATORS and level <= OPERATORS[token][0]:
                _, right, function = OPERATORS[tokens.pop()]
                operand = parse(right)
                understood(token != '^' or bits(value) * abs(operand) <= MAX_BITS)
                value = function(value, operand)
            elif (re.match(r'[A-Za-z\\({√π°∞]', token)  # a product without a sign
                  and level < (2 if token in FUNCTIONS or token in CLOSING else 3)):
                value *= parse(3)
            else:
                break
        return value
    value = parse(0)
    understood(tokens == [''])
    return value

def close(u, v):
    """Equal or, if one is a float, near; but no long decimal stands for an irrational number."""
    return u == v if bits(u) and bits(v) else bits(u) < 64 > bits(v) and abs(u / v - 1) < 1e-12

def split_outside(s, separators):
    """s cut at the separators outside of all brackets: [piece, separator, piece, ...]"""
    parts, depth = [''], 0
    for c in s:
        depth += (c in '([{⦃') - (c in ')]}⦄')
        if depth == 0 and c in separators:
            parts += [c, '']
        else:
            parts[-1] += c
    return parts

def relation(s):
    """('x', '5') of x = 5, ('x', '[1,2)') of 1 <= x < 2 or x in [1,2); ('', s) of all else."""
    parts = split_outside(s, '=<≤>≥∈,;')
    if not re.fullmatch('=+|∈|[<≤]{1,2}|[>≥]{1,2}', ''.join(parts[1::2])):
        return '', s
    parts = parts[::-1] if parts[1] in '>≥' else parts
    if parts[1] in '=∈':
        return parts[0], parts[-1]
    if len(parts) == 3:
        parts = parts + ['<', '∞'] if NAMED.fullmatch(parts[2]) else ['-∞', '<'] + parts
    low, left, name, right, high = parts
    return name, '[('[left in '<>'] + f'{low},{high}' + '])'[right in '<>']

def items(s):
    """('()', the items) of a tuple or interval, ('', the items) of a list, set, union or ±."""
    brackets, pieces = '', split_outside(s, ',;∪')[::2]
    if len(pieces) == 1 and re.fullmatch(r'[(\[].*[,;].*[)\]]|⦃.*⦄', s):
        brackets, pieces = (s[0] + s[-1]).strip('⦃⦄'), split_outside(s[1:-1], ',;')[::2]
    return brackets, [p.replace('±', sign) for p in pieces for sign in ('+-' if '±' in p else '+')]

def equal(a, b, steps):
    """Whether two plain answers are equal: as relations, lists in any order, tuples or values."""
    understood(next(steps) < MAX_STEPS)
    if a == b:
        return True
    (name, a), (other, b) = relation(a), relation(b)
    if name or other:
        same = equal(name, other, steps) if name and other else NAMED.fullmatch(name or other)
        return bool(same) and equal(a, b, steps)
    (brackets, xs), (others, ys) = items(a), items(b)
    if len(xs) > 1 or len(ys) > 1:
        names = {relation(item)[0] for item in xs + ys}
        ordered = brackets or '' in names and len(names) > 2  # x=1, y=2 against 1, 2
        for x in xs:
            match = next((y for y in (ys[:1] if ordered else ys) if equal(x, y, steps)), None)
            if match is None:
                return False
            ys.remove(match)
        return brackets == others and not ys
    a, b = xs[0], ys[0]
    if TEXT.fullmatch(a) or TEXT.fullmatch(b) or ':' in a + b:
        CHECKS['compared_as_text'] += 1
        return re.sub('[ .,]', '', a).lower() == re.sub('[ .,]', '', b).lower()
    (a, unit), (b, other) = (m.groups() if (m := UNIT.fullmatch(s)) else (s, '') for s in (a, b))
    units = {re.sub(r's\b|[^a-z0-9%°]', '', u.lower()) for u in (unit, other)} - {''}
    return len(units) < 2 and all(close(value_of(a, p), value_of(b, p)) for p in POINTS)

def extract_answer(text, fallback=False):
    r"""The content of the last \boxed{}, else of a line '#### number', else None. With `fallback`
    (not for training) else what follows 'answer is', else the last number.
    >>> extract_answer(r'\boxed{1}? No: \boxed{\frac{3}{7}}.')
    '\\frac{3}{7}'
    """
    _, boxed, box = text.replace('\\fbox', '\\boxed').rpartition('\\boxed')
    box, depth = box[:MAX_BOX].lstrip(), 0
    for brace in re.finditer(r'\\.|[{}]', box if boxed and box[:1] == '{' else ''):
        depth += (brace[0] == '{') - (brace[0] == '}')
        if depth == 0:
            return box[1:brace.start()].strip()
    patterns = (r'^####[ \t]*([-+$]*[\d.,]*\d)[.%]?[ \t]*$',
                r'answer is:?\s*(\S.*?)(?=$|\.\s|<\|)',
                r'\$[^$\n]+\$|(?<![\w)])-?\d[\d,]*(?:\.\d+)?')
    found = (re.findall(p, text[-MAX_CHARS:], re.M) for p in patterns[:3 if fallback else 1])
    return next((matches[-1] for matches in found if matches), None)

def answers_equal(a, b):
    r"""Whether two bare answers are equal; symmetric, reflexive, never raises.
    >>> answers_equal(r'\frac{6}{\sqrt{12}}', 'sqrt(3)'), answers_equal('[1,2)', '(1,2)')
    (True, False)
    """
    a, b = sorted((str(a).strip(), str(b).strip()))
    if a == b:
        return True
    try:
        understood(max(len(a), len(b)) <= MAX_CHARS)
        for pattern, new in REWRITES:
            a, b = pattern.sub(new, a), pattern.sub(new, b)
        return bool(a and b) and equal(a, b, itertools.count())
    except (ValueError, ArithmeticError, RecursionError):
        CHECKS.update(['unparsed', 'compared_as_text'])
        return False

def is_correct(text, gold, fallback=False):
    r"""Whether the answer in a model's completion equals the gold answer.
    >>> is_correct(r'... the area is \boxed{14\pi \text{ cm}^2}.', '14 \\pi'), is_correct('5', '5')
    (True, False)
    """
    answer = extract_answer(text, fallback)
    CHECKS['missing'] += answer is None
    return answer is not None and answers_equal(answer, gold)

def majority_vote(answers: list[str | None]) -> str | None:
    """The answer with the most votes, equivalent ones (answers_equal) counted together, or None.
    No-answers (None) do not vote; among equals the first seen wins."""
    votes = []                                     # [answer, count]
    for answer in (a for a in answers if a is not None):
        entry = next((v for v in votes if answers_equal(v[0], answer)), None)
        if entry is None:
            votes.append(entry := [answer, 0])
        entry[1] += 1
    return max(votes, key=lambda v: v[1])[0] if votes else None

# ================================================================================= language models
# What a short model name begins with -> the organisation that publishes it.
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "gemma": "google", "OLMo": "allenai",
                 "SmolLM": "HuggingFaceTB", "Phi": "microsoft", "Mistral": "mistralai"}

@dataclass
class LM:
    """A causal language model with what is needed to talk to it."""
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]       # tokens that end a completion
    vocab_size: int                 # rows of the vocabulary that the tokenizer knows
    context: int                    # longest sequence in tokens

    def encode_prompt(self, question: str | list[dict], prompt: str = PROMPT) -> list[int]:
        """The question, or a list of messages, in this model's own form: its chat template, or
        "Question: ... Answer:" where it has none. BOS exactly once."""
        messages = question if isinstance(question, list) else [
            {"role": "user", "content": prompt.replace("{question}", question)}]
        text, tokenizer = f"Question: {messages[-1]['content']}\nAnswer:", self.tokenizer
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        ids, bos = tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and bos in tokenizer.encode(""):
            ids = [bos, *ids]          # the tokenizer wants one, the template wrote none
        return ids

def encode_text(tokenizer, text: str) -> list[int]:
    """Model-written text: a control token that is spelled out in it stays plain text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

def decode(tokenizer, ids: list[int]) -> str:
    """Text without control tokens and without a last character that a cut left incomplete."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")

def load_lm(name: str, device: str = "cpu") -> LM:
    """A folder or hub model: bf16 on CUDA, fp32 on CPU; no remote code. UserError if unservable."""
    path = name
    if not Path(name).is_dir():
        use_cache_if_offline()
        owner = next((o for start, o in ORGANISATIONS.items() if name.startswith(start)), None)
        path = f"{owner}/{name}" if owner and "/" not in name else name
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    except Exception as error:            # unknown, unreachable, damaged, not a language model, ...
        raise UserError(f"model {name}: no such folder or hub model, or damaged: {error}") from None
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):     # beyond, cached keys are outdated
        context = rope.get("original_max_position_embeddings", context)
    lm = LM(model, tokenizer, find_stop_ids(model, tokenizer), len(tokenizer), context or 2 ** 30)
    require(encode_text(tokenizer, "1"), f"model {name}: it comes without a tokenizer")
    require(lm.stop_ids, f"model {name}: no end-of-text token in its tokenizer or config")
    require(lm.vocab_size <= model.get_input_embeddings().num_embeddings,
            f"model {name}: its tokenizer has more tokens than the model has embeddings")
    if getattr(config, "attn_logit_softcapping", None):    # sdpa drops it in older transformers
        model.set_attn_implementation("eager")
    check_model(lm)
    return lm

def find_stop_ids(model, tokenizer) -> tuple[int, ...]:
    """eos of tokenizer and generation_config, and what the chat template writes after a turn:
    Qwen2.5 *base* has eos <|endoftext|>, but its template ends turns with <|im_end|>."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    stops = {tokenizer.eos_token_id, *configured}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "sentinel"}]
        after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("sentinel")[2]
        ids = tokenizer.encode(after, add_special_tokens=False)
        stops |= {next((i for i in ids if i in tokenizer.added_tokens_decoder), None)}
    return tuple(sorted(stops - {None}))

def save_lm(lm: LM, folder: Path):
    """An ordinary transformers folder, weights as safetensors."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)

def check_model(lm: LM):
    """Refuse a model that we would serve wrongly: attention sinks, ALiBi, latent or shared keys,
    state spaces, unknown heads all show here. One number in three ways: the log-probabilities of a
    few tokens from the sampler, from the trainer, and from the model's own plain forward."""
    model, prompt = lm.model, [i % lm.vocab_size for i in range(8)]
    layers = getattr(model.config.get_text_config(), "layer_types", None) or []
    try:
        [c] = generate(model, [prompt], max_new_tokens=4, temperature=0, vocab_size=lm.vocab_size)
        rollout = Rollout(None, prompt, c.tokens, c.logprobs, True, "")
        with torch.no_grad():
            ours, _ = completion_logprobs(lm, [rollout])
            ids = torch.tensor([prompt + c.tokens], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, 7:-1, :lm.vocab_size].float()
        want = logits.log_softmax(-1).gather(1, ids[0, 8:, None]).squeeze(1)
        gap = (torch.stack([want.new_tensor(c.logprobs), ours]) - want).abs().max()
        served = gap < (1e-3 if model.dtype == torch.float32 else 0.1) and set(layers) <= {
            "full_attention", "sliding_attention"}
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
        served = False
    require(served, f"model type {model.config.model_type} is not served: its attention or its "
            "output head is not of the ordinary kind")

# ====================================================================================== generation
#
# One sampler with a KV cache serves generator, receiver and evaluation. transformers' models look
# their attention function up by name; ours keeps keys and values in the Sampler, which it gets as
# an extra argument of the forward. The active rows are always the first n: when a row finishes, the
# last one moves into its place, so that no work is done for rows that are gone.

@dataclass
class Completion:
    tokens: list[int]            # with the stop token, if it was sampled
    logprobs: list[float]        # of these tokens, under the distribution they were drawn from
    finished: bool               # ended by a stop token, not by the length limit

class Sampler:
    """Up to `rows` sequences of up to `length` tokens that are being generated.
    layers: a layer -> its K and V, each [rows + 1, kv_heads, length, head_dim], made when it first
    runs; the last row keeps the newest prompt, for those of its samples that wait for a place."""

    def __init__(self, model, rows, length, temperature, stop_ids, vocab_size):
        device = model.device
        self.model, self.temperature, self.vocab_size = model, temperature, vocab_size
        self.length, self.spare, self.spare_prompt = length, rows, None
        self.n, self.owners, self.valid, self.layers = 0, [], 0, {}
        self.stop_ids, self.stops = stop_ids, torch.tensor([*stop_ids], device=device)
        # A row's last token, not yet in the cache, its position; tokens it has had and may have;
        # whether it is done.
        self.state = torch.zeros(5, rows, dtype=torch.long, device=device)
        self.token, self.position, self.count, self.limit, self.done = self.state
        # A random number for each token to come; what was sampled (fp32 holds ids below 2^24). Rows
        # that are done go on into the last column until somebody looks.
        self.drawn = torch.zeros(3, rows, length + 1, device=device)
        self.uniform, self.tokens, self.logprobs = self.drawn
        self.fused = triton and (device.type == "cuda" or "TRITON_INTERPRET" in os.environ)
        self.graphs, self.pool = {}, None

    def admit(self, rows: list[tuple[int, int, list[int], int]], uniform: torch.Tensor):
        """Take in rows (number, prompt number, prompt, limit), samples of a prompt side by side. A
        prompt is prefilled once, but for its last token, which is fed to the first step."""
        numbers, which, prompts, limits = zip(*rows)
        slots, position = range(self.n, self.n + len(rows)), [len(p) - 1 for p in prompts]
        holder = {self.spare_prompt: self.spare}           # prompt number -> row that has its cache
        self.prefill({slot: prompt[:-1] for slot, w, prompt in zip(slots, which, prompts)
                      if holder.setdefault(w, slot) == slot})
        pairs = [(slot, holder[w]) for slot, w in zip((*slots, self.spare), (*which, which[-1]))]
        self.valid = max(self.valid, *position)
        self.copy_cache([pair for pair in pairs if pair[0] != pair[1]])
        zero = [0] * len(rows)
        self.state[:, slots.start:slots.stop] = torch.tensor(
            [[p[-1] for p in prompts], position, zero, limits, zero])
        self.uniform[slots.start:slots.stop, :uniform.shape[1]] = uniform
        self.spare_prompt, self.n, self.owners = which[-1], slots.stop, [*self.owners, *numbers]

    def prefill(self, prompts: dict[int, list[int]], budget: int = 8192):
        """Cache prompts (slot -> tokens, the longest first), about `budget` tokens a forward."""
        slots = [slot for slot, prompt in prompts.items() if prompt]
        while slots:
            now = slots[:max(1, budget // len(prompts[slots[0]]))]
            slots = slots[len(now):]
            self.active, self.now = torch.tensor(now, device=self.model.device), None
            ids = pad_sequence([torch.tensor(prompts[slot]) for slot in now], batch_first=True)
            self.model.base_model(input_ids=ids.to(self.active), use_cache=False, sampler=self)

    def step(self, n: int):
        """One token for each of the first n rows; nothing here waits for the device."""
        rows = self.active = torch.arange(n, device=self.model.device)
        self.now = self.position[:n, None, None]                                         # [n, 1, 1]
        logits = self.model(input_ids=self.token[:n, None], position_ids=self.position[:n, None],
                            use_cache=False, sampler=self).logits[:, -1]                 # [n, V]
        logits[:, self.vocab_size:] = -torch.inf               # rows that no token belongs to
        alive = self.done[:n] == 0
        column = torch.where(alive, self.count[:n], self.length)
        tokens, logprobs = sample_tokens(logits, self.temperature, self.uniform[rows, column])
        self.tokens[rows, column], self.logprobs[rows, column] = tokens.float(), logprobs
        self.token[:n] = tokens
        self.state[1:3, :n] += alive                                      # position and count
        self.done[:n] |= (tokens[:, None] == self.stops).any(1) | (self.count[:n] >= self.limit[:n])

    def advance(self, steps: int):
        """Steps of the active rows. On CUDA they are graphs, one a bucket of rows (2^k, 3/4 2^k):
        to launch the thousand kernels of a step one by one takes longer than to run them."""
        n, power = self.n, 1 << (self.n - 1).bit_length()
        if self.fused:            # the rows beyond are done already
            n = min(self.spare, power * 3 // 4 if n <= power * 3 // 4 else power)
        for _ in range(steps):
            self.valid = min(self.valid + 1, self.length)
            if self.graphs.get(n):
                self.graphs[n].replay()
                continue
            self.step(n)                           # eager, the warm-up that a capture needs
            if self.fused and n not in self.graphs:
                self.graphs[n] = capture(functools.partial(self.step, n), self.pool)
                self.pool = self.graphs[n] and self.graphs[n].pool()

    def collect(self) -> list[tuple[int, Completion]]:
        """Take out the rows that are done; the last rows move into their places."""
        done = self.done[:self.n].nonzero().flatten().tolist()
        columns = (t[done].tolist() for t in (self.count, self.tokens.long(), self.logprobs))
        finished = [(self.owners[slot], Completion(t[:c], p[:c], t[c - 1] in self.stop_ids))
                    for slot, c, t, p in zip(done, *columns)]
        self.n -= len(done)
        holes = [slot for slot in done if slot < self.n]
        movers = sorted(set(range(self.n, self.n + len(done))) - set(done))
        self.copy_cache(list(zip(holes, movers)))
        self.state[:, holes], self.drawn[:, holes] = self.state[:, movers], self.drawn[:, movers]
        for hole, mover in zip(holes, movers):
            self.owners[hole] = self.owners[mover]
        self.done[self.n:], self.position[self.n:] = 1, 0
        del self.owners[self.n:]
        self.valid = int(self.position.max())
        return finished

    def copy_cache(self, pairs: list[tuple[int, int]]):
        """The valid part of rows, (target, source)."""
        targets, sources = [t for t, _ in pairs], [s for _, s in pairs]
        for cache in itertools.chain(*self.layers.values()) if pairs else ():
            cache[targets, :, :self.valid] = cache[sources, :, :self.valid]

def capture(step, pool):
    """The kernels that step() launches, as a graph to replay in the pool's memory, or None."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph
    except RuntimeError as error:                  # a model that waits for the device, say
        print(f"no CUDA graph, so sampling is slow: {error}", file=sys.stderr)

def cached_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None,
                     softcap=None, sampler=None, **kwargs):
    """Attention over the Sampler's cache, in the convention of transformers' AttentionInterface.
    query [B, heads, T, D], key and value [B, kv_heads, T, D] -> [B, T, heads, D]. T tokens of
    prompts, padded on the right (causality hides the padding), or one token of each active row."""
    B, heads, T, D = query.shape
    if module.layer_idx not in sampler.layers:
        sampler.layers[module.layer_idx] = [x.new_zeros(
            sampler.spare + 1, x.shape[1], sampler.length, x.shape[3]) for x in (key, value)]
    keys, values = sampler.layers[module.layer_idx]
    scaling = D ** -0.5 if scaling is None else scaling
    groups, window = heads // key.shape[1], sliding_window or sampler.length
    if sampler.now is None:                                                      # whole prompts
        keys[sampler.active, :, :T], values[sampler.active, :, :T] = key, value
        now = torch.arange(T, device=key.device)[None, :, None]
        if softcap is None and window >= T:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
            return out.transpose(1, 2), None
    elif sampler.fused:
        return fused_attention(query, key, value, keys, values, sampler.position, scaling, window,
                               softcap), None
    else:
        now = sampler.now
        keys[sampler.active, :, now[:, 0, 0]] = key[:, :, 0]
        values[sampler.active, :, now[:, 0, 0]] = value[:, :, 0]
        key, value = keys[:B, :, :sampler.valid], values[:B, :, :sampler.valid]
    then = torch.arange(key.shape[2], device=key.device)
    hidden = (then > now) | (then <= now - window)                    # [n or 1, T, length]
    # The query heads that share a K/V head stand side by side, so K and V are never expanded.
    query = query.reshape(B, key.shape[1], groups * T, D)
    scores = query @ key.transpose(2, 3) * scaling               # [B, kv_heads, groups * T, length]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden.repeat(1, groups, 1).unsqueeze(-3), -torch.inf)
    out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.view(B, heads, T, -1).transpose(1, 2), None

transformers.AttentionInterface.register("rltr_cached", cached_attention)

def fused_attention(query, key, value, keys, values, position, scaling, window, softcap):
    """One new token a row, [n, heads, 1, D], in one Triton kernel: it goes into the cache and
    attends to the part of it that is the row's. -> [n, 1, heads, D]"""
    (n, heads, _, D), kv_heads, length = query.shape, key.shape[1], keys.shape[2]
    require(value.shape == key.shape, "keys and values differ in size: not for the CUDA sampler")
    out, power = torch.empty_like(query.transpose(1, 2)), triton.next_power_of_2
    attention_kernel[n, kv_heads](
        query.contiguous(), key.contiguous(), value.contiguous(), keys, values, position, out,
        scaling, length, window, SOFTCAP=softcap or 0.0, G=heads // kv_heads, D=D,
        G2=max(16, power(heads // kv_heads)), D2=max(16, power(D)), BLOCK=32, num_stages=3)
    return out

def attend(Q, New_K, New_V, K, V, Position, Out, scaling, length, window, SOFTCAP: tl.constexpr,
           G: tl.constexpr, D: tl.constexpr, G2: tl.constexpr, D2: tl.constexpr,
           BLOCK: tl.constexpr):
    """The kernel: a program for each row and K/V head with its G query heads. The softmax is flash
    attention's: a running maximum `top` and sum `total`, starting from the new token alone."""
    row, now = tl.program_id(0).to(tl.int64), tl.load(Position + tl.program_id(0))
    pair = row * tl.num_programs(1) + tl.program_id(1)
    g, d, t = tl.arange(0, G2)[:, None], tl.arange(0, D2)[None, :], tl.arange(0, BLOCK)[:, None]
    q = tl.load(Q + (pair * G + g) * D + d, (g < G) & (d < D), 0.0)                      # [G2, D2]
    k_new = tl.load(New_K + pair * D + d, d < D, 0.0)                                     # [1, D2]
    v_new = tl.load(New_V + pair * D + d, d < D, 0.0)
    cached = pair * length * D + d
    tl.store(K + cached + now * D, k_new, d < D)
    tl.store(V + cached + now * D, v_new, d < D)
    top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1, keep_dims=True) * scaling    # [G2, 1]
    if SOFTCAP > 0:                                                # tanh(x) = 2 sigmoid(2 x) - 1
        top = SOFTCAP * (2 * tl.sigmoid(2 * top / SOFTCAP) - 1)
    total = tl.full([G2, 1], 1.0, tl.float32)
    out = tl.zeros([G2, D2], tl.float32) + v_new.to(tl.float32)
    for start in range(tl.maximum(now - window + 1, 0) // BLOCK * BLOCK, now, BLOCK):
        then = start + t
        seen = (then < now) & (then > now - window)                                   # [BLOCK, 1]
        k = tl.load(K + cached + then * D, seen & (d < D), 0.0)                      # [BLOCK, D2]
        v = tl.load(V + cached + then * D, seen & (d < D), 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling             # [G2, BLOCK]
        if SOFTCAP > 0:
            scores = SOFTCAP * (2 * tl.sigmoid(2 * scores / SOFTCAP) - 1)
        scores = tl.where(tl.trans(seen), scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1, keep_dims=True))
        weights, shrink = tl.exp(scores - higher), tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1, keep_dims=True)
        out = out * shrink + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    tl.store(Out + (pair * G + g) * D + d, out / total, (g < G) & (d < D))

attention_kernel = triton and triton.jit(attend)

def sample_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor):
    """Inverse-CDF sampling: the first token whose cumulative probability reaches u.
    logits [n, V], uniform [n] in (0, 1] -> tokens [n], log-probs [n]. As u > 0, a token of
    probability 0 is never the first to reach it. Temperature 0: greedy, plain softmax."""
    logits = logits if temperature in (0, 1) else logits.float() / temperature
    probs = logits.softmax(-1, dtype=torch.float32)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:]).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)        # NaN logits: generate complains
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()

@torch.no_grad()
def generate(model, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int | list[int],
             temperature: float = 1.0, stop_ids=(), max_rows: int | None = None,
             vocab_size: int | None = None, seed: int | tuple[int, ...] | None = None,
             first_row: int = 0, progress=None) -> list[Completion]:
    """`samples` completions of each prompt (non-empty lists of token ids), side by side.
    max_new_tokens may be one number a prompt. Temperature 0 is greedy. Tokens from vocab_size on
    never come out. max_rows and the free memory bound the rows in the cache at once, each as long
    as the longest prompt plus completion. Row i's random numbers are a function of
    (seed, first_row + i) alone, whatever max_rows and the other rows."""
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    require(all([*prompts, *(m > 0 for m in limits)]), "generate: empty prompt or no token allowed")
    seed = int(torch.randint(2 ** 31, ())) if seed is None else seed
    keys = seed if isinstance(seed, tuple) else (seed,)
    longest = max((len(p) + m for p, m in zip(prompts, limits)), default=0)
    rows = min(len(prompts) * samples, max_rows or MAX_ROWS, affordable_rows(model, longest))
    # Long prompts first: neighbours in the queue are of like length, so prefills pad little.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    queue = collections.deque((i * samples + s, i, prompts[i], limits[i])
                              for i in order for s in range(samples))
    completions: list = [None] * len(queue)
    look_every = 1 if model.device.type == "cpu" else 8       # to look is to wait for the device
    sampler = Sampler(model, rows, longest, temperature, stop_ids, vocab_size or 2 ** 30)
    attention, training = model.config._attn_implementation, model.training
    model.eval().set_attn_implementation("rltr_cached")
    try:
        while queue or sampler.n:
            free = rows - sampler.n
            if queue and free >= min(len(queue), max(1, rows // 8)):      # not a prefill a row
                new = [queue.popleft() for _ in range(min(free, len(queue)))]
                sampler.admit(new, pad_sequence([torch.from_numpy(                        # (0, 1]
                    1 - rng(*keys, first_row + number).random(limit)).float()
                    for number, *_, limit in new], batch_first=True))
            sampler.advance(look_every)
            for number, completions[number] in sampler.collect():
                require(math.isfinite(sum(completions[number].logprobs)),
                        f"model {model.name_or_path}: its outputs are not finite numbers")
                if progress is not None:
                    progress.update(1)
    finally:                                                  # everything as it was before
        model.train(training).set_attn_implementation(attention)
    return completions

MAX_ROWS = 512                 # by default, where memory allows

def affordable_rows(model, length: int) -> int:
    """Rows of `length` tokens whose K/V fit half the free GPU memory, or a quarter of the RAM."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * max(1, length)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if model.device.type == "cuda":
        free = (torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device)
                - torch.cuda.memory_allocated(model.device))
    return max(1, free // 2 // row)

# ======================================================================================== rollouts
@dataclass
class Cut:
    """One cut of a rollout and what the receiver made of it (steps 3-5)."""
    tau: float
    prefix_length: int              # tokens of the generator
    prefix: str
    continuation: str = ""
    continuation_length: int = 0    # tokens of the receiver
    correct: bool = False
    leaked: bool = False            # the prefix holds a boxed answer already
    overflow: bool = False          # the prefix does not fit the receiver's context

@dataclass
class Rollout:
    """All there is to know about one sampled completion, from the prompt to the advantage."""
    problem: Problem
    prompt: list[int]               # token ids
    tokens: list[int]               # completion, with the stop token if sampled
    logprobs: list[float]           # under the policy that sampled them
    finished: bool
    text: str
    cuts: list[Cut] = field(default_factory=list)
    r_answer: float = 0.0
    r_transfer: float = 0.0
    r_format: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0

def sample_rollouts(lm: LM, tasks: list[tuple[Problem, list[int]]], config: Config,
                    step: int) -> list[Rollout]:
    """Step 1: G completions a problem, side by side, with the log-probabilities they had."""
    mine = share(len(tasks))
    completions = gather(generate(
        lm.model, [prompt for _, prompt in tasks[mine]], samples=config.group,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, stop_ids=lm.stop_ids,
        vocab_size=lm.vocab_size, max_rows=config.max_rows, seed=(config.seed, ROLLOUT, step),
        first_row=mine.start * config.group))
    owners = [task for task in tasks for _ in range(config.group)]
    return [Rollout(*task, c.tokens, c.logprobs, c.finished, decode(lm.tokenizer, c.tokens))
            for task, c in zip(owners, completions)]

def score_answers(rollouts: list[Rollout]):
    """Step 2; and R_fmt: the rollout stopped by itself and has a boxed answer."""
    CHECKS.clear()                  # the checker's counts, a step at a time
    for r in rollouts:
        r.r_answer = float(is_correct(r.text, r.problem.answer))
        r.r_format = float(r.finished and extract_answer(r.text) is not None)

def cut_prefix(tokens: list[int], tau: float, stop_ids=()) -> list[int]:
    """Step 3: the first floor(tau * |y|) tokens of y, a final stop token not counted.
    >>> cut_prefix([5, 6, 7, 8, 2], 0.5, stop_ids=(2,))
    [5, 6]
    >>> cut_prefix([5, 6, 7, 8, 2], 1.0, stop_ids=(2,)), cut_prefix([5, 6, 7, 8], 1e-9)
    ([5, 6, 7, 8], [])
    """
    length = len(tokens) - any(token in stop_ids for token in tokens[-1:])
    return list(tokens[:math.floor(tau * length)])

class TransferReward:
    """Steps 3-5: cut the reasoning, let the frozen receiver go on, look for the right answer.
    Called as a function it follows TRL's `reward_funcs`: reward(prompts, completions, answer,
    completion_ids=None) -> floats in [0, 1], a mean over `cuts` cuts. prompts: questions or message
    lists; completions: texts or message lists. Completions are cut in tokens of `tokenizer`, the
    generator's: without it in the receiver's. tau: a function of (seed, number of the call)."""

    __name__ = "transfer_reward"               # TRL names its log columns after this

    def __init__(self, receiver: LM | str, tokenizer=None, *, stop_ids=(), cuts=1, temperature=1.0,
                 max_new_tokens=1024, margin=64, prompt=PROMPT, seed=0, max_rows=0, device="cpu"):
        self.receiver = load_lm(receiver, device) if isinstance(receiver, str) else receiver
        self.tokenizer, self.has_ids = tokenizer or self.receiver.tokenizer, tokenizer is not None
        self.stop_ids = stop_ids or find_stop_ids(None, self.tokenizer)
        self.cuts, self.temperature, self.max_new_tokens = cuts, temperature, max_new_tokens
        self.margin, self.prompt, self.seed, self.max_rows = margin, prompt, seed, max_rows
        self.calls = 0
        # Equal vocabularies: the prefix is handed over as token ids, otherwise as text.
        self.same_tokens = self.tokenizer.get_vocab() == self.receiver.tokenizer.get_vocab()

    def __call__(self, prompts, completions, answer, completion_ids=None, **kwargs) -> list[float]:
        if completion_ids is None or not self.has_ids:      # ids of a tokenizer that we do not know
            texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
            completion_ids = [encode_text(self.tokenizer, text) for text in texts]
        rows = self.continue_from_cuts(prompts, completion_ids, answer, step=self.calls)
        self.calls += 1
        return [float(np.mean([cut.correct for cut in cuts])) for cuts in rows]

    def score(self, rollouts: list[Rollout], step: int):
        """Give every rollout its cuts and its R_trans."""
        columns = zip(*((r.problem.question, r.tokens, r.problem.answer) for r in rollouts))
        for r, cuts in zip(rollouts, self.continue_from_cuts(*columns, step)):
            r.cuts, r.r_transfer = cuts, float(np.mean([cut.correct for cut in cuts]))

    def continue_from_cuts(self, questions: list, completions: list[list[int]], golds: list[str],
                           step: int, taus=None) -> list[list[Cut]]:
        """Cut each completion at K places, continue, judge. taus [rows, K]: not the random ones."""
        if taus is None:
            taus = 1 - rng(self.seed, CUT, step).random((len(completions), self.cuts))    # (0, 1]
        heads = {str(q): self.receiver.encode_prompt(q, self.prompt) for q in questions}
        rows, waiting, receiver = [[] for _ in completions], [], self.receiver
        for cuts, question, tokens, gold, row in zip(rows, questions, completions, golds, taus):
            head = heads[str(question)]
            for tau in row:
                ids = cut_prefix(tokens, tau, self.stop_ids)
                text = decode(self.tokenizer, ids)
                prefix = ids if self.same_tokens else encode_text(receiver.tokenizer, text)
                room = receiver.context - len(head) - len(prefix)
                cuts.append(Cut(float(tau), len(ids), text, overflow=room < 1,
                                leaked=extract_answer(text) is not None))
                if room > 0:
                    budget = min(room, max(1, self.max_new_tokens - len(ids) + self.margin))
                    waiting.append((cuts[-1], gold, head, prefix, budget))
        mine = share(len(waiting))
        done = gather(generate(
            receiver.model, [head + prefix for _, _, head, prefix, _ in waiting[mine]],
            max_new_tokens=[budget for *_, budget in waiting[mine]], temperature=self.temperature,
            stop_ids=receiver.stop_ids, vocab_size=receiver.vocab_size, max_rows=self.max_rows,
            seed=(self.seed, CONTINUATION, step), first_row=mine.start))
        for (cut, gold, _, prefix, _), c in zip(waiting, done):
            if self.same_tokens:          # decode both at once: the cut may have split a character
                whole = decode(self.tokenizer, prefix + c.tokens)
            else:
                whole = cut.prefix + decode(receiver.tokenizer, c.tokens)
            cut.continuation, cut.continuation_length = whole[len(cut.prefix):], len(c.tokens)
            cut.correct = is_correct(whole, gold)
        return rows

def combine_rewards(rollouts: list[Rollout], config: Config):
    """Step 6: R = a R_ans + b R_trans + c R_fmt. Your own reward goes here."""
    for r in rollouts:
        r.reward = (config.answer_weight * r.r_answer + config.transfer_weight * r.r_transfer
                    + config.format_weight * r.r_format)

def group_advantages(rewards, normalize_std: bool = True) -> torch.Tensor:
    """Step 7: A_i = (R_i - mean) / (std + 1e-6) within each group; [P, G] -> [P, G] in float64.
    std is the population's. Where all rewards of a group are equal A is exactly 0: else the
    rounding error of the mean, divided by a tiny std, would pass for a signal.
    >>> group_advantages([[1.0, 0.0, 0.0, 1.0], [1.1, 1.1, 1.1, 1.1]]).round(decimals=3).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    return advantages.masked_fill(rewards.max(1, True).values == rewards.min(1, True).values, 0.0)

def grouped(rollouts: list[Rollout], group: int) -> list[list[Rollout]]:
    return [rollouts[i:i + group] for i in range(0, len(rollouts), group)]

def live_groups(rollouts: list[Rollout], group: int) -> list[list[Rollout]]:
    """The groups to learn from; in the others, the dead ones, all rewards are equal."""
    return [g for g in grouped(rollouts, group) if any(r.advantage for r in g)]

# ========================================================================================== update
def head_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [N, V], fp32, of last hidden states [N, E], as the model's own forward makes them:
    soft-capped in Gemma, scaled in Cohere and Granite. (check_model compares.)"""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits

def completion_logprobs(lm: LM, rollouts: list[Rollout], temperature: float = 1.0,
                        chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of all completion tokens under the current policy, end to
    end: two [N]. Logits are made for `chunk` tokens at a time (default: 2**27 numbers), and once
    more in the backward pass, so that [rows, time, vocabulary] never exists."""
    device, rows = lm.model.device, [torch.tensor((r.prompt + r.tokens)[:-1]) for r in rollouts]
    ids = pad_sequence(rows, batch_first=True).to(device)                                  # [B, T]
    hidden = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state      # [B, T, E]
    # Padding on the right needs no mask, as causality hides it, and lengths say which tokens count,
    # never a comparison with a pad id. The state before y_t predicts y_t.
    hidden = torch.cat([h[len(r.prompt) - 1:len(r.prompt) - 1 + len(r.tokens)]
                        for h, r in zip(hidden, rollouts)])                                # [N, E]
    targets = torch.tensor([token for r in rollouts for token in r.tokens], device=device)
    def logprobs(hidden, targets):
        logp = (head_logits(lm.model, hidden)[:, :lm.vocab_size] / temperature).log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), entropy
    chunk = chunk or max(1, 2 ** 27 // lm.vocab_size)
    parts = [checkpoint(logprobs, h, t, use_reentrant=False)
             for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    return tuple(map(torch.cat, zip(*parts)))

TOKEN_BUDGET = 2 ** 14 if not torch.cuda.is_available() else 2 ** 15    # to start with

def policy_objective(logp, old_logp, advantage, clip_low: float, clip_high: float) -> torch.Tensor:
    """Step 8, a token: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi/pi_sampling.
    All [N]. Its mean is ~0 at every start, as advantages sum to 0: watch rewards, not the loss."""
    rho = torch.exp(logp - old_logp)
    return torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)

def micro_batches(rollouts: list[Rollout], budget: int) -> list[list[Rollout]]:
    """Rows of like length, rows x longest <= budget; longest first: OOM at once or never."""
    batches, width = [], 0
    for r in sorted(rollouts, key=lambda r: -len(r.prompt) - len(r.tokens)):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = len(r.prompt) + len(r.tokens)
        batches[-1].append(r)
    return batches

def backward(lm: LM, optimizer: MasterAdamW, rollouts: list[Rollout], config: Config) -> list:
    """Add up this rank's share of the gradient of -1/T sum min(..), T the tokens of all `rollouts`.
    Returns a row a micro-batch: objective, entropy (both sums), gaps to the sampler's log-probs."""
    total, rows = sum(len(r.tokens) for r in rollouts), []       # one T, whatever the micro-batches
    mine = sorted(rollouts, key=lambda r: -len(r.prompt) - len(r.tokens))[RANK::RANKS]
    budget = config.token_budget or TOKEN_BUDGET
    for module in lm.model.modules():       # no dropout, as when sampling; checkpointing wants True
        module.training = getattr(module, "gradient_checkpointing", False)
    try:
        for batch in micro_batches(mine, budget):
            logp, entropies = completion_logprobs(lm, batch, config.temperature)           # [N]
            old = logp.new_tensor([x for r in batch for x in r.logprobs])
            advantage = logp.new_tensor([r.advantage for r in batch for _ in r.tokens])
            gains = policy_objective(logp, old, advantage, config.clip_low, config.clip_high)
            (-gains.sum() / total).backward()
            gaps = (logp.detach() - old).abs().tolist()
            rows.append((gains.sum().item(), entropies.sum().item(), gaps))
        return rows
    except torch.OutOfMemoryError:
        pass            # what the failed batch held is free only after the handler, so go on below
    finally:
        lm.model.eval()
    optimizer.adam.zero_grad()
    torch.cuda.empty_cache()
    config.token_budget = budget // 2
    require(config.token_budget, "out of memory: --gradient-checkpointing and --offload help")
    print(f"out of memory in the update: --token-budget {config.token_budget} from here on")
    return backward(lm, optimizer, rollouts, config)

def update(lm: LM, optimizer: MasterAdamW, rollouts: list[Rollout], config: Config) -> dict:
    """Step 8: up the token mean over all groups that are not dead; returns metrics. One optimizer
    step, or `epochs` passes of `minibatches` steps."""
    live, rows, trained, norms = live_groups(rollouts, config.group), [], 0, []
    for i in range(config.epochs * config.minibatches):
        part = [r for g in live[i % config.minibatches::config.minibatches] for r in g]
        if part:
            rows += gather(backward(lm, optimizer, part, config))
            trained += sum(len(r.tokens) for r in part)
            norms.append(optimizer.step(config.max_grad_norm))
    skipped = sum(not math.isfinite(norm) for norm in norms)
    if not live or skipped:
        return {"objective": None, "entropy": None, "grad_norm": None, "skipped": skipped}
    objective, entropy, gaps = zip(*rows)
    gaps = np.concatenate(gaps)
    return {"objective": sum(objective) / trained, "entropy": sum(entropy) / trained,
            "grad_norm": norms[-1], "skipped": 0, "logprob_gap_mean": gaps.mean(),
            "logprob_gap_max": gaps.max()}

def rehearse(lm: LM, optimizer: MasterAdamW, tasks: list, config: Config):
    """The largest batch that the update may meet, with advantages of 0: memory runs out now, which
    halves the token budget, and not at step 120."""
    moments = [torch.empty_like(master) for master in optimizer.masters * 2]     # Adam's, to come
    prompt, n = max((prompt for _, prompt in tasks), key=len), config.max_new_tokens
    row = Rollout(None, prompt, [0] * n, [0.0] * n, False, "")
    count = (config.token_budget or TOKEN_BUDGET) // (len(prompt) + n) + 1
    backward(lm, optimizer, [row] * count * RANKS, config)
    optimizer.adam.zero_grad()
    del moments

class MasterAdamW:
    """AdamW on fp32 master copies of the weights. (Plain AdamW for fp32 models.)
    bf16 has 8 bits: a step of 1e-6 on a weight of 1e-2 rounds to nothing. So steps are made in fp32
    and the model gets the rounded result; gradients of micro-batches add up in fp32 too. All that
    is in fp32 may live on another `device` than the model."""

    def __init__(self, model, lr: float, weight_decay: float = 0.0, device=None):
        weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else
                        p.detach().to(device or p.device, torch.float32)
                        for p in weights]
        self.copies = [(p, master) for p, master in zip(weights, self.masters) if p is not master]
        self.adam = torch.optim.AdamW(self.masters, lr, (0.9, 0.99), weight_decay=weight_decay)
        for p, master in self.copies:
            p.register_post_accumulate_grad_hook(functools.partial(self._add, master))

    @staticmethod
    def _add(master, p):
        grad, p.grad = p.grad.to(master), None
        master.grad = grad if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Sum over ranks, clip, step, clear; returns the gradient norm. Not finite: no step."""
        for master in self.masters if RANKS > 1 else ():
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
            torch.distributed.all_reduce(master.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if math.isfinite(norm):
            self.adam.step()
        self.adam.zero_grad()
        for p, master in self.copies:
            p.copy_(master)
        return norm

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "masters": [master for _, master in self.copies]}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        self.adam.load_state_dict(state["adam"])
        for p, moments in self.adam.state.items():
            require(moments["exp_avg"].shape == p.shape, "the shapes differ")
        for (_, master), saved in zip(self.copies, state["masters"]):
            master.copy_(saved)

# ======================================================================================== training
def train(config: Config, resume: bool = False) -> Path:
    """Run RLTR (RLVR with transfer_weight 0); returns the folder of the trained model."""
    config = gather([resolve(config)] if RANK == 0 else [])[0]
    run = Run(config, resume)
    problems = load_problems(config.data, config.split, config.limit)
    if config.eval_data:                               # to find out now rather than after training
        load_problems(config.eval_data)
    lm, transfer = load_models(config, run.checkpoint)
    tasks = encode_problems(lm, problems, config, config.max_new_tokens)
    if transfer:
        encode_problems(transfer.receiver, problems, config, 1)            # or no cut would count
    longest = config.max_new_tokens + max(len(prompt) for _, prompt in tasks)
    config.max_rows = min(config.max_rows or MAX_ROWS, affordable_rows(lm.model, longest))
    optimizer = MasterAdamW(lm.model, config.lr, config.weight_decay,
                            "cpu" if config.offload else None)
    if lm.model.device.type == "cuda":
        rehearse(lm, optimizer, tasks, config)
    run.begin(optimizer)

    bar = tqdm(range(run.start, config.steps), initial=run.start, total=config.steps, unit="step",
               disable=RANK > 0)
    signals, skipped = [], 0
    def note(number, _):                               # the step ends first; a second one kills
        signals.append(number)
        listen(signal.SIG_DFL, signal.SIG_DFL)
    listen(note, note)
    for step in bar:
        clock = Clock()
        batch = draw_problems(tasks, config.prompts, config.seed, step)
        rollouts = sample_rollouts(lm, batch, config, step)                       # 1
        clock.lap("sample", sum(len(r.tokens) for r in rollouts))
        score_answers(rollouts)                                                   # 2
        if transfer:
            transfer.score(rollouts, step)                                        # 3, 4, 5
        clock.lap("transfer", sum(c.continuation_length for r in rollouts for c in r.cuts))
        combine_rewards(rollouts, config)                                         # 6
        rewards = [[r.reward for r in group] for group in grouped(rollouts, config.group)]
        advantages = group_advantages(rewards, config.normalize_std)              # 7
        for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
            rollout.advantage = advantage
        optimizer.adam.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / (config.warmup or 1))
        learned = update(lm, optimizer, rollouts, config)                         # 8
        clock.lap("update", sum(len(r.tokens) for r in rollouts))

        metrics = {"step": step + 1} | summarize(rollouts, config.group) | learned | clock.metrics
        stopped, skipped = gather(signals), skipped + 1 if learned["skipped"] else 0
        if RANK == 0:
            run.log(metrics, rollouts if skipped else rollouts[:config.group])
            report(bar, metrics, rollouts, config)
        require(skipped < 6, f"{run.folder}: six steps in a row without a finite gradient; a "
                "smaller --lr may help; the rollouts of these steps are all in rollouts.jsonl")
        last = stopped or step + 1 == config.steps
        if RANK == 0 and (last or config.save_every and (step + 1) % config.save_every == 0):
            run.save(lm, optimizer, step + 1)
        if stopped:
            RANK or print(f"\nstopped; go on with: python rltr.py --resume {run.folder}")
            sys.exit(128 + stopped[0])
    final = run.folder / "final"
    if RANK == 0:
        run.attempt(lambda: write_folder(final, functools.partial(save_lm, lm)))
        require(not run.failed, f"the last save failed: make room, then --resume {run.folder}")
        print(f"trained model: {final}")
    gather([])                                         # until it is written
    listen(signal.default_int_handler, signal.SIG_DFL)
    if config.eval_data:
        from eval import before_and_after
        before_and_after(config, final)
    return final

def listen(interrupt, terminate):
    """What Ctrl-C and SIGTERM do; a thread that is not the main one has no say."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)

def resolve(config: Config) -> Config:
    """Refuse what is wrong before anything is loaded; name the tiny files and the run."""
    for f in dataclasses.fields(config):
        value, low = getattr(config, f.name), f.metadata["minimum"]
        require(low is None or low <= value < math.inf,
                f"--{f.name.replace('_', '-')} {value}: must be a number of at least {low}")
    weights = (config.answer_weight, config.transfer_weight, config.format_weight)
    require(any(weights), "all reward weights are 0")
    require("{question}" in config.prompt, "--prompt: {question} is missing in it")
    usable = config.device == "cpu" or torch.cuda.is_available()
    require(usable, f"--device {config.device}: none here")
    tiny = {k: v[4:] for k, v in vars(config).items() if str(v).startswith("tiny/")}
    if tiny:
        folder = make_tiny(config.seed)
        config = dataclasses.replace(config, **{k: f"{folder}{v}" for k, v in tiny.items()})
    if not config.out:
        kind = "rltr" if config.transfer_weight else "rlvr"
        base = f"runs/{Path(config.model).name}-{kind}-seed{config.seed}"
        names = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        config = dataclasses.replace(config, out=next(n for n in names if not Path(n).exists()))
    return config

def load_models(config: Config, checkpoint: Path | None) -> tuple[LM, TransferReward | None]:
    """The generator and, unless b = 0, the transfer reward with its frozen receiver."""
    lm, transfer = load_lm(str(checkpoint or config.model), config.device), None
    if config.gradient_checkpointing:
        lm.model.gradient_checkpointing_enable()
    if config.transfer_weight > 0:
        receiver = config.model if config.receiver == "self" else config.receiver
        transfer = TransferReward(
            receiver, lm.tokenizer, stop_ids=lm.stop_ids, cuts=config.cuts, prompt=config.prompt,
            temperature=config.receiver_temperature, max_new_tokens=config.max_new_tokens,
            margin=config.receiver_margin, seed=config.seed, max_rows=config.max_rows,
            device=config.device)
    return lm, transfer

def encode_problems(lm: LM, problems: list[Problem], config: Config, new: int) -> list[tuple]:
    """(problem, prompt's token ids), without those that leave no room for `new` tokens."""
    tasks = [(p, lm.encode_prompt(p.question, config.prompt)) for p in problems]
    fit = [task for task in tasks if len(task[1]) + new <= lm.context]
    require(fit, f"model {lm.model.name_or_path}: its context of {lm.context} tokens holds no "
            f"prompt with {new} more; --max-new-tokens or another model")
    if left_out := len(tasks) - len(fit):
        RANK or print(f"{left_out} of {len(tasks)} problems left out: too long for the context")
    return fit

# =================================================================================== a run on disk
def write_folder(folder: Path, write):
    """Make a folder complete or not at all: written beside, flushed, then renamed."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        for file in partial.rglob("*"):
            flush(file)
    except Exception:                                  # the disk is full: do not keep it so
        shutil.rmtree(partial)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    flush(folder.parent)

def write_file(file: Path, text: str):
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    partial.write_text(text)
    flush(partial)
    partial.replace(file)

def flush(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

class Run:
    """runs/NAME: config.json, metrics.jsonl, rollouts.jsonl, checkpoints/step-000100/, final/."""

    def __init__(self, config: Config, resume: bool):
        self.config, self.folder, self.failed = config, Path(config.out), False
        self.checkpoint = max(self.checkpoints(), default=None) if resume else None
        self.start = int(self.checkpoint.name[5:]) if self.checkpoint else 0
        require(resume or not self.folder.exists(),
                f"{self.folder}: exists already; choose another --out, or --resume {self.folder}")
        parent = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        require(parent.is_dir() and os.access(parent, os.W_OK), f"{parent}: cannot write there")
        # What is still to be written to the logs, and where each of them ends.
        self.logs = {name: [b"", 0] for name in ("metrics.jsonl", "rollouts.jsonl")}
        if resume and RANK == 0:
            self.lock()

    def lock(self):
        """Nobody else writes here while this process lives."""
        handle = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another run is writing there") from None

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-" + "[0-9]" * 6))

    def begin(self, optimizer: MasterAdamW):
        """Write what was configured; when resuming, forget all that came after the checkpoint."""
        if self.checkpoint:
            try:
                optimizer.load_state_dict(torch.load(self.checkpoint / "optimizer.pt", "cpu",
                                                     weights_only=True))
            except Exception as error:                 # of many kinds, by how it is damaged
                raise UserError(f"{self.checkpoint}: damaged, or of another model; delete it to go "
                                f"on from an earlier one ({error})") from None
        gather([])                                     # until all ranks have looked at the folder
        if RANK > 0:
            return
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            self.lock()
        for left in self.folder.glob("**/*.partial-*"):            # by a crash
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_file(self.folder / "config.json", json.dumps(vars(self.config), indent=1))
        def earlier(line):
            step = re.fullmatch(rb'\{"step": (\d+),.*\n', line)            # None: torn by a crash
            return step and int(step[1]) <= self.start
        for name, log in self.logs.items():
            with (self.folder / name).open("a+b") as file:
                file.seek(0)
                log[1] = sum(map(len, itertools.takewhile(earlier, file)))
                file.truncate(log[1])

    def attempt(self, write):
        """A full disk does not end a run: what fails is said, and done again at the next time."""
        try:
            write()
            self.failed = False
        except Exception as error:                     # torch and safetensors have their own kinds
            self.failed = True
            print(f"rltr: not written, training goes on: {printable(str(error))}", file=sys.stderr)

    def log(self, metrics: dict, rollouts: list[Rollout]):
        shown = [{"step": metrics["step"], **dataclasses.asdict(r)} for r in rollouts]
        def write():
            for name, log in self.logs.items():
                with (self.folder / name).open("r+b") as file:
                    file.seek(log[1])                  # over what a failed attempt has left
                    file.write(log[0])
                    file.truncate()
                log[:] = b"", log[1] + len(log[0])
        for log, rows in zip(self.logs.values(), ([metrics], shown)):
            log[0] += "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.attempt(write)

    def save(self, lm: LM, optimizer: MasterAdamW, step: int):
        def write(folder):
            save_lm(lm, folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        def write_and_drop():
            write_folder(self.folder / "checkpoints" / f"step-{step:06d}", write)
            for old in self.checkpoints()[:-self.config.keep]:
                shutil.rmtree(old)
        self.attempt(write_and_drop)

# ======================================================================================= reporting
class Clock:
    """Seconds and tokens/s of the phases of a step, and the peak memory so far."""

    def __init__(self):
        self.metrics, self.last = {}, time.perf_counter()

    def lap(self, phase: str, tokens: int):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        seconds, self.last = time.perf_counter() - self.last, time.perf_counter()
        self.metrics |= {f"seconds_{phase}": round(seconds, 3), "peak_memory_gib": peak / 2 ** 30,
                         f"tokens_per_s_{phase}": round(tokens / seconds)}

def summarize(rollouts: list[Rollout], group: int) -> dict:
    """The metrics of a batch (the README has a line on each)."""
    def mean(values):
        return sum(values) / len(values) if values else None
    cuts, groups = [cut for r in rollouts for cut in r.cuts], grouped(rollouts, group)

    votes = [majority_vote([extract_answer(r.text) for r in g]) for g in groups]
    metrics = {"reward": mean([r.reward for r in rollouts]),
               "accuracy": mean([r.r_answer for r in rollouts]),
               "format": mean([r.r_format for r in rollouts]),
               "finished": mean([r.finished for r in rollouts]),
               "answers_missing": CHECKS["missing"], "answers_unparsed": CHECKS["unparsed"],
               "answers_compared_as_text": CHECKS["compared_as_text"],
               "majority": mean([vote is not None and answers_equal(vote, g[0].problem.answer)
                                 for vote, g in zip(votes, groups)]),
               "length": mean([len(r.tokens) for r in rollouts]),
               "dead_groups": 1 - len(live_groups(rollouts, group)) / len(groups)}
    if cuts:
        metrics |= {"transfer": mean([r.r_transfer for r in rollouts]),
                    "leak": mean([c.leaked for c in cuts]),
                    "overflow": mean([c.overflow for c in cuts])}
    for low in (0.0, 0.25, 0.5, 0.75) if cuts else ():
        within = [c.correct for c in cuts if low < c.tau <= low + 0.25]
        metrics[f"transfer_tau_{low}_{low + 0.25}"] = mean(within)
    return metrics

def report(bar, metrics: dict, rollouts: list[Rollout], config: Config):
    """The numbers that matter on the progress bar; now and then a group to read."""
    step, left = metrics["step"], config.steps - metrics["step"]
    bar.set_postfix({name: f"{metrics[name]:.3g}" for name in (
        "reward", "accuracy", "transfer", "length", "tokens_per_s_sample") if name in metrics})
    if metrics.get("logprob_gap_mean", 0) > 0.05 and config.epochs == config.minibatches == 1:
        warnings.warn("the log-probs of trainer and sampler differ (logprob_gap_mean): a kernel or "
                      "a dtype of one alone, dropout, or weights that changed in between")
    if step == bar.initial + 1:
        seconds = sum(value for key, value in metrics.items() if key.startswith("seconds_"))
        bar.write(f"{config.out}: the first step took {seconds:.1f} s, {left} more make about "
                  f"{seconds * left / 60:.1f} min")
    if config.show_every and step % config.show_every == 0:
        bar.write(show_group((live_groups(rollouts, config.group) or [rollouts[:config.group]])[0]))

def show_group(group: list[Rollout]) -> str:
    """A group to read: the problem, a rollout with its cut, the continuation, all the rewards."""
    first = group[0]
    text, problem = first.text, first.problem
    for cut in first.cuts[:1]:
        verdict = "right" if cut.correct else "wrong"
        text = (f"{cut.prefix} >>|<< {text[len(cut.prefix):]}\n--- cut at tau = {cut.tau:.2f}, "
                f"receiver goes on ({verdict}): {cut.continuation}")
    head = f"--- problem (answer {problem.answer}): {problem.question}\n--- rollout: {text}"
    return printable("\n".join([head, *(
        f"    answer {r.r_answer:.0f}  transfer {r.r_transfer:.2f}  format {r.r_format:.0f}"
        f"  reward {r.reward:.2f}  advantage {r.advantage:+.2f}" for r in group)]))

def printable(text: str) -> str:
    """Model text for a terminal: control characters are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)

# ================================================================================ the tiny default
#
# `python rltr.py` makes two tiny models and a task in the cache folder, once a seed; from there on
# they are models and data like any other. A problem is a chain of five operations modulo 7, and the
# answer says only whether the result is odd: guessing pays half the time, so a right answer says
# little about the reasoning. The generator learnt from flawed demonstrations, the receiver did not.

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
MISCONCEPTIONS = {"+": lambda a, b: a + b + 1, "-": lambda a, b: b - a, "*": lambda a, b: a + b}
FLAWED = 0.30                      # share of flawed steps in the generator's demonstrations

def tiny_problem(source: random.Random, flawed: float = 0.0) -> tuple[str, str, str]:
    """Question, demonstration (each step wrong with probability `flawed`), right answer.
    >>> tiny_problem(random.Random(1))
    ('Q1>*6;>+2;>-3;>+0;>-3;?', '*6=6+2=1-3=5+0=5-3=2\\\\boxed{0}', '0')
    """
    value = truth = source.randrange(7)
    question, chain = f"Q{value}", ""
    for _ in range(5):
        operator, operand = source.choice("+-*"), source.randrange(7)
        rules = MISCONCEPTIONS if source.random() < flawed else OPERATIONS
        value = rules[operator](value, operand) % 7
        truth = OPERATIONS[operator](truth, operand) % 7
        question, chain = f"{question}>{operator}{operand};", f"{chain}{operator}{operand}={value}"
    return question + "?", f"{chain}\\boxed{{{value % 2}}}", str(truth % 2)

def tiny_tokenizer():
    """A token a character, and \\boxed{ as one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    words = ["<pad>", "<eos>", "<unk>", "\\boxed{", *"}Q?>;=+-*0123456"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}")

def warm_start(folder: Path, width: int, steps: int, flawed: float, seed: int):
    """A small Qwen2, trained on demonstrations by next-token prediction, as a model folder."""
    torch.manual_seed(seed)
    tokenizer, source = tiny_tokenizer(), random.Random(seed)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, rope_theta=100.0,
        max_position_embeddings=128, initializer_range=0.08, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id))
    lm = LM(model, tokenizer, (tokenizer.eos_token_id,), len(tokenizer), 128)
    optimizer = MasterAdamW(model, 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer.adam, 4e-3, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"warm start of the tiny {folder.name}"):
        demonstrations = []
        for question, chain, _ in (tiny_problem(source, flawed) for _ in range(32)):
            prompt, tokens = tokenizer.encode(question), tokenizer.encode(chain) + list(lm.stop_ids)
            demonstrations.append(Rollout(None, prompt, tokens, [], True, chain))
        (-completion_logprobs(lm, demonstrations)[0].mean()).backward()
        optimizer.step(1.0)
        schedule.step()
    save_lm(lm, folder)

def make_tiny(seed: int) -> Path:
    """The folder of generator/, receiver/, train.jsonl and test.jsonl; made at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder, source = cache / "rltr" / f"tiny-v3-seed{seed}", random.Random(f"problems {seed}")
    def write(partial):
        answers = {q: a for q, _, a in (tiny_problem(source) for _ in range(4200))}
        rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in answers.items()]
        (partial / "test.jsonl").write_text("".join(rows[:100]))
        (partial / "train.jsonl").write_text("".join(rows[100:]))
        warm_start(partial / "generator", 64, 400, FLAWED, 2 * seed)
        warm_start(partial / "receiver", 80, 600, 0.0, 2 * seed + 1)
    if not folder.exists():
        write_folder(folder, write)
    return folder

# ==================================================================================== command line
def parse_arguments(argv: list[str] | None) -> tuple[Config, bool]:
    """The settings, and whether to resume. Flags go before TINY, TINY before defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
            "type": type(f.default), "metavar": type(f.default).__name__.upper()}
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER",
                        help="go on with the run in FOLDER (or in --out)")
    parser.add_argument("--force", action="store_true", help="resume although settings differ")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    parser.error = functools.partial(require, False)                       # one line, not a manual
    given = vars(parser.parse_args(argv))
    resume, force, _ = (given.pop(name) for name in ("resume", "force", "debug"))
    if resume is not None:
        return resumed_config(Path(resume or given.get("out", "")), given, force), True
    return Config(**({} if given.get("model") else TINY) | given), False

def resumed_config(folder: Path, given: dict, force: bool) -> Config:
    """The settings of an earlier run; unless forced only what cannot change its course differs."""
    try:
        config = Config(**json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume {folder}: no run to resume there ({error})") from None
    another = ", ".join(key for key, value in given.items()
                        if key not in HARMLESS and value != getattr(config, key))
    require(force or not another, f"--resume {folder}: that run has another {another}; leave it "
            "away, or --force")
    return dataclasses.replace(config, **given | {"out": str(folder)})

def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.disable_progress_bar()
    try:
        arguments = parse_arguments(argv)
        join_ranks()
        train(*arguments)
        return 0
    except (UserError, OSError) as error:
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print("rltr: " + printable(" ".join(str(error).split())), file=sys.stderr)
        return 2
    finally:
        listen(signal.default_int_handler, signal.SIG_DFL)

if __name__ == "__main__":
    sys.modules["rltr"] = sys.modules["__main__"]      # eval.py imports rltr: let it get this one
    sys.exit(main())
