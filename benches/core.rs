//! Criterion benches of the core's phases, with bytes a second: splitting, counting, merging, encoding.
//! The text is made here, so that the bench runs in a bare clone; `benches/peers.py` uses real text.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]

use std::hint::black_box;
use std::sync::Arc;

use bytekiln_bpe::count::{WordCounts, count_text};
use bytekiln_bpe::encode::{Allowed, Encoder};
use bytekiln_bpe::pretokenize::{Pattern, Piece, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::vocab::Vocab;
use bytekiln_bpe::words::Words;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Words drawn from a Zipf-like distribution, so that tables see what they see on real text.
fn prose(bytes: usize) -> String {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<String> = (0..20_000u32)
        .map(|_| (0..2 + next() % 9).map(|_| char::from(b"etaoinshrdlucmfw"[(next() % 16) as usize])).collect())
        .collect();
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        // A uniform number of bits, then a uniform rank of so many bits: rank r comes about 1/r of the time.
        let rank = next() >> (50 + next() % 14);
        text += &words[rank as usize % words.len()];
        text += if next() % 12 == 0 { ".\n" } else { " " };
    }
    text
}

fn splitter(pattern: &str) -> Splitter {
    Splitter::new(Arc::new(Pattern::new(pattern).unwrap()), &["<|endoftext|>".into()]).unwrap()
}

fn counted(text: &str) -> Words {
    let mut counts = WordCounts::default();
    count_text(text.as_bytes(), &splitter("gpt2"), TextPolicy::Error, &mut counts).unwrap();
    counts.into_words()
}

fn benches(c: &mut Criterion) {
    let text = prose(4 << 20);
    let mut group = c.benchmark_group("split");
    for (pattern, bytes) in [("gpt2", text.len()), ("cl100k", 1 << 18), ("o200k", 1 << 18)] {
        let splitter = splitter(pattern);
        let text = &text[..bytes];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(pattern, |b| {
            b.iter(|| {
                let mut words = 0usize;
                splitter.split(text, |piece| words += usize::from(matches!(piece, Piece::Word(_)))).unwrap();
                black_box(words)
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("train");
    group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("count", |b| b.iter(|| black_box(counted(&text).len())));
    let words = counted(&text);
    group.bench_function("merge to 8k", |b| {
        b.iter(|| train(&words, &Options::new(8000, TieBreak::Lexicographic), &Progress::default()).unwrap());
    });
    group.finish();

    let merges = train(&words, &Options::new(8000, TieBreak::Lexicographic), &Progress::default()).unwrap();
    let encoder = Encoder::new(Vocab::from_training(merges, &[], "gpt2").unwrap()).unwrap();
    let letters: String = text.chars().filter(char::is_ascii_alphabetic).take(1 << 20).collect();
    let mut group = c.benchmark_group("encode");
    let cases = [("prose", &text), ("one word of letters", &letters), ("one letter", &"a".repeat(1 << 20))];
    for (name, text) in cases {
        group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
        group.bench_with_input(BenchmarkId::from_parameter(name), text, |b, text| {
            let mut ids = Vec::new();
            b.iter(|| {
                ids.clear();
                encoder.encode(text, Allowed::None, &mut ids).unwrap();
                black_box(ids.len())
            });
        });
    }
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
