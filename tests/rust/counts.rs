//! Counts that are saved, spilled, added and loaded, in any order, against counts in one table.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test ends where something fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytekiln_bpe::Error;
use bytekiln_bpe::counts::{Counts, Memory};
use bytekiln_bpe::input::Inputs;
use bytekiln_bpe::naive;
use bytekiln_bpe::pretokenize::{Pattern, Piece, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::words::Words;
use proptest::prelude::*;

const EOT: &str = "<|eot|>";

fn splitter(pattern: &str) -> Splitter {
    Splitter::new(Arc::new(Pattern::new(pattern).unwrap()), &[EOT.to_string()]).unwrap()
}

fn counts(folder: &Path, cap: u64) -> Counts {
    Counts::new(splitter("gpt2"), TextPolicy::Error, Memory { cap, folder: folder.into() })
}

fn load(paths: &[PathBuf], folder: &Path, cap: u64) -> Result<Counts, Error> {
    Counts::load(paths, Memory { cap, folder: folder.into() }, &Progress::default())
}

fn all(counts: &mut Counts) -> Result<BTreeMap<Vec<u8>, u64>, Error> {
    let (mut words, mut last) = (BTreeMap::new(), Vec::new());
    counts.for_each(1, &Progress::default(), |word, count| {
        assert!(word > &*last, "{word:?} behind {last:?}");
        last = word.to_vec();
        assert_eq!(words.insert(word.to_vec(), count), None);
        Ok(())
    })?;
    Ok(words)
}

fn by_hand(texts: &[String]) -> BTreeMap<Vec<u8>, u64> {
    let (mut words, splitter) = (BTreeMap::new(), splitter("gpt2"));
    for text in texts {
        splitter
            .split(text, |piece| {
                if let Piece::Word(word) = piece {
                    *words.entry(word.to_vec()).or_insert(0) += 1;
                }
            })
            .unwrap();
    }
    words
}

fn sorted(words: &Words) -> BTreeMap<Vec<u8>, u64> {
    words.iter().map(|(word, count)| (word.to_vec(), count)).collect()
}

/// Texts with words of all lengths that the table knows: packed, long, very long, with zero bytes.
fn texts() -> impl Strategy<Value = Vec<String>> {
    let part = prop_oneof![
        6 => "[a-d]{1,5} ", 3 => "[a-d]{14,18} ", 2 => "[ab]{30,90} ", 1 => Just(EOT.to_string()),
        1 => "\u{0}{1,3} ", 1 => "[0-9é日]{1,4}", 1 => any::<char>().prop_map(String::from),
    ];
    let text = prop::collection::vec(part, 1..60).prop_map(|parts| parts.concat());
    prop::collection::vec(text, 1..9)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_split_into_files_threads_caps_and_orders_gives_the_same(
        texts in texts(),
        parts in prop::collection::vec(0usize..4, 9),
        order in Just([0usize, 1, 2, 3]).prop_shuffle(),
        cap in prop::sample::select(vec![0u64, 4 << 20, 5 << 20, 1 << 30]),
        threads in 1usize..4,
        chunk in prop::sample::select(vec![1usize, 7, 64, 1 << 20]),
        least in 1u64..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let progress = Progress::default();
        let expected = by_hand(&texts);
        let mut saved = vec![];
        for part in order {
            let mut counts = counts(folder.path(), cap);
            let mine = || texts.iter().zip(&parts).enumerate().filter(|(_, t)| *t.1 == part).map(|(i, t)| (i, t.0));
            // Some as files, some as texts.
            let mut files = vec![];
            for (i, text) in mine() {
                if i % 2 == 0 && !text.is_empty() {
                    files.push(folder.path().join(format!("{i}.txt")));
                    fs::write(files.last().unwrap(), text).unwrap();
                } else {
                    counts.add_text(text.as_bytes()).unwrap();
                }
            }
            if !files.is_empty() {
                counts.add_files(&Inputs::open(&files).unwrap(), threads, chunk, &progress).unwrap();
            }
            let path = folder.path().join(format!("{part}.counts"));
            let said = counts.save(&path, false, &progress).unwrap();
            prop_assert_eq!(said.about.documents, mine().count() as u64);
            prop_assert_eq!(said.about.bytes, mine().map(|t| t.1.len() as u64).sum::<u64>());
            saved.push((path, counts));
        }
        // Added in memory, and loaded all at once.
        let paths: Vec<_> = saved.iter().map(|(path, _)| path.clone()).collect();
        let mut added = saved.remove(0).1;
        for (_, other) in &saved {
            added.add(other, &progress).unwrap();
        }
        let mut loaded = load(&paths, folder.path(), cap).unwrap();
        prop_assert_eq!(&all(&mut added).unwrap(), &expected);
        prop_assert_eq!(&all(&mut loaded).unwrap(), &expected);
        prop_assert_eq!(added.about().unwrap(), loaded.about().unwrap());
        prop_assert_eq!(added.about().unwrap().pretokens, expected.values().sum::<u64>());
        prop_assert_eq!(added.distinct(&progress).unwrap(), expected.len() as u64);
        // Equal counts are equal files, whatever their history.
        let (a, b) = (folder.path().join("added"), folder.path().join("loaded"));
        added.save(&a, false, &progress).unwrap();
        loaded.save(&b, false, &progress).unwrap();
        prop_assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
        // What is trained on, and the merges.
        let kept: Vec<_> = expected.into_iter().filter(|word| word.1 >= least).collect();
        let roomy = Memory { cap: 1 << 30, folder: folder.path().into() };
        added.set_memory(roomy.clone());
        loaded.set_memory(roomy);
        for mut counts in [added, loaded] {
            let words = counts.words(least, 30, &progress).unwrap();
            prop_assert_eq!(sorted(&words).into_iter().collect::<Vec<_>>(), kept.clone());
            let merges = train(&words, &Options::new(30, TieBreak::Lexicographic), &progress).unwrap();
            prop_assert_eq!(merges, naive::train(&kept, &Options::new(30, TieBreak::Lexicographic)));
        }
        let mut most: Vec<_> = kept.clone();
        most.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        most.truncate(5);
        let found: Vec<_> = load(&paths, folder.path(), cap).unwrap().most_common(5, &progress).unwrap();
        prop_assert!(found.starts_with(&most), "{found:?} {most:?}");
    }

    #[test]
    fn counts_near_the_limits_are_exact_or_an_error(
        words in prop::collection::btree_map("[abc]{1,6}", (prop::sample::select(vec![0u32, 31, 32, 53, 61, 62, 63]), -2i64..3), 1..12),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let progress = Progress::default();
        let words: Vec<(Vec<u8>, u64)> = words.into_iter()
            .map(|(word, (bit, more))| (word.into_bytes(), (1u64 << bit).wrapping_add_signed(more).clamp(1, u64::MAX / 2 + 3)))
            .collect();
        // Each in a file of its own: they are added up while they are merged.
        let mut paths = vec![];
        for (i, (word, count)) in words.iter().enumerate() {
            let mut one = counts(folder.path(), 1 << 30);
            one.add_word(word, *count).unwrap();
            paths.push(folder.path().join(format!("{i}.counts")));
            one.save(&paths[i], false, &progress).unwrap();
        }
        let total: u128 = words.iter().map(|word| u128::from(word.1)).sum();
        let mut pairs = BTreeMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *pairs.entry(pair.to_vec()).or_insert(0u128) += u128::from(*count);
            }
        }
        let fits = total < 1 << 64 && pairs.values().all(|&count| count < 1 << 64);
        let trained = load(&paths, folder.path(), 1 << 30).and_then(|mut counts| {
            train(&counts.words(1, 40, &progress)?, &Options::new(40, TieBreak::Lexicographic), &progress)
        });
        match trained {
            Ok(merges) => {
                prop_assert!(fits);
                prop_assert_eq!(merges, naive::train(&words, &Options::new(40, TieBreak::Lexicographic)));
            }
            Err(error) => {
                prop_assert!(!fits, "{}", error);
                prop_assert!(matches!(error, Error::Config(_)) && error.to_string().contains("2^64"), "{}", error);
            }
        }
        // The same in one table, where sums stop instead of going round.
        let mut table = counts(folder.path(), 1 << 30);
        for (word, count) in &words {
            table.add_word(word, *count).unwrap();
        }
        prop_assert_eq!(table.about().is_ok(), total < u128::from(u64::MAX));
        prop_assert_eq!(table.save(&folder.path().join("all.counts"), false, &progress).is_ok(), total < u128::from(u64::MAX));
    }
}

