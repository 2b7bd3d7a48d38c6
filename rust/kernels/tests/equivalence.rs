//! Every level of every kernel against the specification in float64, and against itself on other numbers of threads.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, missing_docs, reason = "a test")]

use bytekiln_kernels::activation::{self, Kind};
use bytekiln_kernels::attention::{self, Input, Output, Shape, Sight, Strides};
use bytekiln_kernels::naive;
use bytekiln_kernels::norm;
use bytekiln_kernels::number::Bf16;
use bytekiln_kernels::simd::Level;
use proptest::prelude::*;

fn levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|level| level.is_here()).collect()
}

fn activated(level: Level, threads: usize, kind: Kind, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut y, mut slope) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    activation::forward(level, threads, kind, x, &mut y);
    activation::backward(level, threads, kind, &vec![1.0; x.len()], x, &mut slope);
    (y, slope)
}

#[test]
fn activations_are_their_formulas() {
    let x: Vec<f32> = (-400_000..=400_000).map(|i| i as f32 * 3e-5).collect();
    for level in levels() {
        for kind in Kind::ALL {
            let (y, slope) = activated(level, 1, kind, &x);
            for (i, &x) in x.iter().enumerate() {
                let (exact, exact_slope) = naive::activation(kind, f64::from(x));
                let error = (f64::from(y[i]) - exact).abs();
                assert!(
                    error < 3e-8 + 1.5e-7 * f64::from(x.abs().max(exact as f32)),
                    "{level:?} {kind:?} {x}: {error:e}"
                );
                let error = (f64::from(slope[i]) - exact_slope).abs();
                // The approximation's argument is a cubic: its rounding errors are multiplied by x.
                let bound = if kind == Kind::GeluTanh { 2e-6 } else { 4e-7 };
                assert!(error < bound * exact_slope.abs().max(1.0), "{level:?} {kind:?} slope at {x}: {error:e}");
            }
        }
    }
}

#[test]
fn activations_keep_their_limits() {
    let x = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30, f32::MIN_POSITIVE, 1e-45];
    for level in levels() {
        for kind in [Kind::Gelu, Kind::GeluTanh, Kind::Silu] {
            let (y, slope) = activated(level, 1, kind, &x);
            assert_eq!((y[0].to_bits(), y[1].to_bits()), (0.0f32.to_bits(), (-0.0f32).to_bits()));
            assert_eq!((y[2], slope[2]), (f32::INFINITY, 1.0), "{level:?} {kind:?}");
            assert!(y[3].abs() < 1e-30 && slope[3].abs() < 1e-30, "{level:?} {kind:?} {} {}", y[3], slope[3]);
            assert!(y[4].is_nan() && slope[4].is_nan(), "{level:?} {kind:?}");
            assert_eq!((y[5], slope[5]), (1e30, 1.0));
            assert!(y[6].abs() < 1e-30 && slope[6].abs() < 1e-30);
            assert!((y[7] - x[7] / 2.0).abs() <= 1e-45 && (slope[7] - 0.5).abs() < 1e-6);
        }
        let (y, slope) = activated(level, 1, Kind::Relu2, &x);
        assert_eq!((y[2], slope[2], y[3], slope[3]), (f32::INFINITY, f32::INFINITY, 0.0, 0.0));
        assert!(y[4].is_nan() && slope[4].is_nan());
    }
}

