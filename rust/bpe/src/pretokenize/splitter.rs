//! A pattern and special tokens at work: text → pieces, at once or as it arrives, and where a stream may be cut.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};

use super::pattern::Pattern;
use super::policy::{TextPolicy, describe_invalid, first_invalid, replace_invalid_bytes};
use crate::error::{Error, Result};

/// A piece of the input, in order; the pieces of a text cover it completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'t> {
    /// A pre-token: merges happen inside it and never across its borders.
    Word(&'t [u8]),
    /// An occurrence of a special token, by its index in the list given to [`Splitter::new`].
    Special(usize),
}

/// Ends of words that follow each other without a gap, as places in their text: an iterator over them.
#[derive(Debug, Clone)]
pub struct Ends<'e> {
    /// Where the first word begins.
    pub start: usize,
    /// What to add to each of `offsets`.
    pub base: usize,
    /// Ascending.
    pub offsets: &'e [u32],
}

impl Ends<'_> {
    /// Where the last word ends.
    pub fn end(&self) -> usize {
        self.offsets.last().map_or(self.start, |&offset| self.base + offset as usize)
    }
}

impl Iterator for Ends<'_> {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let (first, rest) = self.offsets.split_first()?;
        self.offsets = rest;
        Some(self.base + *first as usize)
    }
}

/// What a text is split into, many words at a time.
#[derive(Debug, Clone)]
pub enum Run<'e> {
    /// Words that follow each other.
    Words(Ends<'e>),
    /// A special token, by its place in the splitter's list.
    Special(usize),
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

    /// The same pattern, for texts in which special tokens are ordinary text.
    #[must_use]
    pub fn without_specials(&self) -> Self {
        Self { pattern: self.pattern.clone(), specials: Vec::new(), matcher: None, longest_special: 0 }
    }

    /// Length of the longest special token; 0 where there is none.
    pub(crate) fn longest_special(&self) -> usize {
        self.longest_special
    }

    /// Start and end of every special token, and whether it ends documents: `<|endoftext|>`, else the only one.
    pub(crate) fn specials_in<'b>(&'b self, bytes: &'b [u8]) -> impl Iterator<Item = (usize, usize, bool)> + 'b {
        let named = self.specials.iter().position(|special| special == "<|endoftext|>");
        let ends = named.or((self.specials.len() == 1).then_some(0));
        let found = self.matcher.iter().flat_map(move |matcher| matcher.find_iter(bytes));
        found.map(move |m| (m.start(), m.end(), Some(m.pattern().as_usize()) == ends))
    }

    /// Calls `f` with every piece of `text`, in order.
    pub fn split<'t>(&self, text: &'t str, mut f: impl FnMut(Piece<'t>)) -> Result<()> {
        self.split_runs(text, |run| match run {
            Run::Words(ends) => {
                let mut start = ends.start;
                for end in ends {
                    f(Piece::Word(&text.as_bytes()[start..end]));
                    start = end;
                }
            }
            Run::Special(index) => f(Piece::Special(index)),
        })
    }

    /// The same without pieces: the ends of many words at a time.
    pub fn split_runs(&self, text: &str, mut f: impl FnMut(Run<'_>)) -> Result<()> {
        let part = |from: usize, to: usize, f: &mut dyn FnMut(Run<'_>)| {
            let mut start = from;
            self.pattern.ends(&text[from..to], &mut |base, offsets| {
                let ends = Ends { start, base: from + base, offsets };
                start = ends.end();
                f(Run::Words(ends));
            })
        };
        let mut start = 0;
        if let Some(matcher) = &self.matcher {
            for found in matcher.find_iter(text) {
                part(start, found.start(), &mut f)?;
                f(Run::Special(found.pattern().as_usize()));
                start = found.end();
            }
        }
        part(start, text.len(), &mut f)
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
                Err(Error::Text(format!("byte offset {at}: {}", describe_invalid(bytes, at, None))))
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

    /// The last place at which a stream may be cut so that both sides split as they would together.
    ///
    /// `bytes` begins at such a place; what follows it is not known yet. `None`: no place is certain so far.
    /// For a pattern of the user's nothing is known about its borders: only the ends of special tokens count.
    pub fn safe_cut(&self, bytes: &[u8]) -> Option<usize> {
        // A special token may begin before the end of `bytes` and end behind it.
        let decided = bytes.len().saturating_sub(self.longest_special.max(1) - 1);
        if self.pattern.is_custom() {
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
    held: String,
    /// Length at which looking for a border again is worth it: doubles after each vain search, so that the
    /// whole cost stays linear however small the parts are.
    try_at: usize,
}

impl SplitStream {
    /// Takes the next part; calls `f` with what it completes, and the text that this lies in.
    pub fn push(&mut self, splitter: &Splitter, part: &str, f: impl FnMut(&[u8], Run<'_>)) -> Result<()> {
        self.held.push_str(part);
        if self.held.len() < self.try_at {
            return Ok(());
        }
        let Some(cut) = splitter.safe_cut(self.held.as_bytes()) else {
            self.try_at = self.held.len() * 2;
            return Ok(());
        };
        let done = split_held(splitter, &self.held[..cut], f);
        self.held.drain(..cut);
        self.try_at = self.held.len() + self.held.len() / 2;
        done
    }

    /// The text has ended: calls `f` with the rest.
    pub fn finish(self, splitter: &Splitter, f: impl FnMut(&[u8], Run<'_>)) -> Result<()> {
        split_held(splitter, &self.held, f)
    }
}

fn split_held(splitter: &Splitter, held: &str, mut f: impl FnMut(&[u8], Run<'_>)) -> Result<()> {
    splitter.split_runs(held, |run| f(held.as_bytes(), run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        fn a_stream_splits_as_the_whole(
            text in tricky(),
            name in prop::sample::select(vec!["gpt2", "cl100k", "o200k", r"\w+|\W"]),
            sizes in prop::collection::vec(1usize..5, 1..6),
        ) {
            let specials = ["<|e|>".to_string(), "e|> <".into(), " a\n".into()];
            let splitter = Splitter::new(Pattern::new(name).unwrap().into(), &specials).unwrap();
            let mut whole = vec![];
            splitter.split(&text, |p| whole.push(match p {
                Piece::Word(w) => (w.to_vec(), 9),
                Piece::Special(i) => (vec![], i),
            })).unwrap();
            let own = |parts: &mut Vec<(Vec<u8>, usize)>, text: &[u8], run: Run<'_>| match run {
                Run::Special(i) => parts.push((vec![], i)),
                Run::Words(ends) => {
                    let mut start = ends.start;
                    for end in ends {
                        parts.push((text[start..end].to_vec(), 9));
                        start = end;
                    }
                }
            };
            let (mut parts, mut stream) = (vec![], SplitStream::default());
            let mut chars = text.chars();
            for size in sizes.iter().cycle() {
                let part: String = chars.by_ref().take(*size).collect();
                if part.is_empty() { break }
                stream.push(&splitter, &part, |text, run| own(&mut parts, text, run)).unwrap();
            }
            stream.finish(&splitter, |text, run| own(&mut parts, text, run)).unwrap();
            prop_assert_eq!(whole, parts);
        }
    }
}