/// A counts file of several blocks.
fn sample(folder: &Path, words: u32) -> PathBuf {
    let mut counts = counts(folder, 1 << 30);
    for n in 0..words {
        let word = format!("{:x}", n.wrapping_mul(2_654_435_761));
        counts.add_word(word.repeat(1 + n as usize % 5).as_bytes(), u64::from(n) + 1).unwrap();
    }
    let path = folder.join("sample.counts");
    counts.save(&path, true, &Progress::default()).unwrap();
    path
}

fn read(path: &Path) -> Result<BTreeMap<Vec<u8>, u64>, Error> {
    all(&mut load(&[path.to_path_buf()], path.parent().unwrap(), 1 << 30)?)
}

/// The error names the file.
fn refused(path: &Path, what: &str) -> String {
    let error = read(path).err().unwrap_or_else(|| panic!("{what}: nothing was noticed"));
    assert!(matches!(error, Error::Format { .. }), "{what}: {error:?}");
    let said = error.to_string();
    assert!(said.starts_with(&format!("{}: ", path.display())) && said.contains("expected"), "{what}: {said}");
    said
}

#[test]
fn every_damaged_byte_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    for words in [0, 3, 60] {
        let whole = fs::read(sample(folder.path(), words)).unwrap();
        let path = folder.path().join("damaged.counts");
        for at in 0..whole.len() {
            for bits in [0x01, 0x80, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] ^= bits;
                fs::write(&path, damaged).unwrap();
                refused(&path, &format!("{words} words, byte {at}, bits {bits:x}"));
            }
        }
        for end in 0..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            refused(&path, &format!("{words} words, cut at {end}"));
        }
        fs::write(&path, [&whole[..], b"\n"].concat()).unwrap();
        refused(&path, "one byte more");
    }
}

