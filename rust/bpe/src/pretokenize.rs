//! Text → pre-tokens: the pieces inside which BPE merges.
//!
//! In: text or bytes, and the special tokens that cut it. Out: [`Piece`]s in order, which cover the input
//! completely. Called by `count` (training) and `encode`; `input` asks it where a stream may be cut.
//!
//! The GPT-2 pattern has a hand-written scanner, held against fancy-regex by property tests here and
//! against Python's `regex` on every code point by the Python tests. The other patterns run on fancy-regex.
//! A pattern need not cover the text: what lies between two matches is a piece of its own, so nothing is lost
//! (Hugging Face's `Split … isolated` does the same).

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use aho_corasick::{AhoCorasick, MatchKind};
use bytekiln_simd::Level;
use regex_syntax::hir::{Class, HirKind};

use crate::error::{Error, Result};
use crate::scan;

/// GPT-2's pattern, as OpenAI published it (contractions in tiktoken's shorter spelling).
pub const GPT2: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The same language as [`GPT2`] in the spelling of the original GPT-2 code.
const GPT2_LONG: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Pattern of `cl100k_base`.
pub const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
/// The same with `{1,3}` possessive, as tiktoken spells it. Nothing follows there, so possessive or not is one;
/// but Oniguruma, Hugging Face's engine, reads `{1,3}+` as a repeat of the repeat.
const CL100K_POSSESSIVE: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
/// Pattern of `o200k_base`.
pub const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Version of the Unicode tables behind every pattern (those of `regex-syntax`).
pub const UNICODE_VERSION: &str = "16.0.0";

/// A piece of the input, in order; the pieces of a text cover it completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'t> {
    /// A pre-token: merges happen inside it and never across its borders.
    Word(&'t [u8]),
    /// An occurrence of a special token, by its index in the list given to [`Splitter::new`].
    Special(usize),
}

/// What to do with bytes that are not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TextPolicy {
    /// Refuse, naming the byte offset.
    #[default]
    Error,
    /// Put U+FFFD in place of each maximal invalid sequence.
    Replace,
    /// Keep the bytes; pre-token borders fall where they would if each invalid byte were U+FFFD.
    Bytes,
}

impl TextPolicy {
    /// The policy of a name: `error`, `replace` or `bytes`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "error" => Ok(Self::Error),
            "replace" => Ok(Self::Replace),
            "bytes" => Ok(Self::Bytes),
            _ => Err(Error::Config(format!("errors: found {name:?}; expected error, replace or bytes"))),
        }
    }

    /// The policy's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Replace => "replace",
            Self::Bytes => "bytes",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Gpt2,
    Cl100k,
    O200k,
    Custom,
}

impl Kind {
    /// What a name or a regular expression means: a named pattern's text is that pattern.
    fn of(name_or_regex: &str) -> Self {
        match name_or_regex {
            "gpt2" | GPT2 | GPT2_LONG => Self::Gpt2,
            "cl100k" | CL100K | CL100K_POSSESSIVE => Self::Cl100k,
            "o200k" | O200K => Self::O200k,
            _ => Self::Custom,
        }
    }

    fn name(self) -> Option<&'static str> {
        match self {
            Self::Gpt2 => Some("gpt2"),
            Self::Cl100k => Some("cl100k"),
            Self::O200k => Some("o200k"),
            Self::Custom => None,
        }
    }
}

/// The one name of a pattern, however it was spelled: `gpt2`, `cl100k`, `o200k` or the regular expression.
pub fn canonical_name(name_or_regex: &str) -> &str {
    Kind::of(name_or_regex).name().unwrap_or(name_or_regex)
}

/// A pre-tokenization pattern, ready to run.
#[derive(Debug)]
pub struct Pattern {
    kind: Kind,
    source: String,
    /// None where a hand-written scanner does the work.
    regex: Option<fancy_regex::Regex>,
    level: Level,
}