/// Of every bit pattern at every level: computed in float32 and rounded once, on pieces and threads of any number.
#[test]
fn bf16_is_what_float32_gives_rounded() {
    let bits = |x: &[Bf16]| x.iter().map(|x| x.0).collect::<Vec<u16>>();
    let halves: Vec<Bf16> = (0..=u16::MAX).map(Bf16).collect();
    let wide: Vec<f32> = halves.iter().map(|x| x.wide()).collect();
    let (g, wide_g): (Vec<Bf16>, Vec<f32>) = halves.iter().rev().map(|&x| (x, x.wide())).unzip();
    let rounded = |x: &[f32]| x.iter().map(|&x| Bf16::of(x).0).collect::<Vec<u16>>();
    for level in levels() {
        // All of them, and lengths that fill no vector.
        for len in (0..40).chain([halves.len()]) {
            let (x, wide, g, wide_g) = (&halves[..len], &wide[..len], &g[..len], &wide_g[..len]);
            let (mut y, mut z) = (vec![Bf16(7); len], vec![Bf16(7); len]);
            let (mut wide_y, mut wide_z) = (vec![0.0; len], vec![0.0; len]);
            for kind in Kind::ALL {
                activation::forward(level, 2, kind, x, &mut y);
                activation::forward(level, 1, kind, wide, &mut wide_y);
                assert!(bits(&y) == rounded(&wide_y), "{kind:?} at {}", level.name());
                activation::backward(level, 2, kind, g, x, &mut y);
                activation::backward(level, 1, kind, wide_g, wide, &mut wide_y);
                assert!(bits(&y) == rounded(&wide_y), "{kind:?} backward at {}", level.name());
            }
            activation::swiglu(level, 2, x, g, &mut y);
            activation::swiglu(level, 1, wide, wide_g, &mut wide_y);
            assert!(bits(&y) == rounded(&wide_y), "SwiGLU at {}", level.name());
            activation::swiglu_backward(level, 2, g, x, g, &mut y, &mut z);
            activation::swiglu_backward(level, 1, wide_g, wide, wide_g, &mut wide_y, &mut wide_z);
            assert!(
                (bits(&y), bits(&z)) == (rounded(&wide_y), rounded(&wide_z)),
                "SwiGLU backward at {}",
                level.name()
            );
        }
    }
}

proptest! {
    #[test]
    fn a_number_does_not_depend_on_its_place(
        x in prop::collection::vec(-12.0f32..12.0, 1..100), repeat in 1usize..700, threads in 1usize..5
    ) {
        let long: Vec<f32> = x.iter().copied().cycle().take(x.len() * repeat).collect();
        for level in levels() {
            for kind in Kind::ALL {
                let (one, slope) = activated(level, 1, kind, &x);
                let (many, slopes) = activated(level, threads, kind, &long);
                for (i, (y, s)) in many.iter().zip(&slopes).enumerate() {
                    prop_assert_eq!((y.to_bits(), s.to_bits()), (one[i % x.len()].to_bits(), slope[i % x.len()].to_bits()));
                }
            }
        }
    }

    #[test]
    fn swiglu_is_its_formula(
        rows in prop::collection::vec((-9.0f32..9.0, -3.0f32..3.0, -3.0f32..3.0), 1..100), threads in 1usize..4
    ) {
        let a: Vec<f32> = rows.iter().map(|row| row.0).collect();
        let b: Vec<f32> = rows.iter().map(|row| row.1).collect();
        let g: Vec<f32> = rows.iter().map(|row| row.2).collect();
        for level in levels() {
            let [mut y, mut da, mut db] = [(); 3].map(|()| vec![0.0; a.len()]);
            activation::swiglu(level, threads, &a, &b, &mut y);
            activation::swiglu_backward(level, threads, &g, &a, &b, &mut da, &mut db);
            for (i, &(a, b, g)) in rows.iter().enumerate() {
                let (s, slope) = naive::activation(Kind::Silu, f64::from(a));
                let (b, g) = (f64::from(b), f64::from(g));
                prop_assert!((f64::from(y[i]) - s * b).abs() < 1e-5);
                prop_assert!((f64::from(da[i]) - g * b * slope).abs() < 1e-5);
                prop_assert!((f64::from(db[i]) - g * s).abs() < 1e-5);
            }
        }
    }
}

/// Numbers between -1 and 1.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d ^ (seed << 7);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

struct Case {
    shape: Shape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

impl Case {
    fn new(shape: Shape, seed: u64, size: f32) -> Self {
        let queries = shape.batch * shape.queries * shape.heads * shape.width;
        let keys = shape.batch * shape.keys * shape.kv_heads * shape.width;
        let scaled = |len, seed| numbers(len, seed).into_iter().map(|x| size * x).collect();
        let (q, k) = (scaled(queries, seed), scaled(keys, seed + 1));
        Self { shape, q, k, v: numbers(keys, seed + 2), dout: numbers(queries, seed + 3) }
    }

