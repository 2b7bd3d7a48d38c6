//! Criterion benches of the CPU kernels: activations with bytes a second, attention with multiplications and
//! additions a second, those above the diagonal not counted. One thread.

#![allow(missing_docs, clippy::cast_precision_loss, reason = "a bench")]

use std::hint::black_box;

use bytekiln_kernels::activation::{self, Kind};
use bytekiln_kernels::attention::{self, Input, Output, Shape, Sight, Strides};
use bytekiln_kernels::dropout::dropout;
use bytekiln_kernels::linear::{self, Before, Gradients, Linear, Map};
use bytekiln_kernels::norm::Norm;
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

/// Products alone count: 2 · rows · ins · outs, twice that in a backward.
fn linears(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear");
    let rows = 768;
    let norm = [vec![1.0; 128], vec![0.0; 128]];
    let layer_norm = Before::Norm(Norm { centred: true, eps: 1e-5, weight: &norm[0], bias: Some(&norm[1]) });
    for (name, before, ins, outs) in [
        ("norm, q k v", layer_norm, 128, [128; 3].as_slice()),
        ("out", Before::Nothing, 128, &[128]),
        ("norm, up", layer_norm, 128, &[512]),
        ("gelu, down", Before::Activation(Kind::Gelu), 512, &[128]),
    ] {
        let all: usize = outs.iter().sum();
        let x = numbers(rows * ins, 1);
        let weights: Vec<Vec<f32>> = outs.iter().map(|outs| numbers(outs * ins, 2)).collect();
        let maps: Vec<Map<'_>> = weights.iter().map(|weight| Map { weight, bias: None }).collect();
        let linear = Linear { ins, before, x: [&x, &[]], maps: &maps };
        let g: Vec<Vec<f32>> = outs.iter().map(|outs| numbers(rows * outs, 3)).collect();
        for level in levels() {
            group.throughput(Throughput::Elements((2 * rows * ins * all) as u64));
            group.bench_function(BenchmarkId::new(name, level.name()), |bench| {
                let mut y = g.clone();
                let mut y: Vec<&mut [f32]> = y.iter_mut().map(Vec::as_mut_slice).collect();
                bench.iter(|| linear::forward(level, 1, black_box(&linear), None, &mut y));
            });
            group.throughput(Throughput::Elements((4 * rows * ins * all) as u64));
            group.bench_function(BenchmarkId::new(format!("{name}, backward"), level.name()), |bench| {
                let g: Vec<&[f32]> = g.iter().map(Vec::as_slice).collect();
                let (mut dx, mut dweights, mut dnorm) = (x.clone(), weights.clone(), norm.clone());
                let [dw, db] = &mut dnorm;
                let norm =
                    if matches!(before, Before::Norm(_)) { [&mut dw[..], &mut db[..]] } else { [&mut [][..], &mut []] };
                let mut to = Gradients {
                    x: [&mut dx, &mut []],
                    weights: dweights.iter_mut().map(Vec::as_mut_slice).collect(),
                    biases: outs.iter().map(|_| [].as_mut_slice()).collect(),
                    norm,
                };
                bench.iter(|| linear::backward(level, 1, black_box(&linear), &g, &mut to));
            });
        }
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

criterion_group!(benches, activations, linears, dropouts, attentions);
criterion_main!(benches);
