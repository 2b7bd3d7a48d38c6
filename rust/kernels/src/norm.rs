//! RMSNorm of rows (Zhang and Sennrich 2019): y = x / √(mean x² + ε) · w, and its gradients.
//!
//! Torch makes a dozen passes over memory of it and its backward; here each is one. What is kept for the backward is one
//! number a row, s = 1 / √(mean x² + ε). With h = g w the gradients are dx = s (h - x s² mean(h x)) and dw = Σ g x s over the
//! rows, summed in groups of rows whose borders do not depend on the number of threads.

use crate::simd::{self, Job, Lanes, Level};
use crate::threads::{self, Pieces};

/// Numbers of one job.
const PIECE: usize = 16_384;

/// y and s, of rows of `weight`'s length; without weights (`None`) of `width`.
///
/// # Panics
/// Lengths differ.
#[expect(clippy::too_many_arguments, reason = "two tensors and what there is to say of them")]
pub fn forward(
    level: Level,
    threads: usize,
    width: usize,
    eps: f32,
    x: &[f32],
    weight: Option<&[f32]>,
    y: &mut [f32],
    scales: &mut [f32],
) {
    let (rows, step) = rows_of(width, x.len());
    assert!(y.len() == x.len() && scales.len() == rows && weight.is_none_or(|weight| weight.len() == width));
    let (y, scales) = (Pieces::new(y, step * width), Pieces::new(scales, step));
    threads::share(threads, rows.div_ceil(step), |index| {
        // SAFETY: every index comes once.
        let (y, scales) = unsafe { (y.piece(index), scales.piece(index)) };
        let from = index * step * width;
        simd::run(level, Forward { width, eps, x: &x[from..from + y.len()], weight, y, scales });
    });
}

/// Gradients by x and, where there are weights, by them.
///
/// # Panics
/// Lengths differ.
#[expect(clippy::too_many_arguments, reason = "six tensors")]
pub fn backward(
    level: Level,
    threads: usize,
    width: usize,
    g: &[f32],
    x: &[f32],
    scales: &[f32],
    weight: Option<&[f32]>,
    dx: &mut [f32],
    dweight: &mut [f32],
) {
    let (rows, step) = rows_of(width, x.len());
    assert!(g.len() == x.len() && dx.len() == x.len() && scales.len() == rows);
    assert!(weight.is_none_or(|weight| weight.len() == width) && dweight.len() == weight.map_or(0, <[f32]>::len));
    let groups = rows.div_ceil(step);
    let mut sums = vec![0.0; groups * dweight.len()];
    let (dx, parts) = (Pieces::new(dx, step * width), Pieces::new(&mut sums, dweight.len()));
    threads::share(threads, groups, |index| {
        // SAFETY: every index comes once.
        let (dx, sums) = unsafe { (dx.piece(index), parts.piece(index)) };
        let (from, row) = (index * step * width, index * step);
        let range = from..from + dx.len();
        let scales = &scales[row..row + dx.len() / width];
        simd::run(level, Backward { width, g: &g[range.clone()], x: &x[range], scales, weight, dx, sums });
    });
    dweight.fill(0.0);
    for part in sums.chunks(dweight.len().max(1)) {
        for (sum, part) in dweight.iter_mut().zip(part) {
            *sum += part;
        }
    }
}

/// A norm as it stands before a linear map.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// LayerNorm (Ba et al. 2016), (x - mean) / √(variance + ε) · w + b; else RMSNorm.
    pub centred: bool,
    /// ε.
    pub eps: f32,
    /// w.
    pub weight: &'a [f32],
    /// b.
    pub bias: Option<&'a [f32]>,
}

impl Norm<'_> {
    pub(crate) fn check(self, width: usize) {
        assert!(self.weight.len() == width && self.bias.is_none_or(|bias| bias.len() == width), "norm of {width}");
    }

    /// Numbers of w and of b.
    pub(crate) fn lens(self) -> [usize; 2] {
        [self.weight.len(), self.bias.map_or(0, <[f32]>::len)]
    }

    /// A row's mean, 0 without centring, and 1 / √(variance + ε).
    #[inline(always)]
    fn of<L: Lanes>(self, lanes: L, x: &[f32]) -> (f32, f32) {
        #[expect(clippy::cast_precision_loss, reason = "widths are small")]
        let share = 1.0 / x.len() as f32;
        let mean =
            if self.centred { share * fold(lanes, [x], |lanes, sum, [x]| lanes.add(sum, x), |[x]| x) } else { 0.0 };
        let m = lanes.splat(mean);
        let vector = |lanes: L, sum: L::V, [x]: [L::V; 1]| {
            let c = lanes.sub(x, m);
            lanes.mul_add(c, c, sum)
        };
        let square = fold(lanes, [x], vector, |[x]| (x - mean) * (x - mean));
        (mean, 1.0 / (square * share + self.eps).sqrt())
    }
}

