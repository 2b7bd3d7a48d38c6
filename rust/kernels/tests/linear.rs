//! Linear maps at every level against float64, and blocks against the maps, attentions and norms that they are made of.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, missing_docs, reason = "a test")]
#![allow(clippy::many_single_char_names, clippy::similar_names, reason = "the field's names")]

use bytekiln_kernels::activation::Kind;
use bytekiln_kernels::attention::{self, Input, Output, Shape, Sight, Strides};
use bytekiln_kernels::block::{self, Block, Maps};
use bytekiln_kernels::linear::{self, Before, Gradients, Linear, Map};
use bytekiln_kernels::naive;
use bytekiln_kernels::norm::{self, Norm};
use bytekiln_kernels::simd::Level;
use proptest::prelude::*;

const EPS: f32 = 1e-5;

fn levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|level| level.is_here()).collect()
}

/// Numbers of about a normal distribution.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (0..6).map(|_| next()).sum::<f32>() * 1.4).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[derive(Clone, Copy, Debug)]
enum First {
    Nothing,
    Norm { centred: bool, bias: bool },
    Activation(Kind),
    Swiglu,
}

fn firsts() -> impl Strategy<Value = First> {
    prop_oneof![
        Just(First::Nothing),
        (any::<bool>(), any::<bool>()).prop_map(|(centred, bias)| First::Norm { centred, bias }),
        prop::sample::select(Kind::ALL.to_vec()).prop_map(First::Activation),
        Just(First::Swiglu),
    ]
}

/// What a map gives: y of each, and the gradients by x, second x, weights, biases, the norm's weight and bias.
#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    y: Vec<Vec<f32>>,
    x: [Vec<f32>; 2],
    weights: Vec<Vec<f32>>,
    biases: Vec<Vec<f32>>,
    norm: [Vec<f32>; 2],
}

