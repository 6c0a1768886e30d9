"""The published word-level sets: what is in them, and where a copy is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from equilibria.core.errors import UserError, nearest


@dataclass(frozen=True)
class KnownText:
    """A published set.

    Args:
        name: what it is called here.
        title: what it is called.
        num_tokens: of every split, with one `<eos>` per line.
        num_words: size of the vocabulary, `<eos>` included.
        digests: SHA-256 of the words of splits, with one blank between words and one line feed
            after every line, so that copies with other white space agree; where a copy was at
            hand to take it from.
        hub: repository and configuration on the Hugging Face hub.
        revision: of that repository; None for the newest.
        column: where the text is in a row, one row per line.
        licence: under which it may be used.
        layout: the names of its files.
    """

    name: str
    title: str
    num_tokens: dict[str, int]
    num_words: int
    hub: tuple[str, str]
    column: str
    licence: str
    layout: str
    revision: str | None = None
    digests: dict[str, str] = field(default_factory=dict[str, str])


_WIKITEXT_EVALUATION = {"valid": 217_646, "test": 245_569}
"""The same text in both sets, with other words replaced as rare."""

KNOWN_TEXTS: dict[str, KnownText] = {
    text.name: text
    for text in (
        KnownText(
            name="ptb",
            title="Penn Treebank, Mikolov's preprocessing",
            num_tokens={"train": 929_589, "valid": 73_760, "test": 82_430},
            num_words=10_000,
            hub=("ptb-text-only/ptb_text_only", "penn_treebank"),
            # The repository itself is a script, which the library no longer runs; the hub keeps
            # this conversion of it.
            revision="refs/convert/parquet",
            column="sentence",
            licence="for research",
            layout="ptb.{}.txt",
            digests={
                "train": "5145926136ee9aef6f359b267ac09cc8a920879cd71725de17c490dd111d2998",
                "valid": "fadf6277290823f881b7bf39b84e88536c87a859cd629dcfd1d2dfdef06097cf",
                "test": "c2f8c16a611595d31da5acdb7a61d50e7d5e95f6b9c05fceda5f5ddc4383e791",
            },
        ),
        KnownText(
            name="wikitext-2",
            title="WikiText-2, word level",
            num_tokens={"train": 2_088_628, **_WIKITEXT_EVALUATION},
            num_words=33_278,
            hub=("Salesforce/wikitext", "wikitext-2-v1"),
            column="text",
            licence="CC BY-SA",
            layout="wiki.{}.tokens",
            digests={
                "train": "f7ee69acf5cc3fd2321929d3e32dd6defd8199abe0cb95063b2b9f092584f96f",
                "valid": "4427e8fc24d5ceaaff4f1d9ee42f4e82172572b107d6a4e1f32d84fa7913c3ff",
                "test": "f68796e87c3250872a5a82da5027c4f75494ca617fbad67e36acce8a057ff3e8",
            },
        ),
        KnownText(
            name="wikitext-103",
            title="WikiText-103, word level",
            num_tokens={"train": 103_227_021, **_WIKITEXT_EVALUATION},
            num_words=267_735,
            hub=("Salesforce/wikitext", "wikitext-103-v1"),
            column="text",
            licence="CC BY-SA",
            layout="wiki.{}.tokens",
            digests={
                "valid": "457c37cc16b260d7052de1cc82854038ea655c4b281277a6d57dfd353d208bbb",
                "test": "d60a1c910b4ed1cd5fcba38f3aa51a8dada0b15b8787a2bf85d78eff346696c7",
            },
        ),
    )
}


def known_text(name: str) -> KnownText:
    """The set of that name.

    Raises:
        UserError: there is none.
    """
    if name not in KNOWN_TEXTS:
        raise UserError(
            f"no set of texts is called {name!r}{nearest(name, KNOWN_TEXTS)} (there are: "
            f"{', '.join(KNOWN_TEXTS)}; for one of your own give its folder)"
        )
    return KNOWN_TEXTS[name]