/// The norm of a row.
#[inline(always)]
pub(crate) fn of_row<L: Lanes>(lanes: L, norm: Norm<'_>, x: &[f32], y: &mut [f32]) {
    let (mean, scale) = norm.of(lanes, x);
    let (m, s) = (lanes.splat(mean), lanes.splat(scale));
    match norm.bias {
        None => map(
            lanes,
            [x, norm.weight],
            y,
            |lanes, [x, w]| lanes.mul(lanes.mul(lanes.sub(x, m), s), w),
            |[x, w]| (x - mean) * scale * w,
        ),
        Some(bias) => map(
            lanes,
            [x, norm.weight, bias],
            y,
            |lanes, [x, w, b]| lanes.mul_add(lanes.mul(lanes.sub(x, m), s), w, b),
            |[x, w, b]| (x - mean) * scale * w + b,
        ),
    }
}

/// The norm of a row and the gradients by it; those by w, then b, are added to `sums`.
///
/// With x̂ = (x - mean) s and h = g w: dx = s (h - mean(h) - x̂ mean(h x̂)), without mean(h) where nothing was centred;
/// dw = g x̂, db = g.
#[inline(always)]
pub(crate) fn both_of_row<L: Lanes>(
    lanes: L,
    norm: Norm<'_>,
    g: &[f32],
    x: &[f32],
    y: &mut [f32],
    dx: &mut [f32],
    sums: &mut [f32],
) {
    of_row(lanes, norm, x, y);
    let (mean, scale) = norm.of(lanes, x);
    let (m, s, w) = (lanes.splat(mean), lanes.splat(scale), norm.weight);
    #[expect(clippy::cast_precision_loss, reason = "widths are small")]
    let share = 1.0 / x.len() as f32;
    let hat = |lanes: L, x: L::V| lanes.mul(lanes.sub(x, m), s);
    let along = share
        * fold(
            lanes,
            [g, x, w],
            |lanes, sum, [g, x, w]| lanes.mul_add(lanes.mul(g, w), hat(lanes, x), sum),
            |[g, x, w]| g * w * ((x - mean) * scale),
        );
    let level = if norm.centred {
        share * fold(lanes, [g, w], |lanes, sum, [g, w]| lanes.mul_add(g, w, sum), |[g, w]| g * w)
    } else {
        0.0
    };
    let (a, l) = (lanes.splat(along), lanes.splat(level));
    map(
        lanes,
        [g, x, w],
        dx,
        |lanes, [g, x, w]| lanes.mul(s, lanes.sub(lanes.sub(lanes.mul(g, w), l), lanes.mul(hat(lanes, x), a))),
        |[g, x, w]| scale * (g * w - level - (x - mean) * scale * along),
    );
    let (by_weight, by_bias) = sums.split_at_mut(w.len());
    add(
        lanes,
        [g, x],
        by_weight,
        |lanes, sum, [g, x]| lanes.mul_add(g, hat(lanes, x), sum),
        |[g, x]| g * ((x - mean) * scale),
    );
    if !by_bias.is_empty() {
        add(lanes, [g], by_bias, |lanes, sum, [g]| lanes.add(sum, g), |[g]| g);
    }
}

/// x / √(mean x² + ε) in place; gives the scale for [`back_from_unit`].
#[inline(always)]
pub(crate) fn to_unit<L: Lanes>(lanes: L, x: &mut [f32], eps: f32) -> f32 {
    let norm = Norm { centred: false, eps, weight: &[], bias: None };
    let (_, scale) = norm.of(lanes, x);
    for x in x {
        *x *= scale;
    }
    scale
}

/// The gradient by [`to_unit`]'s argument from that by its result y, in place: s (g - y mean(g y)).
#[inline(always)]
pub(crate) fn back_from_unit<L: Lanes>(lanes: L, g: &mut [f32], y: &[f32], scale: f32) {
    #[expect(clippy::cast_precision_loss, reason = "widths are small")]
    let share = 1.0 / y.len() as f32;
    let along = share * fold(lanes, [g, y], |lanes, sum, [g, y]| lanes.mul_add(g, y, sum), |[g, y]| g * y);
    for (g, y) in g.iter_mut().zip(y) {
        *g = scale * (*g - y * along);
    }
}

/// Rows, and how many of them a job takes.
fn rows_of(width: usize, len: usize) -> (usize, usize) {
    assert!(width > 0 && len.is_multiple_of(width));
    (len / width, (PIECE / width).max(1))
}

struct Forward<'a> {
    width: usize,
    eps: f32,
    x: &'a [f32],
    weight: Option<&'a [f32]>,
    y: &'a mut [f32],
    scales: &'a mut [f32],
}

impl Job for Forward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { width, eps, x, weight, y, scales } = self;
        #[expect(clippy::cast_precision_loss, reason = "widths are small")]
        let share = 1.0 / width as f32;
        for ((x, y), scale) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(scales) {
            let square = fold(lanes, [x], |lanes, sum, [x]| lanes.mul_add(x, x, sum), |[x]| x * x);
            *scale = 1.0 / (square * share + eps).sqrt();
            let (s, each) = (lanes.splat(*scale), *scale);
            match weight {
                None => map(lanes, [x], y, |lanes, [x]| lanes.mul(x, s), |[x]| x * each),
                Some(w) => {
                    let vector = |lanes: L, [x, w]: [L::V; 2]| lanes.mul(lanes.mul(x, s), w);
                    map(lanes, [x, w], y, vector, |[x, w]| x * each * w);
                }
            }
        }
    }
}

