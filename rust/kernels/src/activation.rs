//! Activations of a feed-forward, element by element.
//!
//! What is kept for the backward are the inputs, and f is worked out again there: to write dy/dx beside y costs more
//! time in memory than the arithmetic takes (a third more for both passes of a GELU in a training step).
//!
//! bf16 numbers are computed with in float32 and rounded once. Absolute errors are those of float32 itself, a few units in the last place of y. At the ends the limits hold:
//! gelu(-∞) = -0 with slope 0, gelu(∞) = ∞ with slope 1.

use crate::number::{self, Number};
use crate::simd::{self, Job, Lanes, Level, MOST_LANES};
use crate::threads::{self, Pieces};

/// Numbers of one job: 64 KiB, so that x, y and the derivative stay in a core's cache and waking a thread pays.
const PIECE: usize = 16_384;
/// x beyond which nothing changes: exp(-14²/2) and exp(-104) are no normal floats.
const GELU_END: f32 = 14.0;
const SIGMOID_END: f32 = 104.0;
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// x Φ(x) with the normal distribution Φ (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its approximation x σ(2 √(2/π) (x + 0.044715 x³)), GPT-2's.
    GeluTanh,
    /// x σ(x).
    Silu,
    /// max(x, 0)² (So et al. 2021).
    Relu2,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Gelu, Self::GeluTanh, Self::Silu, Self::Relu2];

    /// As the model's config spells it.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "gelu" => Some(Self::Gelu),
            "gelu_tanh" => Some(Self::GeluTanh),
            "silu" => Some(Self::Silu),
            "relu2" => Some(Self::Relu2),
            _ => None,
        }
    }
}

/// y = f(x).
///
/// # Panics
/// Lengths differ.
pub fn forward<N: Number>(level: Level, threads: usize, kind: Kind, x: &[N], y: &mut [N]) {
    let y = pieces(y, x.len());
    threads::share(threads, x.len().div_ceil(PIECE), |index| {
        let range = range_of(index, x.len());
        // SAFETY: every index comes once.
        let y = unsafe { y.piece(index) };
        simd::run(level, Forward { kind, x: &x[range], y });
    });
}

/// dx = g f'(x).
///
/// # Panics
/// Lengths differ.
pub fn backward<N: Number>(level: Level, threads: usize, kind: Kind, g: &[N], x: &[N], dx: &mut [N]) {
    assert_eq!(g.len(), x.len());
    let dx = pieces(dx, x.len());
    threads::share(threads, x.len().div_ceil(PIECE), |index| {
        let range = range_of(index, x.len());
        // SAFETY: every index comes once.
        let dx = unsafe { dx.piece(index) };
        simd::run(level, Backward { kind, g: &g[range.clone()], x: &x[range], dx });
    });
}

/// y = silu(a) · b.
///
/// # Panics
/// Lengths differ.
pub fn swiglu<N: Number>(level: Level, threads: usize, a: &[N], b: &[N], y: &mut [N]) {
    assert_eq!(a.len(), b.len());
    let y = pieces(y, a.len());
    threads::share(threads, a.len().div_ceil(PIECE), |index| {
        let range = range_of(index, a.len());
        // SAFETY: every index comes once.
        let y = unsafe { y.piece(index) };
        simd::run(level, Swiglu { a: &a[range.clone()], b: &b[range], y });
    });
}

/// Gradients of [`swiglu`]: da = g b silu'(a), db = g silu(a).
///
/// # Panics
/// Lengths differ.
pub fn swiglu_backward<N: Number>(level: Level, threads: usize, g: &[N], a: &[N], b: &[N], da: &mut [N], db: &mut [N]) {
    assert!(a.len() == b.len() && a.len() == g.len());
    let (da, db) = (pieces(da, a.len()), pieces(db, a.len()));
    threads::share(threads, a.len().div_ceil(PIECE), |index| {
        let range = range_of(index, a.len());
        // SAFETY: every index comes once.
        let (da, db) = unsafe { (da.piece(index), db.piece(index)) };
        simd::run(level, SwigluBackward { g: &g[range.clone()], a: &a[range.clone()], b: &b[range], da, db });
    });
}