impl Pattern {
    /// A pattern by name (`gpt2`, `cl100k`, `o200k`) or as a regular expression of the fancy-regex dialect.
    pub fn new(name_or_regex: &str) -> Result<Self> {
        if name_or_regex.is_empty() {
            let what = "pattern: found an empty one; expected gpt2, cl100k, o200k or a regular expression";
            return Err(Error::Config(what.into()));
        }
        let kind = Kind::of(name_or_regex);
        let source = match kind {
            Kind::Gpt2 => GPT2,
            Kind::Cl100k => CL100K,
            Kind::O200k => O200K,
            Kind::Custom => name_or_regex,
        };
        let compile = || {
            fancy_regex::Regex::new(source).map_err(|e| {
                Error::Config(format!("pattern {source:?}: {e}; expected gpt2, cl100k, o200k or a regular expression"))
            })
        };
        let regex = if kind == Kind::Gpt2 { None } else { Some(compile()?) };
        let level = Level::of_process().map_err(Error::Config)?;
        Ok(Self { kind, source: source.into(), regex, level })
    }

    /// `gpt2`, `cl100k`, `o200k`, or the regular expression itself.
    pub fn name(&self) -> &str {
        canonical_name(&self.source)
    }

    /// The regular expression.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Calls `f` with the end of each pre-token of `text`, ascending; the last end is `text.len()`.
    fn for_each_end(&self, text: &str, f: impl FnMut(usize)) -> Result<()> {
        if let Some(regex) = &self.regex {
            return regex_ends(regex, text, f);
        }
        gpt2_ends(self.level, text.as_bytes(), f);
        Ok(())
    }

    /// Whether a border between pre-tokens is certain before `bytes[at]`, whatever comes before and after.
    ///
    /// Proof for the named patterns. Let `c` be the character before and `w = bytes[at]` an ASCII white space.
    /// `c` is not white space, so no alternative that matches `c` goes on over `w`, but for the
    /// `[\r\n/]*` after punctuation in cl100k and o200k; hence there a line break needs a letter or a number
    /// before it. On the left the look-ahead `(?!\S)` is not reached, as the text ends in a character that is
    /// not white space; on the right no pattern looks behind.
    fn border_is_certain(&self, bytes: &[u8], at: usize) -> bool {
        let breaks_line = match bytes[at] {
            b' ' | b'\t' => false,
            b'\n' | b'\r' => true,
            _ => return false,
        };
        let before = class_before(bytes, at);
        match self.kind {
            Kind::Cl100k | Kind::O200k if breaks_line => before == LETTER || before == NUMBER,
            Kind::Gpt2 | Kind::Cl100k | Kind::O200k => before != SPACE,
            Kind::Custom => false,
        }
    }
}

/// Ends of the pieces that a regular expression makes: its matches, and what lies between them.
fn regex_ends(regex: &fancy_regex::Regex, text: &str, mut f: impl FnMut(usize)) -> Result<()> {
    let mut end = 0;
    for found in regex.find_iter(text) {
        let found = found.map_err(|e| {
            let what = format!("byte offset {end} or behind: {e}; expected text that the pattern can be matched on");
            Error::Text(what)
        })?;
        if found.start() > end {
            f(found.start());
        }
        if found.end() > found.start() {
            end = found.end();
            f(end);
        }
    }
    if end < text.len() {
        f(text.len());
    }
    Ok(())
}

/// A pattern together with the special tokens that cut the text before it runs.
#[derive(Debug)]
pub struct Splitter {
    pattern: Arc<Pattern>,
    specials: Vec<String>,
    matcher: Option<AhoCorasick>,
    longest_special: usize,
}

impl Splitter {
    /// Special tokens are found leftmost first, the longest at each place.
    pub fn new(pattern: Arc<Pattern>, specials: &[String]) -> Result<Self> {
        let matcher = if specials.is_empty() {
            None
        } else {
            let built = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(specials);
            Some(built.map_err(|e| Error::Config(format!("special tokens: {e}; expected fewer or shorter ones")))?)
        };
        let longest_special = specials.iter().map(String::len).max().unwrap_or(0);
        Ok(Self { pattern, specials: specials.to_vec(), matcher, longest_special })
    }