#[test]
fn damage_in_any_block_of_a_larger_file_is_noticed_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(sample(folder.path(), 40_000)).unwrap();
    assert!(whole.len() > 200_000, "{}", whole.len());
    let path = folder.path().join("damaged.counts");
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut in_blocks = 0;
    for case in 0..300 {
        let mut damaged = whole.clone();
        let (from, len) = (next(whole.len()), 1 + next(4000));
        let to = (from + len).min(whole.len());
        match case % 4 {
            0 => damaged[from..to].iter_mut().for_each(|byte| *byte ^= next(255) as u8 + 1),
            1 => damaged[from..to].fill(0xff),
            2 => drop(damaged.drain(from..to)),
            _ => {
                let piece = damaged[from..to].to_vec();
                damaged.splice(from..from, piece);
            }
        }
        if damaged == whole {
            continue;
        }
        fs::write(&path, damaged).unwrap();
        let said = refused(&path, &format!("case {case}"));
        in_blocks += u32::from(said.contains("block") && said.contains("byte offset"));
    }
    assert!(in_blocks > 100, "{in_blocks}");
}

#[test]
fn foreign_newer_and_missing_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = sample(folder.path(), 9);
    let path = folder.path().join("other");
    fs::write(&path, "{\"model\": {}} and a text that is longer than any head").unwrap();
    assert!(refused(&path, "foreign").contains("is no counts file"));
    let mut newer = fs::read(&good).unwrap();
    newer[16] = 2;
    fs::write(&path, newer).unwrap();
    assert!(refused(&path, "newer").contains("version 2 of counts files; expected 1: a newer bytekiln"));
    for (path, word) in [(folder.path().join("none"), "no such file"), (folder.path().into(), "directory")] {
        let said = load(&[path], folder.path(), 0).unwrap_err().to_string();
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn counts_that_were_cut_in_another_way_are_refused_and_both_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Memory { cap: 1 << 30, folder: folder.path().into() };
    let write = |name: &str, pattern: &str, specials: &[&str], policy: TextPolicy| {
        let specials: Vec<_> = specials.iter().map(ToString::to_string).collect();
        let splitter = Splitter::new(Arc::new(Pattern::new(pattern).unwrap()), &specials).unwrap();
        let mut counts = Counts::new(splitter, policy, memory.clone());
        counts.add_text(b"some text").unwrap();
        let path = folder.path().join(name);
        counts.save(&path, false, &Progress::default()).unwrap();
        path
    };
    let first = write("a.counts", "gpt2", &[EOT], TextPolicy::Error);
    let others = [
        (write("b.counts", "cl100k", &[EOT], TextPolicy::Error), "pattern cl100k; expected gpt2"),
        (write("c.counts", r"\w+|\W", &[EOT], TextPolicy::Error), r"pattern \w+|\W; expected gpt2"),
        (write("d.counts", "gpt2", &[], TextPolicy::Error), r#"special tokens []; expected ["<|eot|>"]"#),
        (write("e.counts", "gpt2", &[EOT, "<b>"], TextPolicy::Error), "special tokens"),
        (write("f.counts", "gpt2", &[EOT], TextPolicy::Replace), "errors replace; expected error"),
    ];
    for (other, word) in others {
        let said = load(&[first.clone(), other.clone()], folder.path(), 1 << 30).unwrap_err().to_string();
        for part in [&*first.to_string_lossy(), &*other.to_string_lossy(), word] {
            assert!(said.contains(part), "{said}: {part}");
        }
        let (mut a, b) =
            (load(std::slice::from_ref(&first), folder.path(), 0).unwrap(), load(&[other], folder.path(), 0).unwrap());
        assert_eq!(a.add(&b, &Progress::default()).unwrap_err().to_string(), said);
        assert_eq!(all(&mut a).unwrap().len(), 2, "nothing was added");
    }
}

#[test]
fn very_many_runs_are_merged_in_levels_and_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut counts = counts(folder.path(), 0);
    let texts: Vec<_> = (0..700).map(|n| format!("word{} word{} again", n % 90, n)).collect();
    for text in &texts {
        counts.add_text(text.as_bytes()).unwrap();
    }
    assert!(counts.spilled_runs() > 600, "{}", counts.spilled_runs());
    assert_eq!(all(&mut counts).unwrap(), by_hand(&texts));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "runs have no names");
}