fn outcome(level: Level, threads: usize, linear: &Linear<'_>, residual: Option<&[f32]>, g: &[Vec<f32>]) -> Outcome {
    let dirt = |len: usize| vec![f32::NAN; len];
    let mut y: Vec<Vec<f32>> = g.iter().map(|g| dirt(g.len())).collect();
    linear::forward(level, threads, linear, residual, &mut y.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
    let mut x = linear.x.map(|x| dirt(x.len()));
    let mut weights: Vec<_> = linear.maps.iter().map(|map| dirt(map.weight.len())).collect();
    let mut biases: Vec<_> = linear.maps.iter().map(|map| dirt(map.bias.map_or(0, <[f32]>::len))).collect();
    let mut norm = match linear.before {
        Before::Norm(norm) => [dirt(linear.ins), dirt(norm.bias.map_or(0, <[f32]>::len))],
        _ => [vec![], vec![]],
    };
    let ([x0, x1], [n0, n1]) = (&mut x, &mut norm);
    let mut to = Gradients {
        x: [x0, x1],
        weights: weights.iter_mut().map(Vec::as_mut_slice).collect(),
        biases: biases.iter_mut().map(Vec::as_mut_slice).collect(),
        norm: [n0, n1],
    };
    linear::backward(level, threads, linear, &g.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut to);
    Outcome { y, x, weights, biases, norm }
}

/// |found - exact| ≤ `share` of the terms that were added up, for each number.
fn close(name: &str, found: &[f32], exact: &[f64], terms: &[f64], share: f64) {
    assert_eq!(found.len(), exact.len());
    for (i, ((&found, exact), terms)) in found.iter().zip(exact).zip(terms).enumerate() {
        let error = (f64::from(found) - exact).abs();
        assert!(error <= share * terms, "{name}[{i}]: {found} for {exact}, an error of {error:e}, terms {terms:e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Errors are measured against what is added up: float32 keeps seven digits of each term.
    #[test]
    fn maps_are_their_formulas(
        first in firsts(), rows in prop_oneof![6 => 1usize..150, 1 => 500usize..560],
        ins in prop_oneof![6 => 1usize..6, 1 => 9usize..11],
        outs in prop_oneof![6 => prop::collection::vec(1usize..4, 1..4), 1 => Just(vec![9])],
        biased in any::<bool>(), added in any::<bool>(), seed in 1u64..u64::MAX,
    ) {
        let ins = 32 * ins;
        let outs: Vec<usize> = outs.iter().map(|o| 32 * o).collect();
        let x = numbers(rows * ins, seed);
        let second = if matches!(first, First::Swiglu) { numbers(rows * ins, seed ^ 1) } else { vec![] };
        let (nw, nb) = (numbers(ins, seed ^ 2), numbers(ins, seed ^ 3));
        let weights: Vec<_> = outs.iter().zip(4..).map(|(o, i)| numbers(o * ins, seed ^ i)).collect();
        let biases: Vec<_> = outs.iter().zip(14..).map(|(o, i)| numbers(*o, seed ^ i)).collect();
        let g: Vec<_> = outs.iter().zip(24..).map(|(o, i)| numbers(rows * o, seed ^ i)).collect();
        let residual = (added && outs.len() == 1).then(|| numbers(rows * outs[0], seed ^ 0x40));
        let before = match first {
            First::Nothing => Before::Nothing,
            First::Norm { centred, bias } => {
                Before::Norm(Norm { centred, eps: EPS, weight: &nw, bias: bias.then_some(&nb) })
            }
            First::Activation(kind) => Before::Activation(kind),
            First::Swiglu => Before::Swiglu,
        };
        let maps: Vec<_> = weights.iter().zip(&biases)
            .map(|(weight, bias)| Map { weight, bias: biased.then_some(bias) }).collect();
        let linear = Linear { ins, before, x: [&x, &second], maps: &maps };

        // In float64: values, and the sizes of what they are sums of.
        let mut y: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); outs.len()];
        let mut dx: [(Vec<f64>, Vec<f64>); 2] = Default::default();
        let mut dw: Vec<_> = weights.iter().map(|w| (vec![0.0; w.len()], vec![0.0; w.len()])).collect();
        let mut db: Vec<_> = outs.iter().map(|&o| (vec![0.0; o], vec![0.0; o])).collect();
        let mut dn = [(); 2].map(|()| (vec![0.0; ins], vec![0.0; ins]));
        let sizes = |x: &[f64]| x.iter().map(|x| x.abs()).collect::<Vec<_>>();
        let weights64: Vec<_> = weights.iter().map(|w| wide(w)).collect();
        for row in 0..rows {
            let x = wide(&x[row * ins..(row + 1) * ins]);
            let b = if second.is_empty() { vec![] } else { wide(&second[row * ins..(row + 1) * ins]) };
            let (mut da, mut da_size) = (vec![0.0; ins], vec![0.0; ins]);
            for ((w, g), o) in weights64.iter().zip(&g).zip(&outs) {
                for (g, w) in wide(&g[row * o..(row + 1) * o]).iter().zip(w.chunks(ins)) {
                    for i in 0..ins {
                        da[i] += g * w[i];
                        da_size[i] += (g * w[i]).abs();
                    }
                }
            }
            let a: Vec<f64> = match first {
                First::Nothing => {
                    dx[0].0.extend(&da);
                    dx[0].1.extend(&da_size);
                    x
                }
                First::Norm { centred, bias } => {
                    let none = vec![0.0; ins];
                    let (w64, b64) = (wide(&nw), if bias { wide(&nb) } else { none });
                    let [a, by_x, by_w, by_b] = naive::norm(&x, centred, &w64, &b64, f64::from(EPS), &da);
                    let share = 1.0 / ins as f64;
                    let most = x.iter().map(|x| x.abs()).fold(1.0, f64::max);
                    let mean = x.iter().sum::<f64>() * share * f64::from(u8::from(centred));
                    let scale = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() * share + 1e-5).sqrt();
                    let level: f64 = da_size.iter().zip(&w64).map(|(g, w)| (g * w).abs()).sum::<f64>() * share;
                    dx[0].0.extend(&by_x);
                    dx[0].1.extend(da_size.iter().zip(&w64).map(|(g, w)| {
                        scale * ((g * w).abs() + level + (most * scale).powi(2) * level)
                    }));
                    for i in 0..ins {
                        dn[0].0[i] += by_w[i];
                        dn[0].1[i] += da_size[i] * most * scale;
                        dn[1].0[i] += by_b[i];
                        dn[1].1[i] += da_size[i];
                    }
                    a
                }
                First::Activation(kind) => {
                    let made: Vec<_> = x.iter().map(|&x| naive::activation(kind, x)).collect();
                    dx[0].0.extend(made.iter().zip(&da).map(|((_, slope), g)| g * slope));
                    dx[0].1.extend(made.iter().zip(&da_size).map(|((_, slope), g)| g * slope.abs().max(1.0)));
                    made.iter().map(|(y, _)| *y).collect()
                }
                First::Swiglu => {
                    let made: Vec<_> = x.iter().map(|&x| naive::activation(Kind::Silu, x)).collect();
                    for i in 0..ins {
                        dx[0].0.push(da[i] * b[i] * made[i].1);
                        dx[0].1.push(da_size[i] * b[i].abs().max(1.0) * made[i].1.abs().max(1.0));
                        dx[1].0.push(da[i] * made[i].0);
                        dx[1].1.push(da_size[i] * made[i].0.abs().max(1.0));
                    }
                    made.iter().zip(&b).map(|((y, _), b)| y * b).collect()
                }
            };
            let a_size: Vec<f64> = a.iter().map(|a| a.abs() + 1.0).collect();
            for (m, o) in outs.iter().enumerate() {
                let bias = biased.then(|| wide(&biases[m]));
                let mut made = naive::linear(&a, &weights64[m], bias.as_deref());
                let size = naive::linear(&a_size, &sizes(&weights64[m]), bias.map(|bias| sizes(&bias)).as_deref());
                if let Some(residual) = &residual {
                    for (y, r) in made.iter_mut().zip(&residual[row * o..]) {
                        *y += f64::from(*r);
                    }
                }
                y[m].0.extend(&made);
                y[m].1.extend(size.iter().map(|size| size + 5.0));
                for (j, g) in wide(&g[m][row * o..(row + 1) * o]).into_iter().enumerate() {
                    db[m].0[j] += g;
                    db[m].1[j] += g.abs();
                    for i in 0..ins {
                        dw[m].0[j * ins + i] += g * a[i];
                        dw[m].1[j * ins + i] += g.abs() * a_size[i];
                    }
                }
            }
        }
        for level in levels() {
            let found = outcome(level, 1, &linear, residual.as_deref(), &g);
            for m in 0..outs.len() {
                close("y", &found.y[m], &y[m].0, &y[m].1, 1e-6);
                close("dW", &found.weights[m], &dw[m].0, &dw[m].1, 1e-6);
                if biased {
                    close("db", &found.biases[m], &db[m].0, &db[m].1, 1e-6);
                }
            }
            close("dx", &found.x[0], &dx[0].0, &dx[0].1, 2e-6);
            close("second dx", &found.x[1], &dx[1].0, &dx[1].1, 2e-6);
            for (found, (exact, terms)) in found.norm.iter().zip(&dn).filter(|(found, _)| !found.is_empty()) {
                close("dnorm", found, exact, terms, 2e-6);
            }
            for threads in 2..5 {
                prop_assert!(found == outcome(level, threads, &linear, residual.as_deref(), &g), "{threads} threads");
            }
        }
    }

    #[test]
    fn blocks_are_made_of_maps_and_attention(
        sizes in (1usize..4, 1usize..70), heads in 0usize..5, norm in 0usize..3, ffn in 0usize..5, biased in any::<bool>(),
        rotary in any::<bool>(), qk_norm in any::<bool>(), causal in any::<bool>(), window in 0usize..20,
        threads in 1usize..4, seed in 1u64..u64::MAX,
    ) {
        let (batch, places) = sizes;
        let (heads, kv_heads, head) = [(4, 4, 8), (2, 1, 32), (4, 2, 16), (1, 1, 96), (8, 4, 8)][heads];
        let (d, wide, q, kv) = (64, 96, heads * head, kv_heads * head);
        let window = if causal { window } else { 0 };
        let rows = batch * places;
        let make = |len: usize, index: u64| -> Vec<f32> {
            numbers(len, seed ^ index).iter().map(|x| 0.3 * x).collect()
        };
        let (x, g) = (numbers(rows * d, seed ^ 0x100), numbers(rows * d, seed ^ 0x101));
        let sizes = [(q, d), (kv, d), (kv, d), (d, q), (wide, d), (wide, d), (d, wide)];
        let weights: Vec<_> = sizes.iter().zip(0..).map(|((o, i), n)| make(o * i, n)).collect();
        let biases: Vec<_> = sizes.iter().zip(10..).map(|((o, _), n)| make(*o, n)).collect();
        let norms: Vec<_> = (20..24).map(|n| make(d, n)).collect();
        let norm_of = |i: usize| (norm > 0).then(|| Norm {
            centred: norm == 2, eps: EPS, weight: &norms[2 * i], bias: (norm == 2 && biased).then(|| &norms[2 * i + 1][..]),
        });
        let map = |i: usize| Map { weight: &weights[i], bias: biased.then(|| &biases[i][..]) };
        let activation = Kind::ALL.get(ffn).copied();
        let shape = Shape { batch, heads, kv_heads, queries: places, keys: places, width: head };
        let sight = Sight { causal, window };
        let angles: Vec<f32> = (0..places * head / 2).map(|i| (i * 7 % 13) as f32).collect();
        let tables = [angles.iter().map(|a| a.cos()).collect::<Vec<_>>(), angles.iter().map(|a| a.sin()).collect()];
        let whole = Block {
            shape, sight, width: d, norms: [norm_of(0), norm_of(1)],
            rotary: rotary.then(|| [&tables[0][..], &tables[1][..]]), qk_norm: qk_norm.then_some(EPS), activation,
            maps: Maps {
                qkv: [map(0), map(1), map(2)], out: map(3), up: map(4), gate: activation.is_none().then(|| map(5)),
                down: map(6),
            },
        };
        let before = |i: usize| norm_of(i).map_or(Before::Nothing, Before::Norm);
        let turn = |x: &mut [f32], heads: usize, sign: f32| if rotary {
            for (row, x) in x.chunks_exact_mut(heads * head).enumerate() {
                for x in x.chunks_exact_mut(head) {
                    for (i, x) in x.chunks_exact_mut(2).enumerate() {
                        let at = row % places * head / 2 + i;
                        let (a, b, cos, sin) = (x[0], x[1], tables[0][at], sign * tables[1][at]);
                        (x[0], x[1]) = (a * cos - b * sin, a * sin + b * cos);
                    }
                }
            }
        };
        for level in levels() {
            // Step by step.
            let qkv_maps = [map(0), map(1), map(2)];
            let enter = Linear { ins: d, before: before(0), x: [&x, &[]], maps: &qkv_maps };
            let mut made = [vec![0.0; rows * q], vec![0.0; rows * kv], vec![0.0; rows * kv]];
            linear::forward(level, 1, &enter, None, &mut made.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
            let [mut qs, mut ks, vs] = made;
            turn(&mut qs, heads, 1.0);
            turn(&mut ks, kv_heads, 1.0);
            let raw = [qs.clone(), ks.clone()];
            let mut scales = [vec![0.0; rows * heads], vec![0.0; rows * kv_heads]];
            if qk_norm {
                norm::forward(level, 1, head, EPS, &raw[0], None, &mut qs, &mut scales[0]);
                norm::forward(level, 1, head, EPS, &raw[1], None, &mut ks, &mut scales[1]);
            }
            let input = |x, heads| Input::new(x, Strides::contiguous(places, heads, head), shape, heads, places);
            let (mut mixed, mut logs) = (vec![0.0; rows * q], vec![0.0; rows * heads]);
            let (qi, ki, vi) = (input(&qs, heads), input(&ks, kv_heads), input(&vs, kv_heads));
            let mut out = Output::new(&mut mixed, shape, heads, places);
            attention::forward(level, 1, shape, sight, qi, ki, vi, &mut out, &mut logs);
            let out_maps = [map(3)];
            let leave = Linear { ins: q, before: Before::Nothing, x: [&mixed, &[]], maps: &out_maps };
            let mut h = vec![0.0; rows * d];
            linear::forward(level, 1, &leave, Some(&x), &mut [&mut h]);
            let up_maps: Vec<_> = [Some(map(4)), activation.is_none().then(|| map(5))].into_iter().flatten().collect();
            let widen = Linear { ins: d, before: before(1), x: [&h, &[]], maps: &up_maps };
            let mut ups = vec![vec![0.0; rows * wide]; up_maps.len()];
            linear::forward(level, 1, &widen, None, &mut ups.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
            let down_maps = [map(6)];
            let narrow = Linear {
                ins: wide, before: activation.map_or(Before::Swiglu, Before::Activation),
                x: [&ups[0], ups.get(1).map_or(&[], Vec::as_slice)], maps: &down_maps,
            };
            let of_narrow = outcome(level, 1, &narrow, Some(&h), std::slice::from_ref(&g));
            let of_widen = outcome(level, 1, &widen, None, &of_narrow.x[..up_maps.len()]);
            let dh: Vec<f32> = of_widen.x[0].iter().zip(&g).map(|(a, b)| a + b).collect();
            let of_leave = outcome(level, 1, &leave, Some(&x), std::slice::from_ref(&dh));
            let mut back = [vec![0.0; rows * q], vec![0.0; rows * kv], vec![0.0; rows * kv]];
            {
                let [dq, dk, dv] = &mut back;
                let [mut dq, mut dk, mut dv] = [(dq, heads), (dk, kv_heads), (dv, kv_heads)]
                    .map(|(to, heads)| Output::new(to, shape, heads, places));
                let dout = input(&of_leave.x[0], heads);
                let out = input(&mixed, heads);
                attention::backward(level, 1, shape, sight, dout, qi, ki, vi, out, &logs, &mut dq, &mut dk, &mut dv);
            }
            if qk_norm {
                for (i, heads) in [heads, kv_heads].into_iter().enumerate() {
                    let g = back[i].clone();
                    assert_eq!(g.len(), rows * heads * head);
                    norm::backward(level, 1, head, &g, &raw[i], &scales[i], None, &mut back[i], &mut []);
                }
            }
            turn(&mut back[0], heads, -1.0);
            turn(&mut back[1], kv_heads, -1.0);
            let of_enter = outcome(level, 1, &enter, None, &back);
            let dx: Vec<f32> = of_enter.x[0].iter().zip(&dh).map(|(a, b)| a + b).collect();

            // At once.
            let (mut kept, mut y) = (vec![f32::NAN; whole.kept()], vec![f32::NAN; x.len()]);
            block::forward(level, threads, &whole, &x, &mut kept, &mut y);
            prop_assert_eq!(&y, &of_narrow.y[0]);
            let mut maps: Vec<[Vec<f32>; 2]> = (0..7).filter(|&i| i != 5 || activation.is_none())
                .map(|i| [vec![f32::NAN; weights[i].len()], vec![f32::NAN; if biased { biases[i].len() } else { 0 }]])
                .collect();
            let lens = [norm_of(0), norm_of(1)].map(|norm| norm.map_or([0, 0], |n| [d, n.bias.map_or(0, <[f32]>::len)]));
            let mut dnorms = lens.map(|lens| lens.map(|len| vec![f32::NAN; len]));
            let mut by_x = vec![f32::NAN; x.len()];
            let mut to = block::Gradients {
                x: &mut by_x,
                maps: maps.iter_mut().map(|[w, b]| [&mut w[..], &mut b[..]]).collect(),
                norms: dnorms.each_mut().map(|norm| norm.each_mut().map(Vec::as_mut_slice)),
            };
            block::backward(level, threads, &whole, &x, &kept, &g, &mut to);
            let mut expected: Vec<[&Vec<f32>; 2]> = Vec::new();
            for of in [&of_enter, &of_leave, &of_widen, &of_narrow] {
                expected.extend(of.weights.iter().zip(&of.biases).map(|(w, b)| [w, b]));
            }
            let mut pairs = vec![("x", &by_x, &dx)];
            for ((name, found), expected) in ["q", "k", "v", "out", "up", "gate or down", "down"].iter().zip(&maps).zip(expected) {
                pairs.extend(found.iter().zip(expected).map(|(f, e)| (*name, f, e)));
            }
            for (found, of) in dnorms.iter().zip([&of_enter, &of_widen]) {
                pairs.extend(found.iter().zip(&of.norm).map(|(f, e)| ("norm", f, e)));
            }
            for (name, found, expected) in pairs {
                // The gradient of the norm of queries and keys is worked out from its result, not from its argument.
                let largest = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
                let bound = if qk_norm { 1e-5 * (1.0 + largest) } else { 0.0 };
                for (i, (f, e)) in found.iter().zip(expected).enumerate() {
                    prop_assert!((f - e).abs() <= bound, "{} at {}: {} for {}, {:?}", name, i, f, e, level);
                }
                prop_assert_eq!(found.len(), expected.len());
            }
        }
    }
}
