//! Scaled dot-product attention, softmax(q kᵀ / √K) v, and its gradients (`FlashAttention`, Dao 2023, for a CPU).
//!
//! The forward keeps one number a query, the base-2 logarithm of its softmax's denominator; the backward works the
//! probabilities out again from it. Six queries at a time meet all the keys that one of them sees: their scores lie in
//! the first-level cache, the softmax is the plain one over whole rows, and what lies above the diagonal or outside the
//! window is never computed but for the rest of a panel. One job is one batch row and one head of keys and values
//! with all the heads of queries that share it, so that every sum is made by one thread in one order.
//!
//! Keys and values are copied before use (the keys transposed, in panels two vectors wide): rows of a tensor in
//! B×T×H×K order are a power of two apart, and would fall into the same few places of the cache.

use std::cell::RefCell;

use crate::simd::{self, Job, Lanes, Level};
use crate::threads::{self, Pieces};
use crate::tile::{Left, ROWS, multiply};

/// The widest head.
pub const MOST_WIDTH: usize = 128;
/// Queries and keys of a block in the backward: probabilities and their gradients take 108 KiB.
const QUERY_BLOCK: usize = 96;
const KEY_BLOCK: usize = 128;
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the batch.
    pub batch: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; each is shared by heads / `kv_heads` neighbouring heads of queries.
    pub kv_heads: usize,
    /// Queries; the last one stands at the last key.
    pub queries: usize,
    /// Keys and values, at least as many as queries.
    pub keys: usize,
    /// Width of a head, a multiple of 8 up to [`MOST_WIDTH`].
    pub width: usize,
}

impl Shape {
    pub(crate) fn check(self) {
        let Self { heads, kv_heads, queries, keys, width, .. } = self;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "attention: {heads} heads share {kv_heads}");
        assert!(queries <= keys, "attention: {queries} queries, {keys} keys");
        assert!(width.is_multiple_of(8) && (8..=MOST_WIDTH).contains(&width), "attention: heads {width} wide");
    }

    fn scale(self) -> f32 {
        #[expect(clippy::cast_precision_loss, reason = "at most 128")]
        let width = self.width as f32;
        width.sqrt().recip()
    }
}

/// What a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Nothing behind its own place.
    pub causal: bool,
    /// At most so many places back, its own included; 0: any number.
    pub window: usize,
}

impl Sight {
    /// Whether query `t` sees key `s`: the definition.
    pub fn sees(self, shape: Shape, t: usize, s: usize) -> bool {
        let place = shape.keys - shape.queries + t;
        (!self.causal || s <= place) && (self.window == 0 || place < s + self.window)
    }

    /// The same as a range of keys. Both ends grow with t.
    fn range(self, shape: Shape, t: usize) -> (usize, usize) {
        let place = shape.keys - shape.queries + t;
        let first = if self.window == 0 { 0 } else { (place + 1).saturating_sub(self.window) };
        (first, if self.causal { place + 1 } else { shape.keys })
    }
}

/// Steps in floats from one batch row, head and place to the next; the numbers of a head lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// From one row of the batch to the next.
    pub batch: usize,
    /// From one head to the next.
    pub head: usize,
    /// From one place to the next.
    pub time: usize,
}

impl Strides {
    /// Of a tensor stored as B×T×H×K.
    pub fn contiguous(times: usize, heads: usize, width: usize) -> Self {
        Self { batch: times * heads * width, head: width, time: heads * width }
    }

    /// Floats from the first to behind the last.
    pub fn extent(self, batch: usize, heads: usize, times: usize, width: usize) -> usize {
        if batch == 0 || heads == 0 || times == 0 {
            return 0;
        }
        (batch - 1) * self.batch + (heads - 1) * self.head + (times - 1) * self.time + width
    }
}

/// A tensor that is read.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    numbers: &'a [f32],
    strides: Strides,
    width: usize,
}

impl<'a> Input<'a> {
    /// `times` places of `heads` heads in each row of the shape's batch.
    ///
    /// # Panics
    /// It reaches beyond `numbers`.
    pub fn new(numbers: &'a [f32], strides: Strides, shape: Shape, heads: usize, times: usize) -> Self {
        assert!(strides.extent(shape.batch, heads, times, shape.width) <= numbers.len());
        Self { numbers, strides, width: shape.width }
    }

