"""Which script (Latin, Han, …) a character belongs to, by the Unicode tables of the core's regular expressions.

In: code points. Out: a number a script for each. Python's `unicodedata` has names of characters but no scripts, and a
table of our own would age; `\\p{Script=…}` of the core (regex-syntax, Unicode `_core.UNICODE_VERSION`) is there already
and is the one that the tokenizers' own patterns go by. Called by `inspect.compression`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from bytekiln.tokenizer import Tokenizer

NAMES = (
    # The usual ones first: the search ends once every character is found.
    "Common Latin Inherited Han Cyrillic Greek Arabic Hebrew Devanagari Hiragana Katakana Hangul Thai Bengali Tamil "
    "Telugu Armenian Georgian Gujarati Gurmukhi Kannada Khmer Lao Malayalam Myanmar Oriya Sinhala Tibetan Ethiopic "
    "Adlam Ahom Anatolian_Hieroglyphs Avestan Balinese Bamum Bassa_Vah Batak Bhaiksuki Bopomofo Brahmi Braille "
    "Buginese Buhid Canadian_Aboriginal Carian Caucasian_Albanian Chakma Cham Cherokee Chorasmian Coptic Cuneiform "
    "Cypriot Cypro_Minoan Deseret Dives_Akuru Dogra Duployan Egyptian_Hieroglyphs Elbasan Elymaic Garay Glagolitic "
    "Gothic Grantha Gunjala_Gondi Gurung_Khema Hanifi_Rohingya Hanunoo Hatran Imperial_Aramaic Inscriptional_Pahlavi "
    "Inscriptional_Parthian Javanese Kaithi Kawi Kayah_Li Kharoshthi Khitan_Small_Script Khojki Khudawadi Kirat_Rai "
    "Lepcha Limbu Linear_A Linear_B Lisu Lycian Lydian Mahajani Makasar Mandaic Manichaean Marchen Masaram_Gondi "
    "Medefaidrin Meetei_Mayek Mende_Kikakui Meroitic_Cursive Meroitic_Hieroglyphs Miao Modi Mongolian Mro Multani "
    "Nabataean Nag_Mundari Nandinagari New_Tai_Lue Newa Nko Nushu Nyiakeng_Puachue_Hmong Ogham Ol_Chiki Ol_Onal "
    "Old_Hungarian Old_Italic Old_North_Arabian Old_Permic Old_Persian Old_Sogdian Old_South_Arabian Old_Turkic "
    "Old_Uyghur Osage Osmanya Pahawh_Hmong Palmyrene Pau_Cin_Hau Phags_Pa Phoenician Psalter_Pahlavi Rejang Runic "
    "Samaritan Saurashtra Sharada Shavian Siddham SignWriting Sogdian Sora_Sompeng Soyombo Sundanese Sunuwar "
    "Syloti_Nagri Syriac Tagalog Tagbanwa Tai_Le Tai_Tham Tai_Viet Takri Tangsa Tangut Thaana Tifinagh Tirhuta Todhri "
    "Toto Tulu_Tigalari Ugaritic Vai Vithkuqi Wancho Warang_Citi Yezidi Yi Zanabazar_Square"
).split()
"""Unicode's long names of scripts; tests hold them against the core and against another table."""
COMMON, INHERITED = NAMES.index("Common"), NAMES.index("Inherited")
UNKNOWN, BROKEN = len(NAMES), len(NAMES) + 1
"""Code points without a script, and bytes that are no UTF-8 (lone surrogates stand for them)."""
LABELS = [*(n.replace("_", " ") for n in NAMES), "Unknown", "no UTF-8"]
_NOT_ASKED = 255


class ScriptTable:
    """Scripts of the code points that were asked for so far; a megabyte.

    >>> table = ScriptTable()
    >>> [LABELS[i] for i in table.of(np.array([ord(c) for c in "aя漢 "]))]
    ['Latin', 'Cyrillic', 'Han', 'Common']
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._of = np.full(sys.maxunicode + 1, _NOT_ASKED, dtype=np.uint8)
        self._of[0xD800:0xE000] = BROKEN

    def of(self, code_points: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Numbers in `LABELS`; new code points cost milliseconds, however many."""
        found: NDArray[np.uint8] = self._of[code_points]
        if (new := found == _NOT_ASKED).any():
            self._learn(np.unique(code_points[new]).tolist())
            found = self._of[code_points]
        return found

    def _learn(self, code_points: Iterable[int]) -> None:
        left = [chr(c) for c in code_points]
        for number, name in enumerate(NAMES):
            if not left:
                return
            inside = _matching(name, left)
            self._of[[ord(c) for c in inside]] = number
            left = [c for c in left if c not in inside]
        self._of[[ord(c) for c in left]] = UNKNOWN


def _matching(script: str, characters: list[str]) -> set[str]:
    """Those of a script. Two separators behind each character, of another script, make what does not match longer than
    one character: pre-tokens of one are the matches."""
    separators = "aa" if script == "Common" else "\0\0"
    letters = {i: bytes([i]) for i in range(256)}
    cutter = Tokenizer.from_vocab_and_merges(letters, [], pattern=rf"\p{{Script={script}}}")
    return {piece for piece in cutter.pretokenize(separators.join(["", *characters, ""])) if len(piece) == 1}
