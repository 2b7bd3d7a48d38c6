//! Patterns: their names, their text, and what runs them.
//!
//! In: a name or a regular expression. Out: a [`Pattern`], which finds the ends of pre-tokens and knows where a stream
//! may be cut. The named ones run on the scanners of `scan`, a user's own on fancy-regex. Called by `splitter`.

use bytekiln_simd::Level;

use crate::error::{Error, Result};
use crate::scan::Scanner;
use crate::scan::classes::{Class, classes};

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
    engine: Engine,
}

/// What finds the borders.
#[derive(Debug)]
enum Engine {
    Scanner(Scanner, Level),
    Regex(fancy_regex::Regex),
}

impl Pattern {
    /// A pattern by name (`gpt2`, `cl100k`, `o200k`) or as a regular expression of the fancy-regex dialect.
    pub fn new(name_or_regex: &str) -> Result<Self> {
        Self::at_level(name_or_regex, Level::of_process().map_err(Error::Config)?)
    }

    /// The same with the instructions of a level: for tests and benches.
    ///
    /// # Panics
    /// The processor does not have them.
    pub fn at_level(name_or_regex: &str, level: Level) -> Result<Self> {
        assert!(level.is_here(), "{}: found on a processor without it", level.name());
        if name_or_regex.is_empty() {
            let what = "pattern: found an empty one; expected gpt2, cl100k, o200k or a regular expression";
            return Err(Error::Config(what.into()));
        }
        let kind = Kind::of(name_or_regex);
        let (source, engine) = match kind {
            Kind::Gpt2 => (GPT2, Engine::Scanner(Scanner::Gpt2, level)),
            Kind::Cl100k => (CL100K, Engine::Scanner(Scanner::Cl100k, level)),
            Kind::O200k => (O200K, Engine::Scanner(Scanner::O200k, level)),
            Kind::Custom => {
                let regex = fancy_regex::Regex::new(name_or_regex).map_err(|e| {
                    let expected = "expected gpt2, cl100k, o200k or a regular expression";
                    Error::Config(format!("pattern {name_or_regex:?}: {e}; {expected}"))
                })?;
                (name_or_regex, Engine::Regex(regex))
            }
        };
        Ok(Self { kind, source: source.into(), engine })
    }

    /// `gpt2`, `cl100k`, `o200k`, or the regular expression itself.
    pub fn name(&self) -> &str {
        canonical_name(&self.source)
    }

    /// The regular expression.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it is none of the named ones.
    pub(crate) fn is_custom(&self) -> bool {
        self.kind == Kind::Custom
    }

    /// Calls `f` with the ends of the pre-tokens of `text`, ascending, many at a time: a base, and what to add to it for
    /// each end. The last end is `text.len()`.
    pub(super) fn ends(&self, text: &str, f: &mut dyn FnMut(usize, &[u32])) -> Result<()> {
        match &self.engine {
            Engine::Scanner(scanner, level) => {
                scanner.ends(*level, text.as_bytes(), f);
                Ok(())
            }
            Engine::Regex(regex) => regex_ends(regex, text, |end| f(end, &[0])),
        }
    }

    /// Whether a border between pre-tokens is certain before `bytes[at]`, whatever comes before and after.
    ///
    /// Proof for the named patterns. Let `c` be the character before and `w = bytes[at]` an ASCII white space.
    /// `c` is not white space, so no alternative that matches `c` goes on over `w`, but for the
    /// `[\r\n/]*` after punctuation in cl100k and o200k; hence there a line break needs a letter or a number
    /// before it. On the left the look-ahead `(?!\S)` is not reached, as the text ends in a character that is
    /// not white space; on the right no pattern looks behind.
    pub(super) fn border_is_certain(&self, bytes: &[u8], at: usize) -> bool {
        let breaks_line = match bytes[at] {
            b' ' | b'\t' => false,
            b'\n' | b'\r' => true,
            _ => return false,
        };
        let before = classes().before(bytes, at);
        match self.kind {
            Kind::Cl100k | Kind::O200k if breaks_line => before.is_letter() || before == Class::Number,
            Kind::Gpt2 | Kind::Cl100k | Kind::O200k => before != Class::Space,
            Kind::Custom => false,
        }
    }
}

/// Ends of the pieces that a regular expression makes: its matches, and what lies between them.
pub(crate) fn regex_ends(regex: &fancy_regex::Regex, text: &str, mut f: impl FnMut(usize)) -> Result<()> {
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