    #[inline(always)]
    fn row(&self, b: usize, h: usize, t: usize) -> &'a [f32] {
        let start = b * self.strides.batch + h * self.strides.head + t * self.strides.time;
        &self.numbers[start..start + self.width]
    }

    /// Rows from `t` on, as the left side of a product.
    #[inline(always)]
    fn rows_from(&self, b: usize, h: usize, t: usize) -> Left<'a> {
        let start = b * self.strides.batch + h * self.strides.head + t * self.strides.time;
        Left { numbers: &self.numbers[start..], row: self.strides.time, column: 1 }
    }
}

/// A tensor that is written, stored as B×T×H×K.
pub struct Output<'a> {
    start: *mut f32,
    strides: Strides,
    heads: usize,
    times: usize,
    batch: usize,
    width: usize,
    borrowed: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: threads write different rows: every job its own heads.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// All numbers of the tensor.
    ///
    /// # Panics
    /// The length is another.
    pub fn new(numbers: &'a mut [f32], shape: Shape, heads: usize, times: usize) -> Self {
        let Shape { batch, width, .. } = shape;
        assert_eq!(numbers.len(), batch * times * heads * width);
        let strides = Strides::contiguous(times, heads, width);
        let (start, borrowed) = (numbers.as_mut_ptr(), std::marker::PhantomData);
        Self { start, strides, heads, times, batch, width, borrowed }
    }

    /// The same of pieces, whose numbers others may have written before and will read after it.
    ///
    /// # Safety
    /// Meanwhile nobody has any of them.
    pub(crate) unsafe fn of_pieces(pieces: &'a Pieces<'_>, shape: Shape, heads: usize, times: usize) -> Self {
        let Shape { batch, width, .. } = shape;
        assert_eq!(pieces.len(), batch * times * heads * width);
        let strides = Strides::contiguous(times, heads, width);
        let (start, borrowed) = (pieces.start(), std::marker::PhantomData);
        Self { start, strides, heads, times, batch, width, borrowed }
    }

    /// # Safety
    /// No two threads ask for the same head of the same row of the batch, and the last row asked for is gone.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "rows are disjoint")]
    unsafe fn row(&self, b: usize, h: usize, t: usize) -> &mut [f32] {
        assert!(b < self.batch && h < self.heads && t < self.times);
        let start = b * self.strides.batch + h * self.strides.head + t * self.strides.time;
        // SAFETY: inside the slice that `new` was given; disjoint by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), self.width) }
    }
}

/// Attention.
///
/// Args: `q` has the shape's heads and queries, `k` and `v` its `kv_heads` and keys; `out` and `log_sums` (B×T×H,
/// for [`backward`]) are written.
///
/// # Panics
/// The shape is none that is known here.
#[expect(clippy::too_many_arguments, reason = "what an attention takes")]
pub fn forward(
    level: Level,
    threads: usize,
    shape: Shape,
    sight: Sight,
    q: Input<'_>,
    k: Input<'_>,
    v: Input<'_>,
    out: &mut Output<'_>,
    log_sums: &mut [f32],
) {
    shape.check();
    assert_eq!(log_sums.len(), shape.batch * shape.queries * shape.heads);
    let out = &*out; // shared among the jobs of this call, and with nobody else
    let logs = Output::new(log_sums, Shape { width: 1, ..shape }, shape.heads, shape.queries);
    threads::share(threads, shape.batch * shape.kv_heads, |job| {
        forward_job(level, shape, sight, job, [q, k, v], out, &logs);
    });
}