struct Backward<'a> {
    width: usize,
    g: &'a [f32],
    x: &'a [f32],
    scales: &'a [f32],
    weight: Option<&'a [f32]>,
    dx: &'a mut [f32],
    /// Gradients by the weights, of these rows; nothing where there are no weights.
    sums: &'a mut [f32],
}

impl Job for Backward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { width, g, x, scales, weight, dx, sums } = self;
        #[expect(clippy::cast_precision_loss, reason = "widths are small")]
        let share = 1.0 / width as f32;
        let rows = g.chunks_exact(width).zip(x.chunks_exact(width));
        for (((g, x), dx), &scale) in rows.zip(dx.chunks_exact_mut(width)).zip(scales) {
            let s = lanes.splat(scale);
            let Some(w) = weight else {
                let along = fold(lanes, [g, x], |lanes, sum, [g, x]| lanes.mul_add(g, x, sum), |[g, x]| g * x);
                let back = scale * scale * along * share;
                let b = lanes.splat(back);
                let vector = |lanes: L, [g, x]: [L::V; 2]| lanes.mul(s, lanes.sub(g, lanes.mul(x, b)));
                map(lanes, [g, x], dx, vector, |[g, x]| scale * (g - x * back));
                continue;
            };
            let along = fold(
                lanes,
                [g, x, w],
                |lanes, sum, [g, x, w]| lanes.mul_add(lanes.mul(g, w), x, sum),
                |[g, x, w]| g * w * x,
            );
            let back = scale * scale * along * share;
            let b = lanes.splat(back);
            let vector = |lanes: L, [g, x, w]: [L::V; 3]| lanes.mul(s, lanes.sub(lanes.mul(g, w), lanes.mul(x, b)));
            map(lanes, [g, x, w], dx, vector, |[g, x, w]| scale * (g * w - x * back));
            add(
                lanes,
                [g, x],
                sums,
                |lanes, sum, [g, x]| lanes.mul_add(lanes.mul(g, x), s, sum),
                |[g, x]| g * x * scale,
            );
        }
    }
}

/// The sum over a row: vectors into lanes that are added up at the end, and what fills no vector.
#[inline(always)]
fn fold<L: Lanes, const N: usize>(
    lanes: L,
    from: [&[f32]; N],
    vector: impl Fn(L, L::V, [L::V; N]) -> L::V,
    one: impl Fn([f32; N]) -> f32,
) -> f32 {
    let (len, mut sum) = (shortest(from), lanes.splat(0.0));
    let whole = len - len % L::WIDTH;
    for at in (0..whole).step_by(L::WIDTH) {
        // SAFETY: at + WIDTH ≤ len, which all have.
        sum = vector(lanes, sum, from.map(|x| unsafe { lanes.load(x.as_ptr().add(at)) }));
    }
    (whole..len).fold(lanes.sum(sum), |sum, at| sum + one(from.map(|x| x[at])))
}

/// What a row becomes.
#[inline(always)]
fn map<L: Lanes, const N: usize>(
    lanes: L,
    from: [&[f32]; N],
    to: &mut [f32],
    vector: impl Fn(L, [L::V; N]) -> L::V,
    one: impl Fn([f32; N]) -> f32,
) {
    let len = shortest(from).min(to.len());
    let whole = len - len % L::WIDTH;
    for at in (0..whole).step_by(L::WIDTH) {
        // SAFETY: at + WIDTH ≤ len, which all have.
        unsafe {
            let made = vector(lanes, from.map(|x| lanes.load(x.as_ptr().add(at))));
            lanes.store(to.as_mut_ptr().add(at), made);
        }
    }
    for at in whole..len {
        to[at] = one(from.map(|x| x[at]));
    }
}

/// What a row adds to numbers that are there.
#[inline(always)]
fn add<L: Lanes, const N: usize>(
    lanes: L,
    from: [&[f32]; N],
    to: &mut [f32],
    vector: impl Fn(L, L::V, [L::V; N]) -> L::V,
    one: impl Fn([f32; N]) -> f32,
) {
    let len = shortest(from).min(to.len());
    let whole = len - len % L::WIDTH;
    for at in (0..whole).step_by(L::WIDTH) {
        // SAFETY: at + WIDTH ≤ len, which all have.
        unsafe {
            let place = to.as_mut_ptr().add(at);
            let sum = vector(lanes, lanes.load(place), from.map(|x| lanes.load(x.as_ptr().add(at))));
            lanes.store(place, sum);
        }
    }
    for at in whole..len {
        to[at] += one(from.map(|x| x[at]));
    }
}

#[inline(always)]
fn shortest<const N: usize>(rows: [&[f32]; N]) -> usize {
    rows.iter().map(|row| row.len()).min().unwrap_or(0)
}
