"""More contests of encoding, entered beside those of `contestants.py`, which reads this module.

`encode-cl100k`: as `encode`, with the ranks of the package mbpe. `encode-own`: with a tokenizer of 10,000 tokens that
`peers.py` has trained on the text. `piece`: one pre-token of 10 MB. `load`: from disk to the ids of "hello".
`short`: texts of 20 to 200 bytes, a call each. `decode`, `decode-text`: 100 million ids to bytes, to a string.
"""

from __future__ import annotations

# ruff: noqa: PTH118 - loading pathlib would be counted
TYPE_CHECKING = False  # loading `typing` would be counted
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from contestants import Job, Work

    Enter = Callable[..., Callable[[Work], Work]]

EOT = "<|endoftext|>"
CALLS, DECODED = 200_000, 100_000_000
OWN = "own-10k.json"


def cl100k_ranks() -> str:
    """The ranks of cl100k_base, in the package mbpe."""
    import importlib.util
    import os

    spec = importlib.util.find_spec("mbpe")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("mbpe, which has the ranks, is not installed")
    return os.path.join(spec.submodule_search_locations[0], "data", "cl100k.tiktoken")


def ours(job: Job, name: str = "gpt2.json") -> Any:
    """bytekiln's tokenizer, with numpy there as it is for the others."""
    import numpy as np

    import bytekiln

    np.zeros(1)
    if name == "cl100k":
        return bytekiln.Tokenizer.from_file(cl100k_ranks(), pattern="cl100k", special_tokens={EOT: 100256})
    return bytekiln.Tokenizer.from_file(f"{job.cache}/{name}")


def theirs(job: Job, name: str = "gpt2.json") -> Any:
    """gigatoken's."""
    import gigatoken

    if name == "cl100k":
        ranks = cl100k_ranks()
        return gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="cl100k", special_tokens={EOT: 100256})
    return gigatoken.Tokenizer(f"{job.cache}/{name}")


