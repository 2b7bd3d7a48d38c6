//! Criterion bench of encoding and decoding, with bytes a second. The phases of training: `phases.rs`. The text is made here, so that
//! the bench runs in a bare clone; `benches/peers.py` uses real text.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]

use std::hint::black_box;
use std::sync::Arc;

use bytekiln_bpe::count::{WordCounts, count_text};
use bytekiln_bpe::encode::{Allowed, Encoder};
use bytekiln_bpe::pretokenize::{Pattern, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::vocab::Vocab;
use bytekiln_bpe::words::Words;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

#[path = "text.rs"]
mod text;

use text::prose;

fn splitter(pattern: &str) -> Splitter {
    Splitter::new(Arc::new(Pattern::new(pattern).unwrap()), &["<|endoftext|>".into()]).unwrap()
}

fn counted(text: &str) -> Words {
    let mut counts = WordCounts::default();
    count_text(text.as_bytes(), &splitter("gpt2"), TextPolicy::Error, &mut counts).unwrap();
    counts.into_sorted().into_iter().collect()
}

fn benches(c: &mut Criterion) {
    let text = prose(4 << 20);
    let words = counted(&text);
    let merges = train(&words, &Options::new(8000, TieBreak::Lexicographic), &Progress::default()).unwrap();
    let vocab = Vocab::from_training(merges, &[], "gpt2").unwrap();
    let encoder = Encoder::new(vocab.clone()).unwrap();
    let letters: String = text.chars().filter(char::is_ascii_alphabetic).take(1 << 20).collect();
    let mut group = c.benchmark_group("encode");
    let cases = [("prose", &text), ("one word of letters", &letters), ("one letter", &"a".repeat(1 << 20))];
    for (name, text) in cases {
        group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
        group.bench_with_input(BenchmarkId::from_parameter(name), text, |b, text| {
            let mut ids = Vec::<u32>::new();
            b.iter(|| {
                ids.clear();
                encoder.encode(text, Allowed::None, &mut ids).unwrap();
                black_box(ids.len())
            });
        });
    }
    // Words that no table has: what merging alone costs.
    let new: String = (0..40_000u64).map(|n| spelt(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    group.throughput(Throughput::Bytes(new.len() as u64));
    group.bench_function("new words", |b| {
        let make = || (Encoder::new(vocab.clone()).unwrap(), Vec::<u32>::new());
        let encode = |(encoder, mut ids): (Encoder, Vec<u32>)| {
            encoder.encode(&new, Allowed::None, &mut ids).unwrap();
            (encoder, ids)
        };
        b.iter_batched(make, encode, BatchSize::PerIteration);
    });
    group.finish();
    let mut ids = Vec::<u32>::new();
    encoder.encode(&text, Allowed::None, &mut ids).unwrap();
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("prose", |b| {
        let mut bytes = Vec::new();
        b.iter(|| {
            bytes.clear();
            encoder.decode(&ids, false, &mut bytes).unwrap();
            black_box(bytes.len())
        });
    });
    group.finish();
}

/// A number as a word of letters, of 2 to 13 bytes.
fn spelt(n: u64) -> String {
    let letters = (0..=n % 12).map(|i| char::from(b'a' + (n >> (5 * i + 4)) as u8 % 26));
    " ".chars().chain(letters).collect()
}

criterion_group!(all, benches);
criterion_main!(all);
