//! The fast code against the specification in `naive.rs`, over random text, threads and chunk sizes.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use bytekiln_bpe::count::{WordCounts, count_files, count_text};
use bytekiln_bpe::encode::{Allowed, Encoder};
use bytekiln_bpe::input::Inputs;
use bytekiln_bpe::naive;
use bytekiln_bpe::pretokenize::{Pattern, Piece, Splitter, TextPolicy};
use bytekiln_bpe::prior::Prior;
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::vocab::{Merge, Vocab};
use bytekiln_bpe::words::Words;
use proptest::prelude::*;

const EOT: &str = "<|eot|>";

fn splitter(pattern: &str) -> Splitter {
    Splitter::new(Arc::new(Pattern::new(pattern).unwrap()), &[EOT.to_string()]).unwrap()
}

/// Few letters and short words: ties, overlaps and tokens reached in two ways are the rule.
fn words() -> impl Strategy<Value = Vec<(Vec<u8>, u64)>> {
    let word = prop_oneof![
        3 => "[ab]{1,12}".prop_map(String::into_bytes),
        2 => "[abc é]{1,9}".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 1..20),
        1 => "a{1,40}".prop_map(String::into_bytes),
        1 => Just(Vec::new()),
    ];
    prop::collection::btree_map(word, 1u64..20, 0..40).prop_map(|map| map.into_iter().collect())
}

fn rule() -> impl Strategy<Value = TieBreak> {
    prop::sample::select(vec![TieBreak::Lexicographic, TieBreak::HuggingFace, TieBreak::RawBytes])
}

fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => "[a-d]{1,6} ", 2 => "[a-d]{1,3}", 1 => Just(EOT.to_string()), 1 => Just("<|eot".to_string()), 1 => "\\s{1,3}",
        1 => Just("don't ".to_string()), 1 => "[0-9é日]{1,4}", 1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(part, 1..60).prop_map(|parts| parts.concat())
}