    /// Output and gradients, on tensors whose rows have `gap` numbers between them.
    fn run(&self, level: Level, threads: usize, sight: Sight, gap: usize) -> [Vec<f32>; 4] {
        let Shape { heads, kv_heads, queries, keys, width, .. } = self.shape;
        let spread = |x: &[f32]| -> Vec<f32> {
            x.chunks_exact(width).flat_map(|row| row.iter().copied().chain((0..gap).map(|_| f32::NAN))).collect()
        };
        let strides = |heads, times| Strides::contiguous(times, heads, width + gap);
        let mut out = vec![f32::NAN; self.q.len()];
        let [mut dq, mut dk, mut dv] = [&self.q, &self.k, &self.v].map(|x| vec![f32::NAN; x.len()]);
        let mut log_sums = vec![f32::NAN; self.q.len() / width];
        let [q, k, v, dout] = [&self.q, &self.k, &self.v, &self.dout].map(|x| spread(x));
        {
            let q = Input::new(&q, strides(heads, queries), self.shape, heads, queries);
            let [k, v] = [&k, &v].map(|x| Input::new(x, strides(kv_heads, keys), self.shape, kv_heads, keys));
            let dout = Input::new(&dout, strides(heads, queries), self.shape, heads, queries);
            let mut to = Output::new(&mut out, self.shape, heads, queries);
            attention::forward(level, threads, self.shape, sight, q, k, v, &mut to, &mut log_sums);
            let strides = Strides::contiguous(queries, heads, width);
            let out = Input::new(&out, strides, self.shape, heads, queries);
            let mut dq = Output::new(&mut dq, self.shape, heads, queries);
            let [mut dk, mut dv] = [&mut dk, &mut dv].map(|x| Output::new(x, self.shape, kv_heads, keys));
            attention::backward(
                level, threads, self.shape, sight, dout, q, k, v, out, &log_sums, &mut dq, &mut dk, &mut dv,
            );
        }
        [out, dq, dk, dv]
    }