    /// The pattern.
    pub fn pattern(&self) -> &Arc<Pattern> {
        &self.pattern
    }

    /// The special tokens, in the order of [`Piece::Special`]'s indices.
    pub fn specials(&self) -> &[String] {
        &self.specials
    }

    /// Calls `f` with every piece of `text`, in order.
    pub fn split<'t>(&self, text: &'t str, mut f: impl FnMut(Piece<'t>)) -> Result<()> {
        let mut start = 0;
        if let Some(matcher) = &self.matcher {
            for found in matcher.find_iter(text) {
                self.words(&text[start..found.start()], &mut f)?;
                f(Piece::Special(found.pattern().as_usize()));
                start = found.end();
            }
        }
        self.words(&text[start..], &mut f)
    }

    /// Calls `f` with every piece of `bytes`, treating what is not UTF-8 by `policy`.
    ///
    /// # Errors
    /// [`Error::Text`] for invalid UTF-8 under [`TextPolicy::Error`]; the offset is relative to `bytes`.
    pub fn split_bytes(&self, bytes: &[u8], policy: TextPolicy, mut f: impl FnMut(Piece<'_>)) -> Result<()> {
        if let Ok(text) = simdutf8::basic::from_utf8(bytes) {
            return self.split(text, f);
        }
        match policy {
            TextPolicy::Error => {
                let at = first_invalid(bytes).unwrap_or(0);
                Err(Error::Text(format!("byte offset {at}: {}", describe_invalid(bytes, at))))
            }
            TextPolicy::Replace => self.split(&String::from_utf8_lossy(bytes), f),
            TextPolicy::Bytes => {
                let (stand_in, origin) = replace_invalid_bytes(bytes);
                let (mut at, mut from) = (0, 0);
                self.split(&stand_in, |piece| match piece {
                    Piece::Special(i) => {
                        at += self.specials[i].len();
                        from = origin.of(at);
                        f(piece);
                    }
                    Piece::Word(word) => {
                        at += word.len();
                        let to = origin.of(at);
                        f(Piece::Word(&bytes[from..to]));
                        from = to;
                    }
                })
            }
        }
    }

    fn words<'t>(&self, text: &'t str, f: &mut impl FnMut(Piece<'t>)) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let mut start = 0;
        self.pattern.for_each_end(text, |end| {
            f(Piece::Word(&text.as_bytes()[start..end]));
            start = end;
        })
    }

    /// The last place at which a stream may be cut so that both sides split as they would together.
    ///
    /// `bytes` begins at such a place; what follows it is not known yet. `None`: no place is certain so far.
    /// For a pattern of the user's nothing is known about its borders: only the ends of special tokens count.
    pub fn safe_cut(&self, bytes: &[u8]) -> Option<usize> {
        // A special token may begin before the end of `bytes` and end behind it.
        let decided = bytes.len().saturating_sub(self.longest_special.max(1) - 1);
        if self.pattern.kind == Kind::Custom {
            let found = self.matcher.as_ref()?.find_iter(bytes);
            // A longer special token might still begin at the same place.
            let certain = found.take_while(|m| m.start() + self.longest_special <= bytes.len());
            return certain.last().map(|m| m.end());
        }
        (1..decided).rev().find(|&at| self.pattern.border_is_certain(bytes, at) && !self.special_spans(bytes, at))
    }

    /// Whether an occurrence of a special token begins before `at` and ends behind it.
    fn special_spans(&self, bytes: &[u8], at: usize) -> bool {
        self.specials.iter().any(|special| {
            let special = special.as_bytes();
            (1..special.len().min(at + 1))
                .any(|inside| special[inside] == bytes[at] && bytes[at - inside..].starts_with(special))
        })
    }
}

/// Splits a text that arrives in parts, exactly as [`Splitter::split`] splits the whole.
///
/// What cannot be decided yet is held back: the text from the last certain border on.
#[derive(Debug, Default)]
pub struct SplitStream {
    held: Vec<u8>,
    /// Length at which looking for a border again is worth it: doubles after each vain search, so that the
    /// whole cost stays linear however small the parts are.
    try_at: usize,
}

impl SplitStream {
    /// Takes the next part; calls `f` with the pieces that it completes.
    pub fn push(&mut self, splitter: &Splitter, part: &str, f: impl FnMut(Piece<'_>)) -> Result<()> {
        self.held.extend_from_slice(part.as_bytes());
        if self.held.len() < self.try_at {
            return Ok(());
        }
        let Some(cut) = splitter.safe_cut(&self.held) else {
            self.try_at = self.held.len() * 2;
            return Ok(());
        };
        let done = splitter.split_bytes(&self.held[..cut], TextPolicy::Error, f);
        self.held.drain(..cut);
        self.try_at = self.held.len() + self.held.len() / 2;
        done
    }

    /// The text has ended: calls `f` with the remaining pieces.
    pub fn finish(self, splitter: &Splitter, f: impl FnMut(Piece<'_>)) -> Result<()> {
        splitter.split_bytes(&self.held, TextPolicy::Error, f)
    }
}

/// Offset of the first byte that is not part of valid UTF-8.
pub fn first_invalid(bytes: &[u8]) -> Option<usize> {
    simdutf8::compat::from_utf8(bytes).err().map(|e| e.valid_up_to())
}

/// What stands at an invalid place, and the ways out.
pub fn describe_invalid(bytes: &[u8], at: usize) -> String {
    format!(
        "invalid UTF-8 (byte 0x{:02x}); expected UTF-8 text, or choose errors=\"replace\" or \"bytes\" (--errors)",
        bytes[at]
    )
}

/// Where the borders of a stand-in text lie in the bytes that it stands for.
struct Origin {
    /// (offset in the stand-in, offset in the original) after each invalid byte, ascending.
    steps: Vec<(usize, usize)>,
}

impl Origin {
    fn of(&self, at: usize) -> usize {
        let step = self.steps.partition_point(|&(stand_in, _)| stand_in <= at);
        let (stand_in, original) = if step == 0 { (0, 0) } else { self.steps[step - 1] };
        original + (at - stand_in)
    }
}

fn replace_invalid_bytes(bytes: &[u8]) -> (String, Origin) {
    let (mut text, mut steps, mut original) = (String::new(), Vec::new(), 0);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        original += chunk.valid().len();
        for _ in chunk.invalid() {
            text.push(char::REPLACEMENT_CHARACTER);
            original += 1;
            steps.push((text.len(), original));
        }
    }
    (text, Origin { steps })
}

/// Classes of characters that the GPT-2 pattern tells apart, two bits each.
const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3;

const ASCII_CLASS: [u8; 128] = {
    let mut table = [OTHER; 128];
    let mut i = 0;
    while i < 128 {
        let b = i as u8;
        table[i] = match b {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b'\t'..=b'\r' | b' ' => SPACE,
            _ => OTHER,
        };
        i += 1;
    }
    table
};

/// Class of every code point, four a byte (272 KiB, most of which stays untouched zero pages).
fn classes() -> &'static [u8] {
    static CLASSES: OnceLock<Vec<u8>> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut table = vec![0u8; 0x11_0000 / 4];
        for (class, name) in [(LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")] {
            let Ok(hir) = regex_syntax::parse(name) else { continue };
            let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else { continue };
            for range in ranges.ranges() {
                for c in u32::from(range.start())..=u32::from(range.end()) {
                    table[c as usize / 4] |= class << (2 * (c % 4));
                }
            }
        }
        table
    })
}

