//! What is held of any input: the bodies of the fuzz targets, which are property tests of the crate as well.
//!
//! In: bytes, of which the first ones choose. Out: nothing; a difference is a panic.

#![allow(clippy::unwrap_used, dead_code, missing_docs, reason = "a difference ends the run; a target has one body")]

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use bytekiln_bpe::count::{WordCounts, count_text};
use bytekiln_bpe::naive;
use bytekiln_bpe::pretokenize::{CL100K, GPT2, O200K, Pattern, Piece, Run, SplitStream, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_simd::Level;

const PATTERNS: [(&str, &str); 3] = [("gpt2", GPT2), ("cl100k", CL100K), ("o200k", O200K)];
const EOT: &str = "<|e|>";

/// The patterns as regular expressions, compiled once.
fn regexes() -> &'static [fancy_regex::Regex; 3] {
    static REGEXES: OnceLock<[fancy_regex::Regex; 3]> = OnceLock::new();
    REGEXES.get_or_init(|| PATTERNS.map(|(_, source)| fancy_regex::Regex::new(source).unwrap()))
}

/// A piece as bytes; a special token as none.
fn own(piece: Piece<'_>) -> Option<Vec<u8>> {
    match piece {
        Piece::Word(word) => Some(word.to_vec()),
        Piece::Special(_) => None,
    }
}

/// The same of a run of them.
fn own_run(found: &mut Vec<Option<Vec<u8>>>, text: &[u8], run: Run<'_>) {
    match run {
        Run::Special(_) => found.push(None),
        Run::Words(ends) => {
            let mut start = ends.start;
            for end in ends {
                found.push(Some(text[start..end].to_vec()));
                start = end;
            }
        }
    }
}

/// Splitting any bytes: at every level, in parts, and counted, as the regular expression splits the whole.
pub fn pieces(data: &[u8]) {
    let [which, part, bytes @ ..] = data else { return };
    let which = usize::from(*which) % PATTERNS.len();
    let specials = [EOT.to_string()];
    let text = String::from_utf8_lossy(bytes);
    let mut expected = vec![];
    for (i, document) in text.split(EOT).enumerate() {
        if i > 0 {
            expected.push(None);
        }
        expected.extend(regexes()[which].find_iter(document).map(|m| Some(m.unwrap().as_str().as_bytes().to_vec())));
    }
    for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
        let pattern = Arc::new(Pattern::at_level(PATTERNS[which].0, level).unwrap());
        let splitter = Splitter::new(pattern, &specials).unwrap();
        let mut found = vec![];
        splitter.split(&text, |piece| found.push(own(piece))).unwrap();
        assert_eq!(found, expected, "{} at {level:?}: {text:?}", PATTERNS[which].0);

        let (mut found, mut stream) = (vec![], SplitStream::default());
        let mut rest = &*text;
        while !rest.is_empty() {
            let mut size = (usize::from(*part) + 1).min(rest.len());
            while !rest.is_char_boundary(size) {
                size += 1;
            }
            stream.push(&splitter, &rest[..size], |text, run| own_run(&mut found, text, run)).unwrap();
            rest = &rest[size..];
        }
        stream.finish(&splitter, |text, run| own_run(&mut found, text, run)).unwrap();
        assert_eq!(found, expected, "{} at {level:?} in parts: {text:?}", PATTERNS[which].0);

        let (mut counts, mut plain) = (WordCounts::default(), BTreeMap::new());
        count_text(text.as_bytes(), &splitter, TextPolicy::Error, &mut counts).unwrap();
        for word in expected.iter().flatten() {
            *plain.entry(word.clone()).or_insert(0) += 1;
        }
        assert_eq!(counts.into_sorted().into_iter().collect::<BTreeMap<_, u64>>(), plain);

        // As they are, broken or not: no byte is lost.
        let mut kept = vec![];
        splitter
            .split_bytes(bytes, TextPolicy::Bytes, |piece| match piece {
                Piece::Word(word) => kept.extend_from_slice(word),
                Piece::Special(_) => kept.extend_from_slice(EOT.as_bytes()),
            })
            .unwrap();
        assert_eq!(kept, bytes);
    }
}

/// Training on any words, ended by zeros: the specification's merges, by every rule.
pub fn merges(data: &[u8]) {
    let [wanted, bytes @ ..] = data else { return };
    let mut words = BTreeMap::new();
    // The specification is slow: enough to overlap and to tie.
    for (i, word) in bytes[..bytes.len().min(400)].split(|&byte| byte == 0).enumerate() {
        if !word.is_empty() {
            *words.entry(word.to_vec()).or_insert(0) += 1 + i as u64 % 3;
        }
    }
    let words: Vec<(Vec<u8>, u64)> = words.into_iter().collect();
    for rule in [TieBreak::Lexicographic, TieBreak::HuggingFace, TieBreak::RawBytes] {
        let options = Options { threads: 3, ..Options::new(usize::from(*wanted), rule) };
        let fast = train(&words.iter().cloned().collect(), &options, &Progress::default()).unwrap();
        assert_eq!(fast, naive::train(&words, &options), "{rule:?}: {words:?}");
    }
}