/// A vocabulary whose merges come in a random order: tokens that no merge reaches are in it.
fn vocab() -> impl Strategy<Value = (Vocab, bool)> {
    let joins = prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..40);
    (joins, any::<u64>(), any::<bool>(), any::<bool>()).prop_map(|(joins, seed, shuffle, whole)| {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
        let letters = [b'a', b'b', b'c', b' '];
        let mut merges = Vec::new();
        for (a, b) in joins {
            let choose = |index: prop::sample::Index, size: usize| {
                let at = index.index(letters.len() + size - 256);
                if at < letters.len() { u32::from(letters[at]) } else { (256 + at - letters.len()) as u32 }
            };
            let pair = (choose(a, tokens.len()), choose(b, tokens.len()));
            let joined = [tokens[pair.0 as usize].clone(), tokens[pair.1 as usize].clone()].concat();
            let id = tokens.iter().position(|t| *t == joined).unwrap_or(tokens.len());
            if id == tokens.len() {
                tokens.push(joined);
            }
            if merges.iter().all(|m: &Merge| m.pair != pair) {
                merges.push(Merge { pair, id: id as u32, rank: 0 });
            }
        }
        if shuffle {
            let mut state = seed | 1;
            for i in (1..merges.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                merges.swap(i, (state >> 33) as usize % (i + 1));
            }
        }
        for (rank, merge) in (0..).zip(&mut merges) {
            merge.rank = rank;
        }
        let tokens: Vec<_> = tokens.into_iter().zip(0..).collect();
        (Vocab::new(&tokens, merges, vec![], "gpt2", whole).unwrap(), whole)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn trainer_equals_the_specification(words in words(), wanted in 0usize..120, rule in rule()) {
        let fast = train(&words.iter().cloned().collect(), &Options::new(wanted, rule), &Progress::default()).unwrap();
        prop_assert_eq!(&fast, &naive::train(&words, &Options::new(wanted, rule)));
        // The specification would give a second way to the same bytes the same token; there never is one.
        prop_assert_eq!(fast.tokens.len(), 256 + fast.pairs.len());
        // The order in which words arrive is no part of the question.
        let reversed: Vec<_> = words.into_iter().rev().collect();
        prop_assert_eq!(&fast, &train(&reversed.iter().cloned().collect(), &Options::new(wanted, rule), &Progress::default()).unwrap());
    }

    #[test]
    fn trainer_with_options_equals_the_specification(
        words in words(), other in words(), wanted in 0usize..120, rule in rule(),
        min_frequency in 1u64..25, max_token_length in prop_oneof![1usize..8, Just(usize::MAX)], known in 0usize..40,
    ) {
        // A tokenizer of other text: many of its pairs do not occur here, others in another order.
        let prior = Prior::new(naive::train(&other, &Options::new(known, rule)).pairs).unwrap();
        let options = Options { min_frequency, max_token_length, prior, ..Options::new(known + wanted, rule) };
        let fast = train(&words.iter().cloned().collect(), &options, &Progress::default()).unwrap();
        prop_assert_eq!(&fast, &naive::train(&words, &options));
        prop_assert_eq!(fast.tokens.len(), 256 + fast.pairs.len());
        // Rare words are those that are left out.
        let frequent: Vec<_> = words.into_iter().filter(|word| word.1 >= min_frequency).collect();
        prop_assert_eq!(&fast, &train(&frequent.iter().cloned().collect(), &options, &Progress::default()).unwrap());
        prop_assert!(fast.counts.iter().all(|&count| count >= min_frequency));
        let mut news = fast.tokens.iter().skip(256 + options.prior.pairs().len());
        prop_assert!(news.all(|token| token.len() <= max_token_length));
    }

    #[test]
    fn training_goes_on_where_it_stopped(words in words(), first in 0usize..60, more in 0usize..60, rule in rule()) {
        let words = words.into_iter().collect();
        let at_once = train(&words, &Options::new(first + more, rule), &Progress::default()).unwrap();
        let begun = train(&words, &Options::new(first, rule), &Progress::default()).unwrap();
        // A smaller vocabulary is the beginning of a larger one.
        let smaller = at_once.clone().first(first);
        prop_assert_eq!((&smaller.pairs, &smaller.tokens, &smaller.counts), (&begun.pairs, &begun.tokens, &begun.counts));
        let options = Options { prior: Prior::new(begun.pairs).unwrap(), ..Options::new(first + more, rule) };
        let went_on = train(&words, &options, &Progress::default()).unwrap();
        prop_assert_eq!((went_on.pairs, went_on.tokens), (at_once.pairs, at_once.tokens));
        prop_assert_eq!(begun.ties + went_on.ties, at_once.ties);
        prop_assert_eq!([begun.counts, went_on.counts].concat(), at_once.counts);
    }

    #[test]
    fn encoder_equals_the_specification((vocab, _) in vocab(), texts in prop::collection::vec("[abc ]{0,90}|a{0,200}", 1..8)) {
        let encoder = Encoder::new(vocab).unwrap();
        // Twice: the second time from the word table.
        for text in texts.iter().chain(&texts) {
            let mut expected = vec![];
            encoder.splitter().split(text, |piece| match piece {
                Piece::Word(word) => expected.extend(naive::encode(encoder.vocab(), word)),
                Piece::Special(_) => unreachable!(),
            }).unwrap();
            let mut ids = vec![];
            encoder.encode(text, Allowed::None, &mut ids).unwrap();
            prop_assert_eq!(&ids, &expected);
            let mut bytes = vec![];
            encoder.decode(&ids, false, &mut bytes).unwrap();
            prop_assert_eq!(bytes, text.as_bytes());
        }
    }

    #[test]
    fn counts_do_not_depend_on_threads_chunks_or_table(
        text in text(),
        pattern in prop::sample::select(vec!["gpt2", "cl100k", "o200k", r"\w+|\s"]),
        chunk in prop::sample::select(vec![1usize, 2, 3, 7, 16, 64, 1024]),
        threads in prop::sample::select(vec![1usize, 2, 3, 8]),
    ) {
        let splitter = splitter(pattern);
        let mut expected = BTreeMap::new();
        splitter.split(&text, |piece| if let Piece::Word(word) = piece {
            *expected.entry(word.to_vec()).or_insert(0u64) += 1;
        }).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let inputs = Inputs::open(&[file.path().to_path_buf()]).unwrap();
        let counted = count_files(&inputs, &splitter, TextPolicy::Error, threads, chunk, &Progress::default()).unwrap();
        let mut whole = WordCounts::default();
        count_text(text.as_bytes(), &splitter, TextPolicy::Error, &mut whole).unwrap();
        let counted = counted.into_sorted();
        prop_assert_eq!(&counted, &whole.into_sorted());
        prop_assert_eq!(counted.into_iter().collect::<BTreeMap<_, _>>(), expected);
    }
}

/// Files that end anywhere, also within what would be a word; a file's end is a document's end.
#[test]
fn merges_do_not_depend_on_threads_chunks_or_seeds() {
    let (splitter, pieces) = (splitter("gpt2"), ["a", "b", "ab", " ", "  ", "\n", "é", "'s", "12", "漢", "?", EOT]);
    for seed in 0..20u64 {
        let mut state = seed;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let folder = tempfile::tempdir().unwrap();
        let (mut paths, mut words) = (Vec::new(), BTreeMap::new());
        for file in 0..=next(4) {
            let text: String = (0..500 + next(4000)).map(|_| pieces[next(pieces.len())]).collect();
            let count = |piece: Piece<'_>| {
                if let Piece::Word(word) = piece {
                    *words.entry(word.to_vec()).or_insert(0u64) += 1;
                }
            };
            splitter.split(&text, count).unwrap();
            paths.push(folder.path().join(format!("{file}.txt")));
            std::fs::write(&paths[file], text).unwrap();
        }
        let rule = [TieBreak::Lexicographic, TieBreak::HuggingFace, TieBreak::RawBytes][seed as usize % 3];
        let expected = naive::train(&words.into_iter().collect::<Vec<_>>(), &Options::new(25, rule));
        let inputs = Inputs::open(&paths).unwrap();
        for threads in [1, 2, 3, 8] {
            for chunk in [1 << 10, 1 << 13, 1 << 20, 1 << 26] {
                let progress = Progress::default();
                let counts = count_files(&inputs, &splitter, TextPolicy::Error, threads, chunk, &progress).unwrap();
                let options = Options { threads, ..Options::new(25, rule) };
                let merges = train(&counts.into_sorted().into_iter().collect(), &options, &progress).unwrap();
                assert_eq!(merges, expected, "seed {seed}, {threads} threads, chunks of {chunk} bytes");
            }
        }
    }
}