#[inline]
fn class_of(table: &[u8], c: u32) -> u8 {
    (table[c as usize / 4] >> (2 * (c % 4))) & 3
}

/// The character at `at` of valid UTF-8: class and length in bytes.
#[inline]
fn class_at(table: &[u8], b: &[u8], at: usize) -> (u8, usize) {
    let lead = b[at];
    let low = |i: usize| u32::from(b[at + i] & 0x3f);
    match lead {
        0..=0x7f => (ASCII_CLASS[lead as usize], 1),
        0x80..=0xdf => (class_of(table, u32::from(lead & 0x1f) << 6 | low(1)), 2),
        0xe0..=0xef => (class_of(table, u32::from(lead & 0x0f) << 12 | low(1) << 6 | low(2)), 3),
        _ => {
            let c = u32::from(lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3);
            (class_of(table, c), 4)
        }
    }
}

/// Class of the character that ends before `at`; what is not UTF-8 counts as [`OTHER`], as U+FFFD does.
fn class_before(bytes: &[u8], at: usize) -> u8 {
    let last = bytes[at - 1];
    if last < 0x80 {
        return ASCII_CLASS[last as usize];
    }
    let tail: Cow<'_, str> = String::from_utf8_lossy(&bytes[at.saturating_sub(4)..at]);
    tail.chars().next_back().map_or(OTHER, |c| class_of(classes(), u32::from(c)))
}