fn pieces<N>(out: &mut [N], len: usize) -> Pieces<'_, N> {
    assert_eq!(out.len(), len);
    Pieces::new(out, PIECE)
}

fn range_of(index: usize, len: usize) -> std::ops::Range<usize> {
    index * PIECE..len.min((index + 1) * PIECE)
}

/// M functions of N numbers.
trait Curves<const N: usize, const M: usize> {
    /// Must be `#[inline(always)]`.
    fn at<L: Lanes>(lanes: L, x: [L::V; N]) -> [L::V; M];
}

/// Vector by vector; the rest that fills none goes through one of its own, so that a number's result does not depend
/// on its place.
#[inline(always)]
fn map<L: Lanes, C: Curves<N, M>, T: Number, const N: usize, const M: usize>(
    lanes: L,
    x: [&[T]; N],
    mut y: [&mut [T]; M],
) {
    let len = x[0].len();
    for x in x {
        assert_eq!(x.len(), len);
    }
    for y in &y {
        assert_eq!(y.len(), len);
    }
    let whole = len - len % L::WIDTH;
    let mut vectors = [lanes.splat(0.0); N];
    for at in (0..whole).step_by(L::WIDTH) {
        // SAFETY: at + WIDTH ≤ len, the length of all of them.
        unsafe {
            for (vector, x) in vectors.iter_mut().zip(x) {
                *vector = number::load(lanes, x.as_ptr().add(at));
            }
            let out = C::at(lanes, vectors);
            for (y, v) in y.iter_mut().zip(out) {
                number::store(lanes, y.as_mut_ptr().add(at), v);
            }
        }
    }
    if whole < len {
        for (vector, x) in vectors.iter_mut().zip(x) {
            let mut padded = [T::default(); MOST_LANES];
            padded[..len - whole].copy_from_slice(&x[whole..]);
            // SAFETY: the array holds the widest vector.
            *vector = unsafe { number::load(lanes, padded.as_ptr()) };
        }
        let out = C::at(lanes, vectors);
        for (y, v) in y.iter_mut().zip(out) {
            let mut padded = [T::default(); MOST_LANES];
            // SAFETY: the same.
            unsafe { number::store(lanes, padded.as_mut_ptr(), v) };
            y[whole..].copy_from_slice(&padded[..len - whole]);
        }
    }
}

/// y = f(x) of one piece.
#[inline(always)]
pub(crate) fn of_piece<L: Lanes>(lanes: L, kind: Kind, x: &[f32], y: &mut [f32]) {
    match kind {
        Kind::Gelu => map::<L, Gelu, f32, 1, 1>(lanes, [x], [y]),
        Kind::GeluTanh => map::<L, GeluTanh, f32, 1, 1>(lanes, [x], [y]),
        Kind::Silu => map::<L, Silu, f32, 1, 1>(lanes, [x], [y]),
        Kind::Relu2 => map::<L, Relu2, f32, 1, 1>(lanes, [x], [y]),
    }
}

/// y = f(x) and dx = g f'(x) of one piece, f being worked out once.
#[inline(always)]
pub(crate) fn both_of_piece<L: Lanes>(lanes: L, kind: Kind, g: &[f32], x: &[f32], y: &mut [f32], dx: &mut [f32]) {
    match kind {
        Kind::Gelu => map::<L, Gelu, f32, 2, 2>(lanes, [g, x], [y, dx]),
        Kind::GeluTanh => map::<L, GeluTanh, f32, 2, 2>(lanes, [g, x], [y, dx]),
        Kind::Silu => map::<L, Silu, f32, 2, 2>(lanes, [g, x], [y, dx]),
        Kind::Relu2 => map::<L, Relu2, f32, 2, 2>(lanes, [g, x], [y, dx]),
    }
}

/// [`swiglu`] of one piece.
#[inline(always)]
pub(crate) fn swiglu_of_piece<L: Lanes>(lanes: L, a: &[f32], b: &[f32], y: &mut [f32]) {
    map::<L, SwigluCurve, f32, 2, 1>(lanes, [a, b], [y]);
}

