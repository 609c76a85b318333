"""Random misuse of the Python interface: the draws of `tests.campaign` that call functions instead of the command line.

    python -m tests.campaign_api --pair runs/x/pair --subject runs/x/subject --scratch /tmp/new --draw 1-7

One draw makes some sixty calls in one process, whose memory is limited; `--each` makes all calls with one odd argument
(a thousand, some minutes). Each call is the plain one with one or two arguments replaced by odd ones. An argument that
means the same must give the same result. One that is wrong must be refused with `InputError`, a single sentence. Of
others either is right.
"""

import argparse
import decimal
import fractions
import functools
import itertools
import json
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import nla_jax as nla
from nla_jax.pair import Training
from nla_jax.runtime.errors import InputError

MEMORY = 12 << 30  # bytes of address space: who asks for more fails instead of stopping the machine
SECONDS = 60  # of one call
SAME, WRONG, EITHER = "same", "wrong", "either"  # what an odd argument must lead to
Odd = tuple[str, Any, str]  # how it is written, the argument (or a function of the plain one), what it leads to
TEXTS = ["The river turns north.", "A list of names", "x", "Every function returns a new list."]


class Hangs(Exception):
    """A call took longer than `SECONDS`."""


def odd_vectors() -> list[Odd]:
    """Ways to give activations `[n, d]`."""
    same = {
        "a list": lambda v: v.tolist(),
        "float64": lambda v: v.astype(np.float64),
        "columns first": np.asfortranarray,
        "every second of a longer one": lambda v: np.repeat(v, 2, 0)[::2],
        "of JAX": jnp.asarray,
        "a tuple of rows": tuple,
        "big endian": lambda v: v.astype(">f4"),
        "read only": lambda v: np.frombuffer(v.tobytes(), v.dtype).reshape(v.shape),
        "a long double": lambda v: v.astype(np.longdouble),
    }
    wrong = {
        "one row": lambda v: v[0],
        "narrower": lambda v: v[:, 1:],
        "three axes": lambda v: v[None],
        "a number": lambda v: 3.0,
        "None": lambda v: None,
        "words": lambda v: ["a", "b"],
        "words as numbers": lambda v: v.astype(str),
        "objects": lambda v: np.full(v.shape, None),
        "ragged": lambda v: [[1.0], [1.0, 2.0]],
        "complex": lambda v: v + 1j,
        "a mapping": lambda v: {"a": v},
        "dates": lambda v: v.astype("datetime64[s]"),
        "not a number in a row": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 3, np.nan, v),
        "infinite": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 3, -np.inf, v),
        "a row of zeros": lambda v: v * (np.arange(len(v)) != 1)[:, None],
        "negative zeros": lambda v: v * -0.0,
    }
    either = {
        "no rows": lambda v: v[:0],
        "an empty list": lambda v: [],
        "whole numbers": lambda v: (v * 100).astype(np.int8),
        "bits": lambda v: v > 0,
        "float16": lambda v: v.astype(np.float16),
        "bfloat16": lambda v: jnp.asarray(v, jnp.bfloat16),
        "very long": lambda v: v.astype(np.float64) * 1e300,
        "very short": lambda v: v.astype(np.float64) * 1e-300,
        "masked": lambda v: np.ma.masked_array(v, v > 0),
        "records": lambda v: np.zeros(2, "f4,f4"),
    }
    return [(n, f, SAME) for n, f in same.items()] + [
        *[(n, f, WRONG) for n, f in wrong.items()],
        *[(n, f, EITHER) for n, f in either.items()],
    ]


def odd_texts() -> list[Odd]:
    """Ways to give texts."""
    same = {
        "a tuple": tuple,
        "a generator": iter,
        "an array": np.array,
        "an array of objects": lambda t: np.array(t, object),
        "keys": dict.fromkeys,
    }
    wrong = {
        "None": lambda t: None,
        "a number": lambda t: 3,
        "numbers": lambda t: [1, 2],
        "bytes": lambda t: [text.encode() for text in t],
        "one None": lambda t: [*t[:1], None],
        "nested": lambda t: [t],
        "bare bytes": lambda t: b"abc",
        "half of a character": lambda t: ["\ud83d alone", *t[1:]],
    }
    either = {
        "one text": lambda t: t[0],
        "none": lambda t: [],
        "an empty one": lambda t: ["", *t[1:]],
        "blanks": lambda t: [" \n\t", *t[1:]],
        "a long one": lambda t: ["word " * 300, *t[1:]],
        "null characters": lambda t: ["a\0b", *t[1:]],
        "special tokens": lambda t: ["<|bos|><text></text><summary><explanation>", *t[1:]],
        "emoji": lambda t: ["\U0001f9d1‍\U0001f680 e\u0301", *t[1:]],
        "a set": set,
    }
    return [(n, f, SAME) for n, f in same.items()] + [
        *[(n, f, WRONG) for n, f in wrong.items()],
        *[(n, f, EITHER) for n, f in either.items()],
    ]