def enter(contestant: Enter, timed: Callable[..., Any], digests: dict[str, Callable[[Any], str]]) -> None:
    """Enter the contestants; `digests` of contests whose results are no ids of two bytes."""

    def numbers(ids: Any) -> str:
        import hashlib

        import numpy as np

        a = np.asarray(ids).astype(np.uint32)
        return hashlib.blake2b(a.tobytes(), digest_size=4).hexdigest()

    def flat(batch: Any) -> Any:
        import awkward as ak

        return ak.flatten(batch).to_numpy()

    def without_eot(ids: Any, eot: int) -> Any:
        return ids[ids != eot]

    def encoding(contest: str, name: str, eot: int) -> None:
        digests[contest] = lambda ids: numbers(ids)

        @contestant(contest, "bytekiln")
        def _(job: Job) -> Any:
            t, text = ours(job, name), job.read().encode()
            return timed(
                lambda: t.encode_to_numpy(text, allowed_special="all", threads=job.threads),
                lambda ids: without_eot(ids, eot),
            )

        def gigatoken(job: Job, first: bool) -> Any:
            import gigatoken

            t = theirs(job, name)
            source = gigatoken.BytesSource([job.read().encode()], separator=EOT)
            if first:
                t.encode_batch(gigatoken.BytesSource([b"hello world"], separator=EOT), parallel=job.threads > 1)
            return timed(lambda: t.encode_batch(source, parallel=job.threads > 1), lambda b: without_eot(flat(b), eot))

        contestant(contest, "gigatoken")(lambda job: gigatoken(job, False))
        contestant(contest, "gigatoken, after a tiny call", "gigatoken")(lambda job: gigatoken(job, True))

    encoding("encode-cl100k", "cl100k", 100256)
    encoding("encode-own", OWN, 9_999)

    # --- one piece -------------------------------------------------------------------------------------------

    digests["piece"] = numbers

    @contestant("piece", "bytekiln")
    def _(job: Job) -> Any:
        t, text = ours(job), job.read().encode()
        t.encode("hello")
        return timed(lambda: t.encode_to_numpy(text, threads=1))

    @contestant("piece", "gigatoken")
    def _(job: Job) -> Any:
        import gigatoken

        t, source = theirs(job), gigatoken.BytesSource([job.read().encode()], separator=EOT)
        t.encode_batch(gigatoken.BytesSource([b"hello"], separator=EOT), parallel=False)
        return timed(lambda: t.encode_batch(source, parallel=False), flat)

    @contestant("piece", "tokie")
    def _(job: Job) -> Any:
        import tokie

        t, text = tokie.Tokenizer.from_json(f"{job.cache}/gpt2.json"), job.read()
        t.encode("hello")
        return timed(lambda: t.encode_batch_flat([text], False)[0])

    # --- loading ----------------------------------------------------------------------------------------------

    digests["load"] = numbers

    @contestant("load", "bytekiln")
    def _(job: Job) -> Any:
        import bytekiln

        return timed(lambda: bytekiln.Tokenizer.from_file(f"{job.cache}/gpt2.json").encode("hello"))

    @contestant("load", "gigatoken")
    def _(job: Job) -> Any:
        import gigatoken

        return timed(lambda: list(gigatoken.Tokenizer(f"{job.cache}/gpt2.json").encode("hello")))

    @contestant("load", "tokie")
    def _(job: Job) -> Any:
        import tokie

        return timed(lambda: tokie.Tokenizer.from_json(f"{job.cache}/gpt2.json").encode("hello").ids)

    @contestant("load", "tiktoken")
    def _(job: Job) -> Any:
        from contestants import tiktoken_gpt2

        return timed(lambda: tiktoken_gpt2(job).encode("hello"))

    # --- short texts ------------------------------------------------------------------------------------------

    def short_texts(job: Job) -> list[str]:
        import random

        text, rng = job.read(), random.Random(0)
        places = (rng.randrange(len(text) - 200) for _ in range(CALLS))
        return [text[at : at + rng.randint(20, 200)] for at in places]

    def calls(encode: Callable[[str], Any], texts: list[str]) -> Any:
        for text in texts:
            encode(text)
        return [id for text in texts[:1000] for id in encode(text)]

    digests["short"] = numbers

    @contestant("short", "bytekiln")
    def _(job: Job) -> Any:
        t, texts = ours(job), short_texts(job)
        return timed(lambda: calls(t.encode, texts))

    @contestant("short", "tiktoken")
    def _(job: Job) -> Any:
        from contestants import tiktoken_gpt2

        t, texts = tiktoken_gpt2(job), short_texts(job)
        return timed(lambda: calls(t.encode_ordinary, texts))

    @contestant("short", "tokie")
    def _(job: Job) -> Any:
        import tokie

        t, texts = tokie.Tokenizer.from_json(f"{job.cache}/gpt2.json"), short_texts(job)
        return timed(lambda: calls(lambda text: t.encode(text).ids, texts))

    # --- decoding ---------------------------------------------------------------------------------------------

    def ids_of(job: Job) -> Any:
        import numpy as np

        ids = ours(job).encode_to_numpy(job.read(), allowed_special="all")
        return np.resize(ids, DECODED)

    def size(text: Any) -> str:
        import hashlib

        return hashlib.blake2b(text if isinstance(text, bytes) else text.encode(), digest_size=4).hexdigest()

    digests["decode"] = digests["decode-text"] = size

    @contestant("decode", "bytekiln")
    def _(job: Job) -> Any:
        t, ids = ours(job), ids_of(job)
        numbers = ids.tolist()
        return timed(lambda: t.decode_bytes(numbers))

    @contestant("decode", "bytekiln, an array", "bytekiln")
    def _(job: Job) -> Any:
        t, ids = ours(job), ids_of(job)
        return timed(lambda: t.decode_bytes(ids))

    @contestant("decode", "tiktoken")
    def _(job: Job) -> Any:
        from contestants import tiktoken_gpt2

        # It has no way of its own for arrays: number by number they take longer than a list.
        t, ids = tiktoken_gpt2(job), ids_of(job)
        numbers = ids.tolist()
        return timed(lambda: t.decode_bytes(numbers))

    def text_contest(call: Callable[..., Any], numbers: Any) -> Any:
        return timed(lambda: call(numbers))

    @contestant("decode-text", "bytekiln")
    def _(job: Job) -> Any:
        return text_contest(ours(job).decode, ids_of(job).tolist())

    @contestant("decode-text", "bytekiln, an array", "bytekiln")
    def _(job: Job) -> Any:
        return text_contest(ours(job).decode, ids_of(job))

    @contestant("decode-text", "tiktoken")
    def _(job: Job) -> Any:
        from contestants import tiktoken_gpt2

        return text_contest(tiktoken_gpt2(job).decode, ids_of(job).tolist())
