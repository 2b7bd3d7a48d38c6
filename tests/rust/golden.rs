//! The cases of `tests/golden/bpe.json`, which the Python tests read too.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]

use std::sync::Arc;

use bytekiln_bpe::count::{WordCounts, count_text};
use bytekiln_bpe::naive;
use bytekiln_bpe::pretokenize::{Pattern, Piece, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::vocab::room_for_merges;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    train: Vec<TrainCase>,
    split: Vec<SplitCase>,
}

#[derive(Deserialize)]
struct TrainCase {
    name: String,
    pattern: String,
    tie_break: String,
    special_tokens: Vec<String>,
    documents: Vec<String>,
    vocab_size: usize,
    merges: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct SplitCase {
    pattern: String,
    text: String,
    pieces: Vec<String>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../golden/bpe.json")).unwrap()
}

#[test]
fn merges() {
    for case in golden().train {
        let splitter = Splitter::new(Arc::new(Pattern::new(&case.pattern).unwrap()), &case.special_tokens).unwrap();
        let mut counts = WordCounts::default();
        for document in &case.documents {
            count_text(document.as_bytes(), &splitter, TextPolicy::Error, &mut counts).unwrap();
        }
        let wanted = room_for_merges(case.vocab_size, &case.special_tokens).unwrap();
        let rule = TieBreak::from_name(&case.tie_break).unwrap();
        let words = counts.into_sorted();
        let fast = train(&words.iter().cloned().collect(), &Options::new(wanted, rule), &Progress::default()).unwrap();
        assert_eq!(fast, naive::train(&words, &Options::new(wanted, rule)), "{}", case.name);
        let text = |id: u32| String::from_utf8(fast.tokens[id].to_vec()).unwrap();
        let merges: Vec<_> = fast.pairs.iter().map(|&(a, b)| (text(a), text(b))).collect();
        assert_eq!(merges, case.merges, "{}", case.name);
    }
}

#[test]
fn splits() {
    for case in golden().split {
        let splitter = Splitter::new(Arc::new(Pattern::new(&case.pattern).unwrap()), &[]).unwrap();
        let mut pieces = vec![];
        splitter
            .split(&case.text, |piece| match piece {
                Piece::Word(word) => pieces.push(String::from_utf8(word.to_vec()).unwrap()),
                Piece::Special(_) => unreachable!(),
            })
            .unwrap();
        assert_eq!(pieces, case.pieces, "{:?}", case.text);
    }
}