def odd_number(least: int, same: tuple = (), most: int | None = None) -> list[Odd]:
    """Whole numbers from `least` on: those in `same` change nothing."""
    wrong = [least - 1, -(10**20), "1", None, 1.5, 2.0, float("nan"), [1], True, np.float32(1), 1 + 0j, b"1", {}]
    wrong += [most + 1, 10**30] if most is not None else []
    return [(repr(n), lambda _, n=n: n, SAME) for n in same] + [(repr(n), lambda _, n=n: n, WRONG) for n in wrong]


def odd_values(same: tuple = (), wrong: tuple = (), either: tuple = ()) -> list[Odd]:
    """Some values, by what they lead to."""
    given = {SAME: same, WRONG: wrong, EITHER: either}
    return [(repr(v)[:60], lambda _, v=v: v, kind) for kind, values in given.items() for v in values]


class Calls:
    """The functions that are called, their plain arguments, and the odd ones of each."""

    def __init__(self, pair: Path, subject: Path, scratch: Path):
        self.pair_at, self.subject_at, self.scratch = pair, subject, scratch
        self.pair = nla.load_pair(pair)
        self.subject = nla.load_subject(subject, self.pair.sidecar.layer)
        self.vectors = nla.extract(self.subject, TEXTS).vectors
        self.saved = itertools.count()
        self.table = {
            "explain": self._explain(),
            "reconstruct": (lambda texts, batch: self.pair.reconstruct(texts, batch=batch), self._texts()),
            "score": (self.pair.score, self._texts(batch=False) | {"vectors": (self.vectors, odd_vectors())}),
            "fve": (nla.fve, self._fve()),
            "extract": (self._extract, self._extraction()),
            "load_subject": (self._load_subject, self._subject()),
            "load_pair": (self._load_pair, self._loading()),
            "save": (self._save, self._saving()),
            "patch": self._patch(),
            "steer": (self._steer, self._steering()),
            "make_mesh": (lambda data, fsdp, tensor: dict(nla.make_mesh(data, fsdp, tensor).shape), self._mesh()),
        }

    # What is called: each gives something that can be compared

    def _extract(self, texts: Any, positions: Any, max_tokens: Any, doc_ids: Any) -> tuple:
        found = nla.extract(self.subject, texts, positions, max_tokens=max_tokens, doc_ids=doc_ids)
        return found.vectors, found.tokens, found.positions

    def _load_subject(self, name: Any, layer: Any, dtype: Any, mesh: Any, attention: Any) -> np.ndarray:
        subject = nla.load_subject(name, layer, dtype, mesh, attention)
        return nla.extract(subject, TEXTS[:1]).vectors

    def _load_pair(self, av: Any, ar: Any, dtype: Any, attention: Any, **rest: Any) -> np.ndarray:
        return nla.load_pair(av, ar, dtype, attention, **rest).reconstruct(TEXTS[:1])

    def _save(self, folder: Any, dtype: Any, overwrite: Any) -> np.ndarray:
        place = self.scratch / str(next(self.saved))
        place.mkdir(parents=True)
        (place / "file").write_text("kept")
        (place / "taken/av").mkdir(parents=True)
        (place / "taken/av/notes").write_text("precious")
        folder = folder(place) if callable(folder) else folder
        try:
            self.pair.merged().save(folder, dtype, overwrite=overwrite)
            return nla.load_pair(folder).reconstruct(TEXTS[:1])
        finally:
            assert (place / "file").read_text() == "kept"
            assert overwrite is True or (place / "taken/av/notes").read_text() == "precious"
            shutil.rmtree(place)

    def _steer(self, **given: Any) -> tuple:
        found = nla.steer(self.subject, self.pair, **given)
        return found.position, found.edited, *[(row.direction, row.logprobs, row.continuation) for row in found.rows]

    # Their arguments: the plain one, and odd ones

    def _explain(self) -> tuple:
        call = lambda vectors, **options: [found.text for found in self.pair.explain(vectors, **options)]
        real = (0, -0.0, np.float32(0), np.float64(0), fractions.Fraction(0), np.int64(0))
        odd = (-1, float("nan"), float("inf"), -1e-30, "0", None, [0.0], 1j, decimal.Decimal(0), True, 10**400)
        return call, {
            "vectors": (self.vectors, odd_vectors()),
            "max_new_tokens": (8, odd_number(1, (np.int64(8), np.uint8(8)))),
            "temperature": (0.0, odd_values(real, odd, (1e-38, 1e-300, 1e30, 1e300, 5e-324, jnp.float32(0)))),
            "seed": (0, odd_number(0, (1, np.int32(3), 2**32 - 1), most=2**32 - 1)),
            "inject": (True, odd_values((np.True_,), (0, 1, None, "no", np.zeros(2)), (False,))),
            "batch": (64, odd_number(1, (1, 2, 3, 4, 5, 7, 10**6, 10**18, np.int64(2)))),
            "first": (0, odd_number(0, (1, 7, 2**30), most=2**30)),
        }

    def _texts(self, batch: bool = True) -> dict:
        batches = {"batch": (64, odd_number(1, (1, 2, 3, 7, 10**18)))}
        return {"texts": (TEXTS, odd_texts())} | (batches if batch else {})

    def _fve(self) -> dict:
        close = self.vectors + np.arange(self.vectors.size).reshape(self.vectors.shape) % 3
        return {
            "recon": (close, [(how, f, EITHER if "zero" in how else kind) for how, f, kind in odd_vectors()]),
            "vectors": (self.vectors, [(how, f, EITHER if "zero" in how else kind) for how, f, kind in odd_vectors()]),
            "baseline": ("mean", odd_values((), ("median", None, 3, b"mean", ["mean"]), ("meannorm", np.str_("mean")))),
        }

    def _extraction(self) -> dict:
        last = ("last", -1, [-1], (-1,), np.array(-1), np.int64(-1), range(-1, 0))
        wrong = ("first", None, 1.0, [0.5], 10**9, -(10**9), "0", {}, b"last", [[None]], float("nan"), 1j, object())
        return {
            "texts": (TEXTS, odd_texts()),
            "positions": ("last", odd_values(last, wrong, ("all", [], [0, 0], [[-1]], True, slice(0, 1)))),
            "max_tokens": (2048, odd_number(1, (10**18, np.int64(500)))),
            "doc_ids": (
                None,
                odd_values(
                    (list("abcd"), np.arange(4), tuple("abcd"), "abcd"),
                    (["a"], 3, "a", [*"abcde"]),
                    ([None] * 4, [[]] * 4),
                ),
            ),
        }

    def _patch(self) -> tuple:
        acts = nla.extract(self.subject, TEXTS)
        whole = lambda found: (
            {k: whole(v) for k, v in found.items()} if isinstance(found, dict) else np.concatenate(found)
        )
        call = lambda **given: whole(nla.patch(self.subject, **given))
        rows = {
            "a tuple": (tuple, SAME),
            "arrays": (lambda r: [np.array(row) for row in r], SAME),
            "a generator": (iter, SAME),
            "one row": (lambda r: r[0], WRONG),
            "an empty row": (lambda r: [[], *r[1:]], WRONG),
            "ragged": (lambda r: [[r[0], [1, 2]], *r[1:]], WRONG),
        }
        wrong = (
            None,
            3,
            "abc",
            [],
            [[1.5]],
            [[-1]],
            [["a"]],
            [[10**9]],
            [[10**30]],
            [[None]],
            [[[1]]],
            {},
            [{}],
            b"ab",
        )
        places = (None, "first", 1.5, [0], [99] * 4, [[]] * 4, [[None]] * 4, ["a"] * 4, {}, [0.5] * 4)
        vectors = [(how, make, EITHER if how in ("None", "a mapping") else kind) for how, make, kind in odd_vectors()]
        return call, {
            "token_rows": (acts.token_ids, [*((n, f, k) for n, (f, k) in rows.items()), *odd_values((), wrong)]),
            "positions": ("last", odd_values(([-1] * 4, np.array([-1] * 4), [[-1]] * 4), places, ([True] * 4,))),
            "vectors": (acts.vectors, vectors),  # None: nothing is patched; a mapping: several results
            "rescale": (True, odd_values((np.True_,), (0, 1, None, "no"), (False,))),
            "batch": (16, odd_number(1, (1, 2, 3, 10**18))),
        }

    def _steering(self) -> dict:
        edits = (None, 3, "ab", ("river",), ("", "x"), ("sea", "x"), (1, 2), (None, None), ("a", "b", "c"), b"ab", {})
        strengths = ("a", None, [], ["x"], float("nan"), [float("inf")], [True], 10**400, 1j, [[0.5]], {}, b"1")
        numbers = [odd for odd in odd_number(-(1 << 31), (np.int64(-1),), most=30) if odd[0] != "None"]
        return {
            "text": (TEXTS[0], odd_values((), (None, 3, [], ["x"], b"x", "", "\ud83d"), ("x", " \n", "a\0b"))),
            "edit": (("river", "lake"), odd_values((["river", "lake"],), edits, (("river", ""), ("r", "r")))),
            "token": (-1, [*odd_values((None,)), *numbers]),  # None: the last
            "explanation": ("The river turns.", odd_values((), (3, "", b"x", ["The river"], {}), (None, "river"))),
            "strengths": ((0.5,), odd_values(([0.5], 0.5, np.float32(0.5), np.array([0.5])), strengths, (-1, 0, 1e30))),
            "new_tokens": (3, odd_number(1, (np.int64(3),))),
        }

    def _models(self) -> dict:
        floats = ("bfloat16", jnp.bfloat16, np.float16, "float16", np.float64, "float64", float)
        return {
            "dtype": (None, odd_values((), ("int8", int, "bogus", 3, object(), "", "complex64", bool, b"x"), floats)),
            "attention": ("xla", odd_values((), ("cudnn", "splash", "nope", None, 3, ""), ())),
            "mesh": (None, odd_values((nla.make_mesh(1, 1, 1),), ("x", 3, (1, 1, 1), {}), ())),
        }

    def _subject(self) -> dict:
        layer = self.pair.sidecar.layer
        names = ("nowhere", None, 3, "", "/", "a/b/c", ["x"], b"x", "gs://", self.pair_at, "\0", "x" * 300)
        return self._models() | {
            "dtype": (jnp.float32, self._models()["dtype"][1] + odd_values(("float32", np.float32))),
            "name": (self.subject_at, odd_values((str(self.subject_at),), names)),
            "layer": (
                layer,
                odd_values((np.int64(layer),), (-1, 99, "1", None, 1.0, [1], 10**30, float("nan"), b"1"), (0, 2, True)),
            ),
        }

    def _loading(self) -> dict:
        at = self.pair_at
        wrong = ("nowhere", None, 3, "", "/", at / "av", at / "av/config.json", ["x"], b"x", "a/b/c", "\0", "x" * 300)
        fields = {
            "injection_scale": (-1, "x", "nan", 0, [1], True, b"2"),
            "injections": ("x", 3, (), [1], print),
            "reading": ("x", 3, b"tags"),
            "thinking": ("x", 3, True),
            "special_tokens": ("x", 3),
        }
        given = [
            (f"Conventions({field}={value!r})", lambda _, odd={field: value}: nla.Conventions(**odd), EITHER)
            for field, values in fields.items()
            for value in values
        ]
        return self._models() | {
            "av": (at, odd_values((str(at), at.parent, str(at) + "/"), wrong)),
            "ar": (None, odd_values((), ("nowhere", 3, "", at / "av", at, ["x"], b"x"))),
            "base": (
                None,
                odd_values((), (), ("nowhere", 3, ["x"], b"x", self.subject_at, "")),
            ),  # whole models have none
            "conventions": (nla.Conventions(), [*given, *odd_values((), (None, {}, "x", 3, nla.Conventions))]),
            "training": (None, odd_values((), ("x", 3, Training("bogus"), Training(3)), (Training(), Training("")))),
        }

    def _saving(self) -> dict:
        folders = {
            "a file": (lambda place: place / "file", WRONG),
            "below a file": (lambda place: place / "file/x", WRONG),
            "what holds a file": (lambda place: place / "taken", EITHER),
            "text": (lambda place: str(place / "new"), SAME),
            "deep": (lambda place: place / "a/b/c d/é", SAME),
            "a long name": (lambda place: place / ("x" * 300), WRONG),
            "a null character": (lambda place: f"{place}/a\0b", WRONG),
        }
        odd = [(name, lambda _, f=f: f, kind) for name, (f, kind) in folders.items()]
        return {
            "folder": (lambda place: place / "new", [*odd, *odd_values((), (None, 3, ["x"], b"x", "gs://"))]),
            "dtype": (None, odd_values(("float32", np.float32, jnp.float32), ("int8", "bogus", 3, bool, object()), ())),
            "overwrite": (False, odd_values((np.False_,), (0, 1, None, "no"), (True,))),
        }

    def _mesh(self) -> dict:
        odd = odd_number(1, (np.int64(1),)) + odd_values((), (2, 10**9, 0, -2), (-1,))
        return {name: (1, [item for item in odd if item[0] != "True"]) for name in ("data", "fsdp", "tensor")}

    # One call

    @functools.cache  # noqa: B019 (one object a process)
    def plain(self, name: str) -> Any:
        """The result of the plain call."""
        call, arguments = self.table[name]
        return call(**{key: value for key, (value, _) in arguments.items()})

    def draw(self, name: str, rng: random.Random) -> tuple[str, str]:
        """A call with odd arguments: what was done, and what breaks the rule."""
        arguments = self.table[name][1]
        chosen = rng.sample(sorted(arguments), rng.choice((1, 1, 1, 2)))
        return self.made(name, {key: rng.choice(arguments[key][1]) for key in chosen})

    def made(self, name: str, odd: dict[str, Odd]) -> tuple[str, str]:
        """A call with these odd arguments: what was done, and what breaks the rule."""
        call, arguments = self.table[name]
        kinds = [kind for *_, kind in odd.values()]
        expected = WRONG if WRONG in kinds else EITHER if EITHER in kinds else SAME

        def result() -> Any:
            given = {key: value for key, (value, _) in arguments.items()}
            return call(**given | {key: make(given[key]) for key, (_, make, _) in odd.items()})

        done = f"{name}({', '.join(f'{key}={how}' for key, (how, *_) in odd.items())})"
        return done, judged(result, expected, lambda: self.plain(name))