/// [`swiglu`] of one piece and its gradients [da, db].
#[inline(always)]
pub(crate) fn both_of_swiglu<L: Lanes>(lanes: L, [g, a, b]: [&[f32]; 3], y: &mut [f32], [da, db]: [&mut [f32]; 2]) {
    map::<L, SwigluCurve, f32, 3, 3>(lanes, [g, a, b], [y, da, db]);
}

struct Forward<'a, N> {
    kind: Kind,
    x: &'a [N],
    y: &'a mut [N],
}

impl<N: Number> Job for Forward<'_, N> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { kind, x, y } = self;
        match kind {
            Kind::Gelu => map::<L, Gelu, N, 1, 1>(lanes, [x], [y]),
            Kind::GeluTanh => map::<L, GeluTanh, N, 1, 1>(lanes, [x], [y]),
            Kind::Silu => map::<L, Silu, N, 1, 1>(lanes, [x], [y]),
            Kind::Relu2 => map::<L, Relu2, N, 1, 1>(lanes, [x], [y]),
        }
    }
}

struct Backward<'a, N> {
    kind: Kind,
    g: &'a [N],
    x: &'a [N],
    dx: &'a mut [N],
}

impl<N: Number> Job for Backward<'_, N> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { kind, g, x, dx } = self;
        match kind {
            Kind::Gelu => map::<L, Gelu, N, 2, 1>(lanes, [g, x], [dx]),
            Kind::GeluTanh => map::<L, GeluTanh, N, 2, 1>(lanes, [g, x], [dx]),
            Kind::Silu => map::<L, Silu, N, 2, 1>(lanes, [g, x], [dx]),
            Kind::Relu2 => map::<L, Relu2, N, 2, 1>(lanes, [g, x], [dx]),
        }
    }
}

/// The [`Curves`] of the forward and of the backward, for a function that gives y and dy/dx.
macro_rules! curves {
    ($($name:ident = $function:ident),*) => {$(
        struct $name;
        impl Curves<1, 1> for $name {
            #[inline(always)]
            fn at<L: Lanes>(lanes: L, [x]: [L::V; 1]) -> [L::V; 1] {
                [$function(lanes, x).0]
            }
        }
        impl Curves<2, 1> for $name {
            #[inline(always)]
            fn at<L: Lanes>(lanes: L, [g, x]: [L::V; 2]) -> [L::V; 1] {
                [lanes.mul(g, $function(lanes, x).1)]
            }
        }
        impl Curves<2, 2> for $name {
            #[inline(always)]
            fn at<L: Lanes>(lanes: L, [g, x]: [L::V; 2]) -> [L::V; 2] {
                let (y, slope) = $function(lanes, x);
                [y, lanes.mul(g, slope)]
            }
        }
    )*};
}
curves!(Gelu = gelu, GeluTanh = gelu_tanh, Silu = silu, Relu2 = relu2);

/// Φ(-a) = exp(-a²/2) P(1/(1 + pa)) for a ≥ 0, the form of Abramowitz and Stegun 7.1.26; P fitted to the normal
/// distribution itself, with weight a: the error of a Φ is below 2e-9.
#[inline(always)]
fn gelu<L: Lanes>(lanes: L, x: L::V) -> (L::V, L::V) {
    let one = lanes.splat(1.0);
    let x = lanes.max(lanes.splat(-GELU_END), x);
    let c = lanes.min(lanes.splat(GELU_END), x);
    let a = lanes.max(lanes.sub(lanes.splat(0.0), c), c);
    let e = lanes.exp2(lanes.mul(lanes.mul(c, c), lanes.splat(-0.5 * LOG2_E)));
    let t = lanes.div(one, lanes.mul_add(a, lanes.splat(0.325), one));
    let mut p = lanes.splat(0.045_749_836);
    for k in [-0.230_872_82, 0.368_920_8, -0.125_818_45, 0.198_267_77, 0.112_616_82, 0.131_136_02, 0.0] {
        p = lanes.mul_add(p, t, lanes.splat(k));
    }
    let tail = lanes.mul(e, p);
    let phi = lanes.where_negative(c, tail, lanes.sub(one, tail));
    let density = lanes.mul(e, lanes.splat(0.398_942_3));
    (lanes.mul(x, phi), lanes.mul_add(c, density, phi))
}