#[test]
fn more_merges_than_there_can_be_need_no_room() {
    let words = [(b"abab".to_vec(), 2), (b"abc".to_vec(), 1)];
    let (all, asked) = (naive::train(&words, &Options::new(99, TieBreak::Lexicographic)), usize::MAX);
    assert_eq!(
        train(&words.into_iter().collect(), &Options::new(asked, TieBreak::Lexicographic), &Progress::default())
            .unwrap(),
        all
    );
}

/// Counts above the queue's buckets, where ties are met in a heap; long words, which go another way into tokens.
#[test]
fn great_counts_and_long_words_equal_the_specification() {
    let scale = 1 << 40;
    let mut words = vec![("ab".repeat(300).into_bytes(), 5 * scale), (b"a".repeat(700), scale), (b"cdcd".to_vec(), 1)];
    for (n, word) in ["abc", "bca", "cab", "cba", "dd", "ddd"].iter().enumerate() {
        words.push((word.bytes().collect(), (n as u64 % 3) * scale + 1));
    }
    for rule in [TieBreak::Lexicographic, TieBreak::HuggingFace] {
        let begun = naive::train(&words, &Options::new(7, rule)).pairs;
        for options in [
            Options::new(40, rule),
            Options { prior: Prior::new(begun).unwrap(), ..Options::new(40, rule) },
            Options { min_frequency: scale, max_token_length: 20, ..Options::new(40, rule) },
        ] {
            let fast = train(&words.iter().cloned().collect(), &options, &Progress::default()).unwrap();
            assert!(fast.ties > 0);
            assert_eq!(fast, naive::train(&words, &options));
        }
    }
}

/// Enough words that several threads lay them out; one of them so long that they cannot be shared out evenly.
#[test]
fn merges_do_not_depend_on_the_threads_that_lay_words_out() {
    let mut seed = 1u64;
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let mut words = BTreeMap::new();
    while words.len() < 250_000 {
        let word: Vec<u8> = (0..2 + next(14)).map(|_| next(40) as u8 + if next(9) == 0 { 160 } else { 90 }).collect();
        let count = if next(50) == 0 { u64::from(u32::MAX) + next(3) } else { 1 + next(1000) };
        words.insert(word, count);
    }
    words.insert((0..600_000).map(|_| next(40) as u8 + 90).collect(), 3);
    let words: Words = words.into_iter().collect();
    for rule in [TieBreak::Lexicographic, TieBreak::RawBytes] {
        let alone = train(&words, &Options::new(300, rule), &Progress::default()).unwrap();
        for threads in [2, 3, 8] {
            let options = Options { threads, ..Options::new(300, rule) };
            assert_eq!(train(&words, &options, &Progress::default()).unwrap(), alone, "{threads} threads");
        }
    }
}

#[test]
fn counts_beyond_32_bits_are_exact() {
    let words = [(b"ab".to_vec(), u64::from(u32::MAX) * 5), (b"cd".to_vec(), u64::from(u32::MAX) * 5 + 1)];
    let merges =
        train(&words.iter().cloned().collect(), &Options::new(2, TieBreak::Lexicographic), &Progress::default())
            .unwrap();
    assert_eq!(merges.pairs, [(99, 100), (97, 98)]);
}

#[test]
fn a_stopped_job_says_interrupted() {
    let progress = Progress::default();
    progress.stop();
    let result =
        train(&[(b"abab".to_vec(), 1)].into_iter().collect(), &Options::new(3, TieBreak::Lexicographic), &progress);
    assert!(matches!(result, Err(bytekiln_bpe::Error::Interrupted)));
}

#[test]
fn a_megabyte_without_spaces_is_encoded_as_its_halves_joined_by_the_specification() {
    // The heap path on a long piece against the scanning path on the same letters cut at a border that no
    // merge can cross.
    let words = [(b"abcabcab".to_vec(), 9), (b"bca".to_vec(), 7), (b"aab".to_vec(), 3)];
    let merges =
        train(&words.iter().cloned().collect(), &Options::new(9, TieBreak::Lexicographic), &Progress::default())
            .unwrap();
    let encoder = Encoder::new(Vocab::from_training(merges, &[], r"[a-z]+").unwrap()).unwrap();
    let unit = "abcaabcabbzz";
    let (mut one, mut many) = (Vec::<u32>::new(), Vec::<u32>::new());
    encoder.encode(unit, Allowed::None, &mut one).unwrap();
    encoder.encode(&unit.repeat(90_000), Allowed::None, &mut many).unwrap();
    assert_eq!(many, one.repeat(90_000));
}