def judged(call: Callable, expected: str, plain: Callable) -> str:
    """What breaks the rule in what a call does; "" where nothing does."""
    try:
        found = call()
    except InputError as error:
        said = str(error)
        if expected == SAME:
            return f"refused: {said}"
        one = said.strip() == said and "\n" not in said and said.endswith((".", "?"))
        return "" if one else f"no single sentence: {said!r}"
    except Exception as error:
        last = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
        return f"{type(error).__name__}: {str(error)[:300]!r} at {' > '.join(last)}"
    if expected == WRONG:
        return f"accepted: {str(found)[:200]}"
    return "" if expected == EITHER or equal(found, plain()) else f"another result: {str(found)[:200]}"


def equal(a: Any, b: Any) -> bool:
    """Whether two results are equal; of numbers up to what another batch changes."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, (np.ndarray, float)):
        return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=1e-5)
    return a == b


def main(argv: list[str] | None = None) -> int:
    """Makes the calls of one draw; prints each as a JSON line `[done, wrong]`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("pair", "subject", "scratch"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--draw", default="", help="the seed of its random choices")
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--each", action="store_true", help="every odd argument once, alone, instead of random ones")
    asked = parser.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    calls, rng = Calls(asked.pair, asked.subject, asked.scratch), random.Random(asked.draw)

    def hangs(*_: Any) -> None:
        raise Hangs(f"no end after {SECONDS} s")

    signal.signal(signal.SIGALRM, hangs)
    drawn = (functools.partial(calls.draw, rng.choice(sorted(calls.table)), rng) for _ in range(asked.calls))
    each = (
        functools.partial(calls.made, name, {key: odd})
        for name, (_, arguments) in calls.table.items()
        for key, (_, odds) in arguments.items()
        for odd in odds
    )
    for call in each if asked.each else drawn:
        signal.alarm(SECONDS)
        found = call()
        signal.alarm(0)
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
