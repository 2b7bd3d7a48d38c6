//! The three patterns by hand, a character at a time, in the order of their alternatives: what the blocks are held to,
//! and what does the work where a block leaves a place undecided.
//!
//! In: valid UTF-8 and the beginning of a pre-token. Out: its end. No pattern looks at what is before a pre-token.

use super::classes::{Class, Classes, classes};

/// Text with the class of each of its characters.
#[derive(Clone, Copy)]
struct Text<'t> {
    bytes: &'t [u8],
    table: &'static Classes,
}

impl<'t> Text<'t> {
    fn new(bytes: &'t [u8]) -> Self {
        Self { bytes, table: classes() }
    }

    fn at(self, at: usize) -> Option<(Class, usize)> {
        self.table.at(self.bytes, at)
    }

    fn is_line_break(self, at: usize) -> bool {
        matches!(self.bytes.get(at), Some(b'\r' | b'\n'))
    }

    /// End of the run of characters of the classes `of` that begins at `at`.
    fn run(self, mut at: usize, of: impl Fn(Class) -> bool) -> usize {
        while let Some((class, len)) = self.at(at)
            && of(class)
        {
            at += len;
        }
        at
    }

    /// End of the run of bytes among `of` that begins at `at`.
    fn bytes(self, mut at: usize, of: &[u8]) -> usize {
        while self.bytes.get(at).is_some_and(|byte| of.contains(byte)) {
            at += 1;
        }
        at
    }

    /// `\p{N}{1,3}`
    fn up_to_three_numbers(self, at: usize) -> Option<usize> {
        let mut end = at;
        for _ in 0..3 {
            let Some((Class::Number, len)) = self.at(end) else { break };
            end += len;
        }
        (end > at).then_some(end)
    }

    /// `[^\r\n\p{L}\p{N}]`
    fn before_letters(self, at: usize) -> Option<usize> {
        let (class, len) = self.at(at)?;
        (!class.is_letter() && class != Class::Number && !self.is_line_break(at)).then_some(at + len)
    }

    /// Of the run of white space at `at`: where it ends, where its last character begins, and the end of its last line
    /// break.
    fn white_space(self, at: usize) -> (usize, usize, Option<usize>) {
        let (mut end, mut last, mut line) = (at, at, None);
        while let Some((Class::Space, len)) = self.at(end) {
            last = end;
            end += len;
            if self.is_line_break(last) {
                line = Some(end);
            }
        }
        (end, last, line)
    }

    /// `\s+(?!\S)|\s+`: before something that is not white space a run leaves its last character out.
    fn white_space_before(self, at: usize, end: usize, last: usize) -> usize {
        if end < self.bytes.len() && last > at { last } else { end }
    }

    /// `'(?i:[sdmt]|ll|ve|re)`. Of the letters that are no ASCII, U+017F alone is one of these but for its case: an s.
    fn contraction(self, at: usize) -> Option<usize> {
        let lower = |i: usize| self.bytes.get(at + i).map(u8::to_ascii_lowercase);
        if lower(0) != Some(b'\'') {
            return None;
        }
        match (lower(1)?, lower(2)) {
            (b's' | b'd' | b'm' | b't', _) => Some(at + 2),
            (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) | (0xc5, Some(0xbf)) => Some(at + 3),
            _ => None,
        }
    }
}

/// `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
pub(crate) fn gpt2_end(bytes: &[u8], at: usize) -> usize {
    let text = Text::new(bytes);
    if bytes[at] == b'\'' {
        match (bytes.get(at + 1), bytes.get(at + 2)) {
            (Some(b's' | b'd' | b'm' | b't'), _) => return at + 2,
            (Some(b'l'), Some(b'l')) | (Some(b'v' | b'r'), Some(b'e')) => return at + 3,
            _ => {}
        }
    }
    // Marks are none of the pattern's classes, letters of any case are one.
    let kind = |class: Class| match class {
        Class::Upper | Class::Lower | Class::Letter => Class::Letter,
        Class::Mark => Class::Other,
        class => class,
    };
    let start = at + usize::from(bytes[at] == b' ');
    match text.at(start).map(|(class, _)| kind(class)) {
        Some(first) if first != Class::Space => text.run(start, |class| kind(class) == first),
        _ => {
            let (end, last, _) = text.white_space(at);
            text.white_space_before(at, end, last)
        }
    }
}

/// `'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s`
pub(crate) fn cl100k_end(bytes: &[u8], at: usize) -> usize {
    let text = Text::new(bytes);
    let start = text.before_letters(at).unwrap_or(at);
    let letters = || Some(text.run(start, Class::is_letter)).filter(|&end| end > start);
    let others = || {
        let start = at + usize::from(bytes[at] == b' ');
        let end = text.run(start, |class| matches!(class, Class::Other | Class::Mark));
        (end > start).then(|| text.bytes(end, b"\r\n"))
    };
    let space = || {
        let (end, last, line) = text.white_space(at);
        match line {
            _ if end == bytes.len() => end,
            Some(line) => line,
            None => text.white_space_before(at, end, last),
        }
    };
    let found = text.contraction(at).or_else(letters).or_else(|| text.up_to_three_numbers(at)).or_else(others);
    found.unwrap_or_else(space)
}

/// The pattern of seven alternatives in `pretokenize`.
pub(crate) fn o200k_end(bytes: &[u8], at: usize) -> usize {
    let text = Text::new(bytes);
    let others = || {
        let start = at + usize::from(bytes[at] == b' ');
        let end = text.run(start, |class| matches!(class, Class::Other | Class::Mark));
        (end > start).then(|| text.bytes(end, b"\r\n/"))
    };
    let space = || {
        let (end, last, line) = text.white_space(at);
        line.unwrap_or_else(|| text.white_space_before(at, end, last))
    };
    o200k_word(text, at).or_else(|| text.up_to_three_numbers(at)).or_else(others).unwrap_or_else(space)
}

/// `[^\r\n\p{L}\p{N}]?U*V+C?|[^\r\n\p{L}\p{N}]?U+V*C?`, where U is all letters but lower case, V all but upper case,
/// marks in both, and C a contraction.
fn o200k_word(text: Text<'_>, at: usize) -> Option<usize> {
    let in_u = |class| matches!(class, Class::Upper | Class::Letter | Class::Mark);
    let in_v = |class| matches!(class, Class::Lower | Class::Letter | Class::Mark);
    // U* takes all it can. V+ goes on from there, or takes the last character of U* that is in both.
    let first = |start: usize| {
        let (mut end, mut in_both) = (start, None);
        while let Some((class, len)) = text.at(end)
            && in_u(class)
        {
            end += len;
            if in_v(class) {
                in_both = Some(end);
            }
        }
        let lower = text.run(end, in_v);
        if lower > end { Some(lower) } else { in_both }
    };
    // Where the first fails no V is near: U+ alone.
    let second = |start: usize| Some(text.run(start, in_u)).filter(|&end| end > start);
    let prefixed = text.before_letters(at);
    let end = prefixed.and_then(first).or_else(|| first(at)).or_else(|| prefixed.and_then(second));
    let end = end.or_else(|| second(at))?;
    Some(text.contraction(end).unwrap_or(end))
}