    fn check(&self, sight: Sight) {
        let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<f64>>();
        let [q, k, v, dout] = [&self.q, &self.k, &self.v, &self.dout].map(|x| wide(x));
        let (out, [dq, dk, dv]) = naive::attention(self.shape, sight, [&q, &k, &v], &dout);
        for level in levels() {
            let found = self.run(level, 1, sight, 0);
            for (name, found, exact) in
                [("out", &found[0], &out), ("dq", &found[1], &dq), ("dk", &found[2], &dk), ("dv", &found[3], &dv)]
            {
                let size = exact.iter().fold(1.0f64, |most, x| most.max(x.abs()));
                for (i, (x, exact)) in found.iter().zip(exact).enumerate() {
                    let error = (f64::from(*x) - exact).abs();
                    assert!(error < 4e-6 * size, "{level:?} {:?} {sight:?} {name}[{i}]: {x} {exact}", self.shape);
                }
            }
            for (threads, gap) in [(2, 0), (3, 0), (1, 3), (64, 8)] {
                assert_eq!(self.run(level, threads, sight, gap), found, "{level:?}, {threads} threads, gap {gap}");
            }
        }
    }
}

const CAUSAL: Sight = Sight { causal: true, window: 0 };

#[test]
fn attention_is_its_formula_at_the_sizes_where_blocks_end() {
    for width in [8, 16, 24, 32, 64, 80, 128] {
        for times in [1, 7, 63, 65] {
            let shape = Shape { batch: 2, heads: 4, kv_heads: 2, queries: times, keys: times, width };
            Case::new(shape, width as u64, 1.0).check(CAUSAL);
        }
    }
    for times in [96, 97, 128, 129, 257] {
        let shape = Shape { batch: 1, heads: 2, kv_heads: 1, queries: times, keys: times, width: 16 };
        for sight in [CAUSAL, Sight { causal: false, window: 0 }, Sight { causal: true, window: 100 }] {
            Case::new(shape, times as u64, 3.0).check(sight);
        }
    }
}

#[test]
fn scores_of_any_size_neither_overflow_nor_vanish() {
    let shape = Shape { batch: 1, heads: 1, kv_heads: 1, queries: 40, keys: 40, width: 8 };
    for level in levels() {
        let case = Case::new(shape, 1, 1e4);
        for x in case.run(level, 1, CAUSAL, 0).iter().flatten() {
            assert!(x.is_finite());
        }
    }
}

#[test]
fn no_batch_is_no_work() {
    let shape = Shape { batch: 0, heads: 2, kv_heads: 2, queries: 5, keys: 5, width: 8 };
    for level in levels() {
        assert_eq!(Case::new(shape, 1, 1.0).run(level, 2, CAUSAL, 0), [const { Vec::new() }; 4]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn attention_is_its_formula(
        (batch, kv_heads, shared) in (1usize..3, 1usize..3, 1usize..4), (queries, before) in (1usize..140, 0usize..40),
        width in 1usize..6, causal: bool, window in prop_oneof![Just(0usize), 1usize..150], seed in 0u64..1000,
    ) {
        let shape = Shape { batch, heads: kv_heads * shared, kv_heads, queries, keys: queries + before, width: 8 * width };
        Case::new(shape, seed, 2.0).check(Sight { causal, window });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn norms_are_their_formulas(
        rows in 1usize..400,
        width in 1usize..200,
        has_weight in any::<bool>(),
        size in prop::sample::select(vec![1e-3f32, 1.0, 1e3]),
        seed in any::<u32>(),
    ) {
        // Numbers that need no generator: those of a line that wraps round.
        let numbers = |len: usize, step: u32, size: f32| -> Vec<f32> {
            (0..len as u32).map(|n| (n.wrapping_mul(step).wrapping_add(seed) as f32 / u32::MAX as f32 - 0.5) * size).collect()
        };
        let (x, g) = (numbers(rows * width, 2_654_435_761, size), numbers(rows * width, 2_246_822_519, 1.0));
        let weight = has_weight.then(|| numbers(width, 3_266_489_917, 2.0));
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (eps, ones) = (1e-5f32, vec![1.0; width]);
        let mut exact = [vec![], vec![], vec![0.0; width]];
        // Of a row's gradient by x two terms of this size cancel, in rows of one number altogether.
        let mut terms = vec![];
        for (x, g) in x.chunks(width).zip(g.chunks(width)) {
            let w = weight.as_deref().map_or(ones.clone(), wide);
            let [y, by_x, by_weight] = naive::rms_norm(&wide(x), &w, f64::from(eps), &wide(g));
            let square = wide(x).iter().map(|x| x * x).sum::<f64>() / width as f64;
            let most = wide(g).iter().zip(&w).fold(0f64, |most, (g, w)| most.max((g * w).abs()));
            terms.push(most / (square + f64::from(eps)).sqrt());
            exact[0].extend(y);
            exact[1].extend(by_x);
            for (sum, part) in exact[2].iter_mut().zip(by_weight) {
                *sum += part;
            }
        }
        for level in levels() {
            let made = |threads: usize| {
                let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                let (mut scales, mut dw) = (vec![0.0; rows], vec![7.0; weight.as_ref().map_or(0, Vec::len)]);
                norm::forward(level, threads, width, eps, &x, weight.as_deref(), &mut y, &mut scales);
                norm::backward(level, threads, width, &g, &x, &scales, weight.as_deref(), &mut dx, &mut dw);
                [y, dx, dw]
            };
            let one = made(1);
            prop_assert_eq!(&one, &made(3), "{:?}: threads change nothing", level);
            // Terms of the size of the greatest cancel in a sum of `width` or of `rows` of them.
            for (n, (made, exact)) in one.iter().zip(&exact).enumerate() {
                let greatest = exact.iter().fold(1e-3f64, |most, x| most.max(x.abs()));
                for (i, (made, exact)) in made.iter().zip(exact).enumerate() {
                    let term = if n == 1 { terms[i / width] } else { 0.0 };
                    let bound = greatest.max(term) * 4e-6 * (rows.max(width) as f64).sqrt();
                    prop_assert!((f64::from(*made) - exact).abs() < bound, "{level:?} {n}: {made} for {exact}, within {bound:e}");
                }
            }
        }
    }
}