#[inline(always)]
fn gelu_tanh<L: Lanes>(lanes: L, x: L::V) -> (L::V, L::V) {
    const TWICE: f32 = 1.595_769; // 2 √(2/π)
    let x = lanes.max(lanes.splat(-GELU_END), x);
    let c = lanes.min(lanes.splat(GELU_END), x);
    let square = lanes.mul(c, c);
    let u = lanes.mul(c, lanes.mul_add(square, lanes.splat(TWICE * 0.044_715), lanes.splat(TWICE)));
    let (s, rest) = sigmoid(lanes, u);
    let du = lanes.mul_add(square, lanes.splat(3.0 * TWICE * 0.044_715), lanes.splat(TWICE));
    let slope = lanes.mul_add(lanes.mul(c, du), lanes.mul(s, rest), s);
    (lanes.mul(x, s), slope)
}

#[inline(always)]
fn silu<L: Lanes>(lanes: L, x: L::V) -> (L::V, L::V) {
    let x = lanes.max(lanes.splat(-SIGMOID_END), x);
    let c = lanes.min(lanes.splat(SIGMOID_END), x);
    let (s, rest) = sigmoid(lanes, c);
    (lanes.mul(x, s), lanes.mul(s, lanes.mul_add(c, rest, lanes.splat(1.0))))
}

/// σ(x) = 1 / (1 + exp(-x)), and 1 - σ(x) without the difference, which would lose digits.
#[inline(always)]
fn sigmoid<L: Lanes>(lanes: L, x: L::V) -> (L::V, L::V) {
    let e = lanes.exp2(lanes.mul(x, lanes.splat(-LOG2_E)));
    let s = lanes.div(lanes.splat(1.0), lanes.add(e, lanes.splat(1.0)));
    (s, lanes.mul(e, s))
}

#[inline(always)]
fn relu2<L: Lanes>(lanes: L, x: L::V) -> (L::V, L::V) {
    let positive = lanes.max(lanes.splat(0.0), x);
    (lanes.mul(positive, positive), lanes.add(positive, positive))
}

struct Swiglu<'a, N> {
    a: &'a [N],
    b: &'a [N],
    y: &'a mut [N],
}

impl<N: Number> Job for Swiglu<'_, N> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        map::<L, SwigluCurve, N, 2, 1>(lanes, [self.a, self.b], [self.y]);
    }
}

struct SwigluCurve;

impl Curves<2, 1> for SwigluCurve {
    #[inline(always)]
    fn at<L: Lanes>(lanes: L, [a, b]: [L::V; 2]) -> [L::V; 1] {
        [lanes.mul(silu(lanes, a).0, b)]
    }
}

struct SwigluBackward<'a, N> {
    g: &'a [N],
    a: &'a [N],
    b: &'a [N],
    da: &'a mut [N],
    db: &'a mut [N],
}

impl<N: Number> Job for SwigluBackward<'_, N> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        map::<L, SwigluCurve, N, 3, 2>(lanes, [self.g, self.a, self.b], [self.da, self.db]);
    }
}

impl Curves<3, 2> for SwigluCurve {
    #[inline(always)]
    fn at<L: Lanes>(lanes: L, [g, a, b]: [L::V; 3]) -> [L::V; 2] {
        let (y, slope) = silu(lanes, a);
        [lanes.mul(lanes.mul(g, b), slope), lanes.mul(g, y)]
    }
}

impl Curves<3, 3> for SwigluCurve {
    #[inline(always)]
    fn at<L: Lanes>(lanes: L, [g, a, b]: [L::V; 3]) -> [L::V; 3] {
        let (y, slope) = silu(lanes, a);
        [lanes.mul(y, b), lanes.mul(lanes.mul(g, b), slope), lanes.mul(g, y)]
    }
}