#[test]
fn a_part_of_a_failed_text_is_never_in() {
    let folder = tempfile::tempdir().unwrap();
    let mut counts = counts(folder.path(), 1 << 30);
    counts.add_text(b"good").unwrap();
    counts.add_text(b"bad \xff").unwrap_err();
    let path = folder.path().join("bad.txt");
    fs::write(&path, ["good ".repeat(5000).as_bytes(), b"\xff"].concat()).unwrap();
    counts.add_files(&Inputs::open(&[path]).unwrap(), 2, 64, &Progress::default()).unwrap_err();
    assert_eq!(all(&mut counts).unwrap(), by_hand(&["good".into()]));
    assert_eq!(counts.about().unwrap().bytes, 4);
}

#[test]
fn what_merging_has_no_room_for_is_refused_with_what_would_fit() {
    let folder = tempfile::tempdir().unwrap();
    let cap = 16 << 20;
    let mut counts = counts(folder.path(), cap);
    for n in 0..300_000u32 {
        let word = format!("{:08x}", n.wrapping_mul(2_654_435_761));
        counts.add_word(word.as_bytes(), 1 + u64::from(n % 100)).unwrap();
    }
    assert!(counts.spilled_runs() > 0);
    let said = counts.words(1, 1000, &Progress::default()).unwrap_err().to_string();
    assert!(said.contains("merging 300000 distinct words needs") && said.contains("max_memory 16.8 MB"), "{said}");
    let least = said.split("--min-frequency ").nth(1).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap();
    assert!((2..100).contains(&least), "{said}");
    let words = counts.words(least, 1000, &Progress::default()).unwrap();
    assert!(words.iter().all(|word| word.1 >= least));
    assert_eq!(words.len() as u64, 3000 * (101 - least));
    counts.words(least - 1, 1000, &Progress::default()).unwrap_err();
}
