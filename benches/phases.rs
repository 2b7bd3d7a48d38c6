//! Criterion benches of training's phases alone, with bytes of text a second: scan, count, merge; on prose that is made
//! here, so that the bench runs in a bare clone, and on the worst cases. `benches/peers.py` uses real text.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench ends where something fails")]

use std::hint::black_box;
use std::sync::Arc;

use bytekiln_bpe::count::{WordCounts, count_text};
use bytekiln_bpe::pretokenize::{Pattern, Run, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::words::Words;
use bytekiln_simd::Level;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

#[path = "text.rs"]
mod text;

const BYTES: usize = 1 << 22;

/// By name: prose, and what is hard for one phase or another.
fn texts() -> Vec<(&'static str, String)> {
    let chars = |from: u32, count: u32| {
        let mut next = text::random();
        let mut text = String::with_capacity(BYTES + 4);
        while text.len() < BYTES {
            text.extend(char::from_u32(from + next() as u32 % count));
        }
        text
    };
    let prose = text::prose(BYTES);
    // Cyrillic: its letters in place of the prose's.
    let letter = |c: char| char::from_u32(0x430 + c as u32 % 32).filter(|_| c.is_alphabetic()).unwrap_or(c);
    let cyrillic = prose.chars().map(letter);
    vec![
        ("Cyrillic", cyrillic.collect()),
        ("prose", prose),
        ("CJK", chars(0x4e00, 3000)),
        ("random letters", chars(0x61, 26)),
        ("one letter", "a".repeat(BYTES)),
        ("line breaks", "\n".repeat(BYTES)),
        ("digits", chars(0x30, 10)),
    ]
}

fn splitter(pattern: &str, level: Level) -> Splitter {
    Splitter::new(Arc::new(Pattern::at_level(pattern, level).unwrap()), &["<|endoftext|>".into()]).unwrap()
}

fn counted(text: &str) -> Words {
    let splitter = splitter("gpt2", Level::of_process().unwrap());
    let mut counts = WordCounts::default();
    count_text(text.as_bytes(), &splitter, TextPolicy::Error, &mut counts).unwrap();
    counts.into_sorted().into_iter().collect()
}

fn scan(c: &mut Criterion) {
    let texts = texts();
    for pattern in ["gpt2", "cl100k", "o200k"] {
        let mut group = c.benchmark_group(format!("scan {pattern}"));
        for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
            let splitter = splitter(pattern, level);
            for (name, text) in &texts {
                group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
                group.bench_with_input(BenchmarkId::new(*name, level.name()), text, |bench, text| {
                    bench.iter(|| {
                        let mut words = 0;
                        let count = |run: Run<'_>| {
                            if let Run::Words(ends) = run {
                                words += ends.offsets.len();
                            }
                        };
                        splitter.split_runs(text, count).unwrap();
                        black_box(words)
                    });
                });
            }
        }
    }
}

fn count_and_merge(c: &mut Criterion) {
    for (name, text) in texts() {
        let mut group = c.benchmark_group("count");
        group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
        group.bench_with_input(name, &text, |bench, text| bench.iter(|| black_box(counted(text).len())));
        group.finish();

        let words = counted(&text);
        let mut group = c.benchmark_group("merge to 4k");
        group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
        group.bench_with_input(name, &words, |bench, words| {
            bench.iter(|| {
                train(words, &Options::new(4096 - 256, TieBreak::Lexicographic), &Progress::default()).unwrap()
            });
        });
        group.finish();
    }
}

criterion_group!(all, scan, count_and_merge);
criterion_main!(all);
