//! Criterion benches of the CPU kernels: activations with bytes a second, attention with multiplications and
//! additions a second, those above the diagonal not counted. One thread.

#![allow(missing_docs, clippy::cast_precision_loss, reason = "a bench")]

use std::hint::black_box;

use bytekiln_kernels::activation::{self, Kind};
use bytekiln_kernels::attention::{self, Input, Output, Shape, Sight, Strides};
use bytekiln_kernels::dropout::dropout;
use bytekiln_kernels::number::Bf16;
use bytekiln_kernels::simd::Level;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const CAUSAL: Sight = Sight { causal: true, window: 0 };

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d ^ seed;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| 2.0 * next()).collect()
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.is_here())
}

fn activations(c: &mut Criterion) {
    let mut group = c.benchmark_group("activation");
    let x = numbers(768 * 512, 1);
    let (mut y, mut z) = (x.clone(), x.clone());
    group.throughput(Throughput::Bytes(4 * x.len() as u64));
    for level in levels() {
        for kind in Kind::ALL {
            group.bench_function(BenchmarkId::new(format!("{kind:?}"), level.name()), |bench| {
                bench.iter(|| activation::forward(level, 1, kind, black_box(&x), &mut y));
            });
            group.bench_function(BenchmarkId::new(format!("{kind:?} backward"), level.name()), |bench| {
                bench.iter(|| activation::backward(level, 1, kind, black_box(&x), &x, &mut y));
            });
        }
        group.bench_function(BenchmarkId::new("SwiGLU", level.name()), |bench| {
            bench.iter(|| activation::swiglu(level, 1, black_box(&x), &x, &mut y));
        });
        group.bench_function(BenchmarkId::new("SwiGLU backward", level.name()), |bench| {
            bench.iter(|| activation::swiglu_backward(level, 1, black_box(&x), &x, &x, &mut y, &mut z));
        });
    }
}

fn dropouts(c: &mut Criterion) {
    let mut group = c.benchmark_group("dropout");
    let x = numbers(4096 * 192, 1);
    let halves: Vec<Bf16> = x.iter().map(|&x| Bf16::of(x)).collect();
    let (mut y, mut z) = (x.clone(), halves.clone());
    for level in levels() {
        group.throughput(Throughput::Bytes(4 * x.len() as u64));
        group.bench_function(BenchmarkId::new("float32", level.name()), |bench| {
            bench.iter(|| dropout(level, 1, 7, 0.2, black_box(&x), &mut y));
        });
        group.throughput(Throughput::Bytes(2 * x.len() as u64));
        group.bench_function(BenchmarkId::new("bf16", level.name()), |bench| {
            bench.iter(|| dropout(level, 1, 7, 0.2, black_box(&halves), &mut z));
        });
    }
}

fn input(numbers: &[f32], shape: Shape) -> Input<'_> {
    let strides = Strides::contiguous(shape.keys, shape.kv_heads, shape.width);
    Input::new(numbers, strides, shape, shape.kv_heads, shape.keys)
}

fn attentions(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    for (batch, heads, times, width) in [(12, 4, 64, 32), (8, 16, 256, 32), (16, 4, 128, 32), (4, 6, 1024, 64)] {
        let shape = Shape { batch, heads, kv_heads: heads, queries: times, keys: times, width };
        let [q, k, v, dout] = [1, 2, 3, 4].map(|seed| numbers(batch * times * heads * width, seed));
        let [mut out, mut dq, mut dk, mut dv] = [(); 4].map(|()| vec![0.0; q.len()]);
        let mut log_sums = vec![0.0; batch * times * heads];
        let pairs = batch * heads * times * (times + 1) / 2;
        for level in levels() {
            let id = |name| BenchmarkId::new(format!("{name} {batch}x{heads}x{times}x{width}"), level.name());
            group.throughput(Throughput::Elements((pairs * width * 2 * 2) as u64));
            group.bench_function(id("forward"), |bench| {
                bench.iter(|| {
                    let mut out = Output::new(&mut out, shape, heads, times);
                    let (q, k, v) = (input(black_box(&q), shape), input(&k, shape), input(&v, shape));
                    attention::forward(level, 1, shape, CAUSAL, q, k, v, &mut out, &mut log_sums);
                });
            });
            group.throughput(Throughput::Elements((pairs * width * 2 * 5) as u64));
            group.bench_function(id("backward"), |bench| {
                bench.iter(|| {
                    let [mut dq, mut dk, mut dv] =
                        [&mut dq, &mut dk, &mut dv].map(|x| Output::new(x, shape, heads, times));
                    let (dout, q, k, v) =
                        (input(black_box(&dout), shape), input(&q, shape), input(&k, shape), input(&v, shape));
                    let out = input(&out, shape);
                    attention::backward(
                        level, 1, shape, CAUSAL, dout, q, k, v, out, &log_sums, &mut dq, &mut dk, &mut dv,
                    );
                });
            });
        }
    }
}

criterion_group!(benches, activations, dropouts, attentions);
criterion_main!(benches);