/// The GPT-2 pattern by hand, over valid UTF-8: calls `f` with the end of each pre-token.
fn gpt2_ends(level: Level, b: &[u8], mut f: impl FnMut(usize)) {
    let table = classes();
    scan::ends(level, b, |at| gpt2_end(table, b, at), |ends| ends.iter().for_each(|&end| f(end)));
}

/// End of the pre-token that begins at `at < b.len()`. The alternatives stand in the order of the pattern.
#[inline]
fn gpt2_end(table: &[u8], b: &[u8], at: usize) -> usize {
    // '(?:[sdmt]|ll|ve|re)
    if b[at] == b'\'' {
        match b.get(at + 1) {
            Some(b's' | b'd' | b'm' | b't') => return at + 2,
            Some(b'l') if b.get(at + 2) == Some(&b'l') => return at + 3,
            Some(b'v' | b'r') if b.get(at + 2) == Some(&b'e') => return at + 3,
            _ => {}
        }
    }
    let (mut class, mut len) = class_at(table, b, at);
    let mut end = at + len;
    // ` ?` before letters, numbers or others
    if b[at] == b' ' && end < b.len() {
        let next = class_at(table, b, end);
        if next.0 != SPACE {
            (class, len) = next;
            end += len;
        }
    }
    // [class]+ ; `last` is where the last character of the run begins (white space alone asks for it). ASCII,
    // nearly always, needs no decoding.
    let mut last = end - len;
    if class == LETTER {
        end += ascii_letters(&b[end..]);
    }
    while let Some(&byte) = b.get(end) {
        let (next, len) = if byte < 0x80 { (ASCII_CLASS[byte as usize], 1) } else { class_at(table, b, end) };
        if next != class {
            break;
        }
        last = end;
        end += len;
    }
    // \s+(?!\S)|\s+ : before something that is not white space a run leaves its last character out
    if class == SPACE && end < b.len() && last > at { last } else { end }
}