/// One of [`forward`]'s batch × `kv_heads` jobs; no two threads do the same.
pub(crate) fn forward_job(
    level: Level,
    shape: Shape,
    sight: Sight,
    job: usize,
    [q, k, v]: [Input<'_>; 3],
    out: &Output<'_>,
    logs: &Output<'_>,
) {
    let (b, g) = (job / shape.kv_heads, job % shape.kv_heads);
    SCRATCH.with_borrow_mut(|scratch| {
        simd::run(level, Forward { shape, sight, b, g, q, k, v, out, logs, scratch });
    });
}

/// Gradients of Σ out · dout, from what [`forward`] took and gave.
///
/// # Panics
/// The shape is none that is known here.
#[expect(clippy::too_many_arguments, reason = "what an attention takes")]
pub fn backward(
    level: Level,
    threads: usize,
    shape: Shape,
    sight: Sight,
    dout: Input<'_>,
    q: Input<'_>,
    k: Input<'_>,
    v: Input<'_>,
    out: Input<'_>,
    log_sums: &[f32],
    dq: &mut Output<'_>,
    dk: &mut Output<'_>,
    dv: &mut Output<'_>,
) {
    shape.check();
    assert_eq!(log_sums.len(), shape.batch * shape.queries * shape.heads);
    let (dq, dk, dv) = (&*dq, &*dk, &*dv); // shared among the jobs of this call, and with nobody else
    threads::share(threads, shape.batch * shape.kv_heads, |job| {
        backward_job(level, shape, sight, job, dout, [q, k, v], out, log_sums, [dq, dk, dv]);
    });
}

/// One of [`backward`]'s batch × `kv_heads` jobs; no two threads do the same.
#[expect(clippy::too_many_arguments, reason = "what an attention takes")]
pub(crate) fn backward_job(
    level: Level,
    shape: Shape,
    sight: Sight,
    job: usize,
    dout: Input<'_>,
    [q, k, v]: [Input<'_>; 3],
    out: Input<'_>,
    log_sums: &[f32],
    [dq, dk, dv]: [&Output<'_>; 3],
) {
    let (b, g) = (job / shape.kv_heads, job % shape.kv_heads);
    SCRATCH.with_borrow_mut(|scratch| {
        simd::run(level, Backward { shape, sight, b, g, dout, q, k, v, out, log_sums, dq, dk, dv, scratch });
    });
}

thread_local! {
    /// What a thread's jobs work in: kept, since fresh memory costs a page fault every 4 KiB.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Cuts the scratch into pieces.
struct Cuts<'a>(&'a mut [f32]);

impl<'a> Cuts<'a> {
    fn new(scratch: &'a mut Vec<f32>, needed: usize) -> Self {
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        Self(scratch)
    }

    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        piece
    }
}

/// Copies a head's rows one behind the other, `row` apart, zeros in between.
#[inline(always)]
fn pack(input: Input<'_>, b: usize, h: usize, times: usize, row: usize, to: &mut [f32]) {
    for (t, to) in to.chunks_exact_mut(row).enumerate().take(times) {
        let from = input.row(b, h, t);
        to[..from.len()].copy_from_slice(from);
        to[from.len()..].fill(0.0);
    }
}

/// The transpose in panels of `panel` columns: number i of row s stands at [s / panel][i][s % panel]; zeros behind.
#[inline(always)]
fn pack_transposed<L: Lanes>(lanes: L, input: Input<'_>, b: usize, h: usize, times: usize, to: &mut [f32]) {
    let (width, panel) = (input.width, 2 * L::WIDTH);
    for (index, to) in to.chunks_exact_mut(width * panel).enumerate() {
        for s in (0..panel).step_by(8) {
            let t = index * panel + s;
            if t + 8 <= times {
                let from = input.rows_from(b, h, t);
                assert!(7 * from.row + width <= from.numbers.len());
                for i in (0..width).step_by(8) {
                    // SAFETY: eight rows as just asserted; panel and width are multiples of 8, so that eight rows of
                    // the panel end inside it.
                    unsafe {
                        lanes.turn(from.numbers.as_ptr().add(i), from.row, to.as_mut_ptr().add(i * panel + s), panel);
                    }
                }
                continue;
            }
            for t in t..t + 8 {
                let s = t - index * panel;
                let row = if t < times { input.row(b, h, t) } else { &[] };
                for i in 0..width {
                    to[i * panel + s] = row.get(i).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

/// Products of rows of `a` with the keys of panels `first` to `end`, multiples of `panel`, into columns from 0 on.
#[inline(always)]
fn products<L: Lanes>(
    lanes: L,
    rows: usize,
    a: Left<'_>,
    panels: &[f32],
    (first, end, width): (usize, usize, usize),
    to: &mut [f32],
    to_row: usize,
) {
    let panel = 2 * L::WIDTH;
    for at in (first..end).step_by(panel) {
        let b = &panels[at * width..(at + panel) * width];
        multiply::<L, false>(lanes, (rows, width, panel), a, b, panel, &mut to[at - first..], to_row);
    }
}

struct Forward<'a> {
    shape: Shape,
    sight: Sight,
    b: usize,
    g: usize,
    q: Input<'a>,
    k: Input<'a>,
    v: Input<'a>,
    out: &'a Output<'a>,
    logs: &'a Output<'a>,
    scratch: &'a mut Vec<f32>,
}

impl Job for Forward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Shape { heads, kv_heads, queries, keys, width, .. } = self.shape;
        let panel = 2 * L::WIDTH;
        let (padded, row) = (keys.next_multiple_of(panel), width.next_multiple_of(L::WIDTH));
        let score_row = padded + panel;
        let needed = padded * width + keys * row + ROWS * (score_row + row);
        let mut pieces = Cuts::new(self.scratch, needed);
        let (k, v) = (pieces.take(padded * width), pieces.take(keys * row));
        let (scores, mixed) = (pieces.take(ROWS * score_row), pieces.take(ROWS * row));
        pack_transposed(lanes, self.k, self.b, self.g, keys, k);
        pack(self.v, self.b, self.g, keys, row, v);
        let shared = heads / kv_heads;
        for h in self.g * shared..(self.g + 1) * shared {
            for t in (0..queries).step_by(ROWS) {
                let rows = ROWS.min(queries - t);
                let (low, high) = (self.sight.range(self.shape, t).0, self.sight.range(self.shape, t + rows - 1).1);
                let (first, end) = (low / panel * panel, high.next_multiple_of(panel));
                let q = self.q.rows_from(self.b, h, t);
                products(lanes, rows, q, k, (first, end, width), scores, score_row);
                let mut totals = [0.0; ROWS];
                for r in 0..rows {
                    let (low, high) = self.sight.range(self.shape, t + r);
                    let scores = &mut scores[r * score_row..][..end - first];
                    scores[..low - first].fill(f32::NEG_INFINITY);
                    scores[high - first..].fill(f32::NEG_INFINITY);
                    let (total, log_sum) = softmax(lanes, scores, self.shape.scale() * LOG2_E);
                    totals[r] = total;
                    // SAFETY: this head is this job's, and the row is gone with this line.
                    unsafe { self.logs.row(self.b, h, t + r)[0] = log_sum }
                }
                let p = Left { numbers: scores, row: score_row, column: 1 };
                let v = &v[first * row..high * row];
                multiply::<L, false>(lanes, (rows, high - first, row), p, v, row, mixed, row);
                for r in 0..rows {
                    let whole = totals[r].recip();
                    // SAFETY: as above.
                    let out = unsafe { self.out.row(self.b, h, t + r) };
                    for (out, x) in out.iter_mut().zip(&mixed[r * row..]) {
                        *out = x * whole;
                    }
                }
            }
        }
    }
}

/// Turns scores into exp(scale · (score - greatest)), `scale` in base 2; gives their sum and log2 Σ exp(scale · score).
#[inline(always)]
fn softmax<L: Lanes>(lanes: L, scores: &mut [f32], scale: f32) -> (f32, f32) {
    let mut greatest = lanes.splat(f32::NEG_INFINITY);
    for chunk in scores.chunks_exact(L::WIDTH) {
        // SAFETY: the chunk is a vector long.
        greatest = lanes.max(greatest, unsafe { lanes.load(chunk.as_ptr()) });
    }
    let greatest = lanes.greatest(greatest);
    // The difference first: where scores are huge, the rounding of scale · greatest alone would be a factor of 2^±127.
    let (factor, shift) = (lanes.splat(scale), lanes.splat(greatest));
    let mut total = lanes.splat(0.0);
    for chunk in scores.chunks_exact_mut(L::WIDTH) {
        // SAFETY: the chunk is a vector long.
        unsafe {
            let p = lanes.exp2(lanes.mul(lanes.sub(lanes.load(chunk.as_ptr()), shift), factor));
            lanes.store(chunk.as_mut_ptr(), p);
            total = lanes.add(total, p);
        }
    }
    let total = lanes.sum(total);
    (total, scale * greatest + total.log2())
}

struct Backward<'a> {
    shape: Shape,
    sight: Sight,
    b: usize,
    g: usize,
    dout: Input<'a>,
    q: Input<'a>,
    k: Input<'a>,
    v: Input<'a>,
    out: Input<'a>,
    log_sums: &'a [f32],
    dq: &'a Output<'a>,
    dk: &'a Output<'a>,
    dv: &'a Output<'a>,
    scratch: &'a mut Vec<f32>,
}

impl Job for Backward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Shape { heads, kv_heads, queries, keys, width, .. } = self.shape;
        let (shape, sight, b, g) = (self.shape, self.sight, self.b, self.g);
        let panel = 2 * L::WIDTH;
        let (padded, row) = (keys.next_multiple_of(panel), width.next_multiple_of(L::WIDTH));
        let p_row = KEY_BLOCK.min(padded) + 16; // an odd number of cache lines: columns spread over the cache
        let block = QUERY_BLOCK.min(queries) * p_row;
        let needed = 2 * padded * width + 3 * keys * row + 3 * queries * row + queries + 2 * block;
        let mut pieces = Cuts::new(self.scratch, needed);
        let (k_panels, v_panels) = (pieces.take(padded * width), pieces.take(padded * width));
        let [k, dk, dv] = [0; 3].map(|_| pieces.take(keys * row));
        let [q, dout, dq] = [0; 3].map(|_| pieces.take(queries * row));
        let (means, p, ds) = (pieces.take(queries), pieces.take(block), pieces.take(block));
        pack_transposed(lanes, self.k, b, g, keys, k_panels);
        pack_transposed(lanes, self.v, b, g, keys, v_panels);
        pack(self.k, b, g, keys, row, k);
        dk.fill(0.0);
        dv.fill(0.0);
        let shared = heads / kv_heads;
        for h in g * shared..(g + 1) * shared {
            pack(self.q, b, h, queries, row, q);
            pack(self.dout, b, h, queries, row, dout);
            dq.fill(0.0);
            for (t, mean) in means.iter_mut().enumerate() {
                *mean = dot(lanes, &dout[t * row..(t + 1) * row], self.out.row(b, h, t));
            }
            for key in (0..keys).step_by(KEY_BLOCK) {
                let key_end = keys.min(key + KEY_BLOCK);
                for query in (0..queries).step_by(QUERY_BLOCK) {
                    let query_end = queries.min(query + QUERY_BLOCK);
                    if sight.range(shape, query).0 >= key_end || sight.range(shape, query_end - 1).1 <= key {
                        continue;
                    }
                    for t in (query..query_end).step_by(ROWS) {
                        let rows = ROWS.min(query_end - t);
                        let low = sight.range(shape, t).0.max(key);
                        let high = sight.range(shape, t + rows - 1).1.min(key_end);
                        let at = (t - query) * p_row;
                        let (p, ds) = (&mut p[at..at + rows * p_row], &mut ds[at..at + rows * p_row]);
                        if low >= high {
                            p.fill(0.0);
                            ds.fill(0.0);
                            continue;
                        }
                        let (first, end) = (low / panel * panel, high.next_multiple_of(panel));
                        let left = Left { numbers: &q[t * row..], row, column: 1 };
                        products(lanes, rows, left, k_panels, (first, end, width), &mut p[first - key..], p_row);
                        let left = Left { numbers: &dout[t * row..], row, column: 1 };
                        products(lanes, rows, left, v_panels, (first, end, width), &mut ds[first - key..], p_row);
                        for r in 0..rows {
                            let (low, high) = sight.range(shape, t + r);
                            let (low, high) = (low.clamp(first, end) - key, high.clamp(first, end) - key);
                            let (p, ds) = (&mut p[r * p_row..][..p_row], &mut ds[r * p_row..][..p_row]);
                            let log_sum = self.log_sums[(b * queries + t + r) * heads + h];
                            let inner = first - key..end - key;
                            let (p_inner, ds_inner) = (&mut p[inner.clone()], &mut ds[inner]);
                            gradient(lanes, p_inner, ds_inner, shape.scale(), log_sum, means[t + r]);
                            for x in [p, ds] {
                                x[..low].fill(0.0);
                                x[high..].fill(0.0);
                            }
                        }
                        let left = Left { numbers: &ds[first - key..], row: p_row, column: 1 };
                        let right = &k[first * row..high * row];
                        let size = (rows, high - first, row);
                        multiply::<L, true>(lanes, size, left, right, row, &mut dq[t * row..], row);
                    }
                    let offset = keys - queries;
                    for s in (key..key_end).step_by(ROWS) {
                        let rows = ROWS.min(key_end - s);
                        // Queries that see one of these keys.
                        let start = if sight.causal { query.max(s.saturating_sub(offset)) } else { query };
                        let stop = if sight.window == 0 {
                            query_end
                        } else {
                            query_end.min((s + rows - 1 + sight.window).saturating_sub(offset))
                        };
                        if start >= stop {
                            continue;
                        }
                        let (at, size) = ((start - query) * p_row + s - key, (rows, stop - start, row));
                        let left = Left { numbers: &p[at..], row: 1, column: p_row };
                        multiply::<L, true>(lanes, size, left, &dout[start * row..], row, &mut dv[s * row..], row);
                        let left = Left { numbers: &ds[at..], row: 1, column: p_row };
                        multiply::<L, true>(lanes, size, left, &q[start * row..], row, &mut dk[s * row..], row);
                    }
                }
            }
            // SAFETY: these heads are this job's, here and below.
            unsafe { unpack(dq, row, self.dq, b, h) }
        }
        // SAFETY: as above.
        unsafe {
            unpack(dk, row, self.dk, b, g);
            unpack(dv, row, self.dv, b, g);
        }
    }
}

/// Copies a head's packed rows out.
///
/// # Safety
/// As for [`Output::row`].
#[inline(always)]
unsafe fn unpack(from: &[f32], row: usize, to: &Output<'_>, b: usize, h: usize) {
    for (t, from) in from.chunks_exact(row).enumerate() {
        // SAFETY: the caller's.
        let to = unsafe { to.row(b, h, t) };
        to.copy_from_slice(&from[..to.len()]);
    }
}

/// From scores s and products g = dout · v of a row: the probability p = exp(scale s - log sum) into `s`, and the
/// score's gradient p (g - mean) · scale into `g`.
#[inline(always)]
fn gradient<L: Lanes>(lanes: L, s: &mut [f32], g: &mut [f32], scale: f32, log_sum: f32, mean: f32) {
    let (factor, shift, zero) = (lanes.splat(scale * LOG2_E), lanes.splat(log_sum), lanes.splat(0.0));
    let (scale, mean) = (lanes.splat(scale), lanes.splat(mean));
    for (s, g) in s.chunks_exact_mut(L::WIDTH).zip(g.chunks_exact_mut(L::WIDTH)) {
        // SAFETY: the chunks are a vector long.
        unsafe {
            // Rounded as the forward's `scale * greatest` is, and never above 1: huge scores give no infinities.
            let z = lanes.sub(lanes.mul(lanes.load(s.as_ptr()), factor), shift);
            let p = lanes.exp2(lanes.min(zero, z));
            let ds = lanes.mul(lanes.mul(p, scale), lanes.sub(lanes.load(g.as_ptr()), mean));
            lanes.store(s.as_mut_ptr(), p);
            lanes.store(g.as_mut_ptr(), ds);
        }
    }
}

/// Σ a b over b's length, a multiple of 8.
#[inline(always)]
fn dot<L: Lanes>(lanes: L, a: &[f32], b: &[f32]) -> f32 {
    let mut sums = lanes.splat(0.0);
    let whole = b.len() / L::WIDTH * L::WIDTH;
    for (a, b) in a.chunks_exact(L::WIDTH).zip(b.chunks_exact(L::WIDTH)) {
        // SAFETY: the chunks are a vector long.
        sums = unsafe { lanes.mul_add(lanes.load(a.as_ptr()), lanes.load(b.as_ptr()), sums) };
    }
    let rest: f32 = a[whole..b.len()].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
    lanes.sum(sums) + rest
}
