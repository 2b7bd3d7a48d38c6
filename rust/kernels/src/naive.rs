//! The specification: the same functions in float64, one number at a time.

use std::f64::consts::{PI, SQRT_2};

use crate::activation::Kind;
use crate::attention::{Shape, Sight};

/// erfc by its series near 0 and its continued fraction far out (Abramowitz and Stegun 7.1.5, 7.1.14).
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            let n = f64::from(n);
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return 1.0 - 2.0 / PI.sqrt() * sum;
    }
    let fraction = (1..200).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below);
    (-x * x).exp() / PI.sqrt() / fraction
}

/// f(x) and f'(x).
pub fn activation(kind: Kind, x: f64) -> (f64, f64) {
    match kind {
        Kind::Gelu => {
            let phi = 0.5 * erfc(-x / SQRT_2);
            (x * phi, phi + x * (-x * x / 2.0).exp() / (2.0 * PI).sqrt())
        }
        Kind::GeluTanh => {
            let scale = (2.0 / PI).sqrt();
            let tanh = (scale * (x + 0.044_715 * x * x * x)).tanh();
            let inner = scale * (1.0 + 3.0 * 0.044_715 * x * x);
            (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner)
        }
        Kind::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Kind::Relu2 => (x.max(0.0).powi(2), 2.0 * x.max(0.0)),
    }
}

/// RMSNorm of a row: y, and the gradients of Σ y · `g` by x and by the weights.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64, g: &[f64]) -> [Vec<f64>; 3] {
    #[expect(clippy::cast_precision_loss, reason = "widths are small")]
    let width = x.len() as f64;
    let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / width + eps).sqrt();
    let along = x.iter().zip(weight).zip(g).map(|((x, w), g)| g * w * x).sum::<f64>() / width;
    let y = x.iter().zip(weight).map(|(x, w)| x * scale * w).collect();
    let by_x = x.iter().zip(weight).zip(g).map(|((x, w), g)| scale * g * w - x * scale.powi(3) * along).collect();
    [y, by_x, x.iter().zip(g).map(|(x, g)| g * x * scale).collect()]
}

/// Gradients of q, k and v.
pub type Gradients = [Vec<f64>; 3];

/// Attention over contiguous B×T×H×K queries and B×S×G×K keys and values: the output, and the gradients of
/// Σ out · `dout` by q, k and v.
pub fn attention(shape: Shape, sight: Sight, [q, k, v]: [&[f64]; 3], dout: &[f64]) -> (Vec<f64>, Gradients) {
    let Shape { batch, heads, kv_heads, queries, keys, width } = shape;
    #[expect(clippy::cast_precision_loss, reason = "widths are small")]
    let scale = 1.0 / (width as f64).sqrt();
    let row = |b: usize, t: usize, times: usize, h: usize, of: usize| ((b * times + t) * of + h) * width;
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let mut out = vec![0.0; q.len()];
    let mut gradients = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
    for b in 0..batch {
        for h in 0..heads {
            for t in 0..queries {
                let at = row(b, t, queries, h, heads);
                let (q, dout) = (&q[at..at + width], &dout[at..at + width]);
                let seen: Vec<(usize, usize)> = (0..keys)
                    .filter(|&s| sight.sees(shape, t, s))
                    .map(|s| (s, row(b, s, keys, h * kv_heads / heads, kv_heads)))
                    .collect();
                let scores: Vec<f64> = seen.iter().map(|&(_, s)| scale * dot(q, &k[s..s + width])).collect();
                let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - greatest).exp()).sum();
                let weights: Vec<f64> = scores.iter().map(|score| (score - greatest).exp() / total).collect();
                for (p, &(_, s)) in weights.iter().zip(&seen) {
                    for i in 0..width {
                        out[at + i] += p * v[s + i];
                    }
                }
                let mean = dot(dout, &out[at..at + width]);
                for (p, &(_, s)) in weights.iter().zip(&seen) {
                    let ds = p * (dot(dout, &v[s..s + width]) - mean) * scale;
                    for i in 0..width {
                        gradients[0][at + i] += ds * k[s + i];
                        gradients[1][s + i] += ds * q[i];
                        gradients[2][s + i] += p * dout[i];
                    }
                }
            }
        }
    }
    (out, gradients)
}

/// A norm of a row, centred (`LayerNorm`) or not (RMSNorm): y, and the gradients of Σ y · `g` by x, weights and biases.
pub fn norm(x: &[f64], centred: bool, weight: &[f64], bias: &[f64], eps: f64, g: &[f64]) -> [Vec<f64>; 4] {
    #[expect(clippy::cast_precision_loss, reason = "widths are small")]
    let width = x.len() as f64;
    let mean = if centred { x.iter().sum::<f64>() / width } else { 0.0 };
    let scale = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width + eps).sqrt();
    let hat: Vec<f64> = x.iter().map(|x| (x - mean) * scale).collect();
    let h: Vec<f64> = g.iter().zip(weight).map(|(g, w)| g * w).collect();
    let along = h.iter().zip(&hat).map(|(h, x)| h * x).sum::<f64>() / width;
    let level = if centred { h.iter().sum::<f64>() / width } else { 0.0 };
    [
        hat.iter().zip(weight).zip(bias).map(|((x, w), b)| x * w + b).collect(),
        h.iter().zip(&hat).map(|(h, x)| scale * (h - level - x * along)).collect(),
        g.iter().zip(&hat).map(|(g, x)| g * x).collect(),
        g.to_vec(),
    ]
}

/// y = a Wᵀ + b of a row.
pub fn linear(a: &[f64], weight: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    let product = |row: &[f64]| row.iter().zip(a).map(|(w, a)| w * a).sum::<f64>();
    weight.chunks(a.len()).enumerate().map(|(o, row)| product(row) + bias.map_or(0.0, |bias| bias[o])).collect()
}