/// Number of ASCII letters at the beginning of `b`, eight bytes at a time: one jump a word instead of one a letter.
#[inline]
fn ascii_letters(b: &[u8]) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const TOP: u64 = 0x80 * EACH;
    let mut run = 0;
    for chunk in b.as_chunks().0 {
        let x = u64::from_le_bytes(*chunk);
        // Lower case, top bits cleared, so that no sum below carries into the next byte.
        let lower = (x | (0x20 * EACH)) & !TOP;
        let from_a = lower + (0x80 - 0x61) * EACH;
        let past_z = lower + (0x80 - 0x7b) * EACH;
        let others = !(from_a & !past_z & !x) & TOP;
        if others != 0 {
            return run + others.trailing_zeros() as usize / 8;
        }
        run += 8;
    }
    run + b[run..].iter().take_while(|c| c.is_ascii_alphabetic()).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn letters_are_counted_as_one_by_one() {
        for byte in 0..=255u8 {
            for at in 0..20 {
                let mut b = *b"abcxyzABCXYZmnopqrst";
                b[at] = byte;
                let expected = b.iter().take_while(|c| c.is_ascii_alphabetic()).count();
                assert_eq!(ascii_letters(&b), expected, "{byte:#x} at {at}");
            }
        }
    }

    fn ends(pattern: &Pattern, text: &str) -> Vec<usize> {
        let mut out = vec![];
        pattern.for_each_end(text, |e| out.push(e)).unwrap();
        out
    }

    fn reference(regex: &fancy_regex::Regex, text: &str) -> Vec<usize> {
        let mut out = vec![];
        regex_ends(regex, text, |e| out.push(e)).unwrap();
        out
    }

    /// Text dense in what the patterns tell apart.
    pub(crate) fn tricky() -> impl Strategy<Value = String> {
        prop::collection::vec(
            prop_oneof![
                Just(" ".to_string()),
                Just("  ".into()),
                Just("\n".into()),
                Just("\r\n".into()),
                Just("\t".into()),
                Just("\u{a0}".into()),
                Just("\u{3000}".into()),
                Just("\u{85}".into()),
                Just("'".into()),
                Just("'s".into()),
                Just("'ll".into()),
                Just("'RE".into()),
                Just("'r".into()),
                Just("ſ".into()),
                Just("don't".into()),
                Just("12345".into()),
                Just("²".into()),
                Just("Ⅷ".into()),
                Just("é".into()),
                Just("e\u{301}".into()),
                Just("日本".into()),
                Just("🧑‍🚀".into()),
                Just("!?".into()),
                Just("/".into()),
                Just("Ab".into()),
                Just("<|e|>".into()),
                any::<char>().prop_map(String::from),
                "[a-zA-Z]{1,4}",
            ],
            0..24,
        )
        .prop_map(|parts| parts.concat())
    }

    #[test]
    fn scanner_equals_the_pattern_on_every_code_point_in_context() {
        let (pattern, regex) = (Pattern::new("gpt2").unwrap(), fancy_regex::Regex::new(GPT2_LONG).unwrap());
        for c in (0..=0x10_ffffu32).filter_map(char::from_u32) {
            let text = format!("a{c}b {c}1{c} {c}{c}\n{c} '{c}s  {c}");
            assert_eq!(ends(&pattern, &text), reference(&regex, &text), "{c:?}");
        }
    }

    /// Ends by the scalar scanner alone.
    fn one_by_one(text: &str) -> Vec<usize> {
        let (mut at, mut out) = (0, vec![]);
        while at < text.len() {
            at = gpt2_end(classes(), text.as_bytes(), at);
            out.push(at);
        }
        out
    }

    fn by_blocks(level: Level, text: &str) -> Vec<usize> {
        let mut out = vec![];
        gpt2_ends(level, text.as_bytes(), |end| out.push(end));
        out
    }

    fn levels() -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(|level| level.is_here())
    }

    #[test]
    fn blocks_equal_the_scalar_scanner_wherever_a_character_stands_in_them() {
        let padding = "the quick brown fox, 12 of them, jumps over a lazy dog; and so on, it's said";
        let contexts = |c: char| {
            [format!("a{c}b {c}1{c} {c}{c}"), format!("\n{c} '{c}s  {c}'l{c}l"), format!("'v{c} {c}'re '{c}d")]
        };
        for shift in 0..66 {
            for c in ('\0'..='\u{7f}').chain(['é', '\u{85}', '\u{a0}', '日', '🧑']) {
                for context in contexts(c) {
                    let text = format!("{}{context}{padding}", &padding[..shift]);
                    for level in levels() {
                        assert_eq!(by_blocks(level, &text), one_by_one(&text), "{level:?}: {text:?}");
                    }
                }
            }
        }
        for c in (0..=0x10_ffffu32).filter_map(char::from_u32) {
            let text = format!("{}{}{padding}", &padding[..40], contexts(c)[1]);
            for level in levels() {
                assert_eq!(by_blocks(level, &text), one_by_one(&text), "{level:?}: {c:?}");
            }
        }
    }

    #[test]
    fn gaps_of_a_pattern_are_pieces() {
        let splitter = Splitter::new(Pattern::new("[a-z]+").unwrap().into(), &[]).unwrap();
        let mut out = vec![];
        splitter.split("ab12cd3", |p| out.push(p)).unwrap();
        assert_eq!(out, [b"ab".as_slice(), b"12", b"cd", b"3"].map(Piece::Word));
    }

    #[test]
    fn the_longest_special_token_wins_and_none_is_merged() {
        let specials = ["<|a|>".to_string(), "<|a|><|b|>".into()];
        let splitter = Splitter::new(Pattern::new("gpt2").unwrap().into(), &specials).unwrap();
        let mut out = vec![];
        splitter.split("x<|a|><|b|><|a|><|a|>y", |p| out.push(p)).unwrap();
        let (x, y) = (Piece::Word(b"x"), Piece::Word(b"y"));
        assert_eq!(out, [x, Piece::Special(1), Piece::Special(0), Piece::Special(0), y]);
    }

    #[test]
    fn bytes_policy_keeps_bytes_and_falls_where_replacement_characters_would() {
        let splitter = Splitter::new(Pattern::new("gpt2").unwrap().into(), &["<|e|>".into()]).unwrap();
        let bytes = b"ab\xff\xfe c<|e|>\xe2\x82 d\xc3";
        let mut out = vec![];
        splitter
            .split_bytes(bytes, TextPolicy::Bytes, |p| {
                out.push(match p {
                    Piece::Word(w) => w.to_vec(),
                    Piece::Special(_) => b"!".to_vec(),
                });
            })
            .unwrap();
        assert_eq!(out, [b"ab".as_slice(), b"\xff\xfe", b" c", b"!", b"\xe2\x82", b" d", b"\xc3"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn blocks_equal_the_scalar_scanner(parts in prop::collection::vec(prop_oneof![
            "[a-zA-Z]{1,9}", "'(s|d|m|t|ll|ve|re|l|v|r|x|')", " {1,3}", "[\t\n ]{1,4}", "[0-9]{1,5}", "[!-/]{1,4}", "[ '\n]{1,3}",
            "[a-z]{40,90}", "[\n ]{40,70}", "[^a-z]{1,2}",
        ], 0..60)) {
            let text = parts.concat();
            for level in levels() {
                prop_assert_eq!(by_blocks(level, &text), one_by_one(&text), "{:?}", level);
            }
        }

        #[test]
        fn scanner_equals_the_pattern(text in tricky()) {
            let (pattern, regex) = (Pattern::new("gpt2").unwrap(), fancy_regex::Regex::new(GPT2).unwrap());
            prop_assert_eq!(ends(&pattern, &text), reference(&regex, &text));
        }

        #[test]
        fn a_stream_splits_as_the_whole(
            text in tricky(),
            name in prop::sample::select(vec!["gpt2", "cl100k", "o200k", r"\w+|\W"]),
            sizes in prop::collection::vec(1usize..5, 1..6),
        ) {
            let specials = ["<|e|>".to_string(), "e|> <".into(), " a\n".into()];
            let splitter = Splitter::new(Pattern::new(name).unwrap().into(), &specials).unwrap();
            let own = |p: Piece<'_>| match p {
                Piece::Word(w) => (w.to_vec(), 9),
                Piece::Special(i) => (vec![], i),
            };
            let mut whole = vec![];
            splitter.split(&text, |p| whole.push(own(p))).unwrap();
            let (mut parts, mut stream) = (vec![], SplitStream::default());
            let mut chars = text.chars();
            for size in sizes.iter().cycle() {
                let part: String = chars.by_ref().take(*size).collect();
                if part.is_empty() { break }
                stream.push(&splitter, &part, |p| parts.push(own(p))).unwrap();
            }
            stream.finish(&splitter, |p| parts.push(own(p))).unwrap();
            prop_assert_eq!(whole, parts);
        }
    }
}
