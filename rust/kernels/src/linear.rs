//! Linear maps y = f(x) Wᵀ + b (+ residual) of rows, f being a norm or an activation, and all gradients, in float32.
//!
//! Of a small model's step a matrix library leaves half the time on the table: its threads meet at every product, and
//! between two products what was made goes to memory and comes back. Here a job is a block of rows that stays in a
//! core's cache from the norm to the sum with the residual; the threads meet once a call.
//!
//! A forward packs Wᵀ in panels two vectors wide, then does the rows. A backward packs W; then block by block it works
//! f(x) out again, makes g W and with it the gradient by x; last dW = gᵀ f(x), whose sums over all rows are made by one
//! thread each in one order. Nothing but the inputs is kept from the one for the other.

use std::cell::RefCell;
use std::panic::resume_unwind;

use crate::activation::{self, Kind};
use crate::norm::{self, Norm};
use crate::simd::{self, Job, Lanes, Level};
use crate::threads::{self, Pieces};
use crate::tile::{Left, ROWS, multiply};

/// Widths in and out are multiples of this: of a panel at every level.
pub const STEP: usize = 32;
/// Rows of a job.
pub(crate) const BLOCK: usize = 8 * ROWS;
/// Depth that a tile goes through before the next one takes its turn: a panel's part of 16 to 32 KiB.
const DEPTH: usize = 256;
/// Cache lines: what the widest loads should begin at.
const LINE: usize = 16;

/// f: what is done to the rows first.
#[derive(Clone, Copy, Debug)]
pub enum Before<'a> {
    /// Nothing.
    Nothing,
    /// A norm of each row.
    Norm(Norm<'a>),
    /// An activation of each number.
    Activation(Kind),
    /// silu(a) · b of two inputs.
    Swiglu,
}

impl Before<'_> {
    fn inputs(self) -> usize {
        if matches!(self, Self::Swiglu) { 2 } else { 1 }
    }
}

/// One of the maps of the same f(x): W, outs × ins, and b.
#[derive(Clone, Copy, Debug)]
pub struct Map<'a> {
    /// Rows of `ins` numbers.
    pub weight: &'a [f32],
    /// One number for each row of the weight.
    pub bias: Option<&'a [f32]>,
}

/// What is computed: the same for the forward and the backward.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// Width of x's rows.
    pub ins: usize,
    /// f.
    pub before: Before<'a>,
    /// x; for [`Before::Swiglu`] a and b, else the second is empty.
    pub x: [&'a [f32]; 2],
    /// At least one.
    pub maps: &'a [Map<'a>],
}

/// Where a backward's results go.
pub struct Gradients<'a> {
    /// As [`Linear::x`].
    pub x: [&'a mut [f32]; 2],
    /// By each map's weight.
    pub weights: Vec<&'a mut [f32]>,
    /// By each map's bias; empty where there is none.
    pub biases: Vec<&'a mut [f32]>,
    /// By the norm's weight and bias; empty where there are none.
    pub norm: [&'a mut [f32]; 2],
}

impl Linear<'_> {
    fn rows(&self) -> usize {
        let Self { ins, x, maps, before } = *self;
        assert!(ins > 0 && ins.is_multiple_of(STEP) && x[0].len().is_multiple_of(ins), "linear: {ins} wide");
        assert!(x[1].len() == if before.inputs() == 2 { x[0].len() } else { 0 });
        assert!(!maps.is_empty());
        for map in maps {
            let outs = self.outs(map);
            assert!(map.weight.len() == outs * ins && outs > 0 && outs.is_multiple_of(STEP), "linear: {outs} out");
            assert!(map.bias.is_none_or(|bias| bias.len() == outs));
        }
        if let Before::Norm(norm) = before {
            norm.check(ins);
        }
        x[0].len() / ins
    }

    fn outs(&self, map: &Map<'_>) -> usize {
        map.weight.len() / self.ins
    }

    fn all_outs(&self) -> usize {
        self.maps.iter().map(|map| self.outs(map)).sum()
    }

    fn numbers(&self, index: usize, row: usize, rows: usize) -> &[f32] {
        &self.x[index][row * self.ins..(row + rows) * self.ins]
    }
}

thread_local! {
    /// What all threads of a call work in, and what each has for itself: kept, as fresh memory costs page faults.
    static SHARED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    pub(crate) static OWN: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What a call unwinds with where the system has no memory for what it works in; whoever binds it makes an error of it.
#[derive(Clone, Copy, Debug)]
pub struct OutOfMemory;

/// More numbers than this are given back when a call is over: 64 MiB.
const KEPT: usize = 1 << 24;

/// `len` numbers from a cache line's beginning on.
///
/// # Panics
/// With [`OutOfMemory`].
pub(crate) fn lines(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len + LINE {
        let more = len + LINE - scratch.len();
        if scratch.try_reserve_exact(more).is_err() {
            resume_unwind(Box::new(OutOfMemory)); // says nothing on the way
        }
        scratch.resize(len + LINE, 0.0);
    }
    let from = scratch.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    &mut scratch[from..from + len]
}

/// Works with this thread's numbers that all threads of a call share.
pub(crate) fn with_shared(work: impl FnOnce(&mut Vec<f32>)) {
    SHARED.with_borrow_mut(|shared| {
        work(shared);
        if shared.capacity() > KEPT {
            *shared = Vec::new();
        }
    });
}

/// Jobs of a stage: what is cut in pieces of a size.
pub(crate) fn cut(what: usize, size: usize) -> usize {
    what.div_ceil(size)
}

/// y of each map; `residual`, which only a single map has, is added.
///
/// # Panics
/// Lengths differ, or widths are no multiples of [`STEP`].
pub fn forward(level: Level, threads: usize, linear: &Linear<'_>, residual: Option<&[f32]>, y: &mut [&mut [f32]]) {
    let (rows, ins) = (linear.rows(), linear.ins);
    assert_eq!(y.len(), linear.maps.len());
    for (y, map) in y.iter().zip(linear.maps) {
        assert_eq!(y.len(), rows * linear.outs(map));
    }
    assert!(residual.is_none_or(|residual| linear.maps.len() == 1 && residual.len() == y[0].len()));
    let outs: Vec<usize> = linear.maps.iter().map(|map| linear.outs(map)).collect();
    let y: Vec<Pieces<'_>> = y.iter_mut().zip(&outs).map(|(y, outs)| Pieces::new(y, BLOCK * outs)).collect();
    let groups = linear.all_outs() / STEP;
    with_shared(|shared| {
        let packed = Pieces::new(lines(shared, linear.all_outs() * ins), STEP * ins);
        threads::share_in_stages(threads, [groups, cut(rows, BLOCK)], |stage, index| {
            if stage == 0 {
                let (mut map, mut at) = (0, index);
                while at * STEP >= outs[map] {
                    at -= outs[map] / STEP;
                    map += 1;
                }
                let weight = &linear.maps[map].weight[at * STEP * ins..][..STEP * ins];
                // SAFETY: every index comes once.
                simd::run(level, PackTransposed { ins, weight, to: unsafe { packed.piece(index) } });
                return;
            }
            let row = index * BLOCK;
            // SAFETY: the stage that wrote it is over.
            let packed = unsafe { packed.whole() };
            // SAFETY: every index comes once.
            let y: Vec<&mut [f32]> = y.iter().map(|y| unsafe { y.piece(index) }).collect();
            OWN.with_borrow_mut(|own| {
                simd::run(level, Forward { linear, row, rows: BLOCK.min(rows - row), packed, residual, y, own });
            });
        });
    });
}

/// The gradients of Σ y · g.
///
/// # Panics
/// As [`forward`].
pub fn backward(level: Level, threads: usize, linear: &Linear<'_>, g: &[&[f32]], to: &mut Gradients<'_>) {
    let (rows, ins) = (linear.rows(), linear.ins);
    let outs: Vec<usize> = linear.maps.iter().map(|map| linear.outs(map)).collect();
    let all = linear.all_outs();
    assert!(g.len() == outs.len() && to.weights.len() == outs.len() && to.biases.len() == outs.len());
    for (i, map) in linear.maps.iter().enumerate() {
        assert!(g[i].len() == rows * outs[i] && to.weights[i].len() == map.weight.len());
        assert_eq!(to.biases[i].len(), map.bias.map_or(0, <[f32]>::len));
    }
    assert!(to.x.iter().zip(linear.x).all(|(to, x)| to.len() == x.len()));
    let norms = match linear.before {
        Before::Norm(norm) => norm.lens(),
        _ => [0, 0],
    };
    assert!(to.norm[0].len() == norms[0] && to.norm[1].len() == norms[1]);
    let blocks = cut(rows, BLOCK);
    // Bands of dW's rows: a few a thread, so that the last one to end is not long alone.
    let band = (all.div_ceil(4 * threads.max(1))).next_multiple_of(ROWS).min(BLOCK);
    let bands: Vec<(usize, usize)> =
        outs.iter().enumerate().flat_map(|(map, &outs)| (0..outs).step_by(band).map(move |at| (map, at))).collect();
    let summed = norms[0] + norms[1];
    let Gradients { x: [dx, dx2], weights, biases, norm: dnorm } = to;
    let (dx, dx2) = (Pieces::new(dx, BLOCK * ins), Pieces::new(dx2, BLOCK * ins));
    let dweights: Vec<Pieces<'_>> = weights.iter_mut().map(|to| Pieces::new(to, band * ins)).collect();
    let dbiases: Vec<Pieces<'_>> = biases.iter_mut().map(|to| Pieces::new(to, band)).collect();
    with_shared(|shared| {
        let (packed, rest) = lines(shared, all * ins + rows * ins + blocks * summed).split_at_mut(all * ins);
        let (a, sums) = rest.split_at_mut(rows * ins);
        sums.fill(0.0);
        let packed = Pieces::new(packed, STEP * all);
        // f(x) in panels: a block of rows writes a piece of each panel.
        let a = Pieces::new(a, 1);
        {
            let sums = Pieces::new(sums, summed);
            threads::share_in_stages(threads, [ins / STEP, blocks, bands.len()], |stage, index| {
                if stage == 0 {
                    // SAFETY: every index comes once.
                    let to = unsafe { packed.piece(index) };
                    simd::run(level, Pack { ins, maps: linear.maps, column: index * STEP, to });
                } else if stage == 1 {
                    let row = index * BLOCK;
                    let these = BLOCK.min(rows - row);
                    // SAFETY: the stage that wrote it is over.
                    let packed = unsafe { packed.whole() };
                    // SAFETY: every index comes once.
                    let (dx, dx2, sums) = unsafe { (dx.piece(index), dx2.piece(index), sums.piece(index)) };
                    OWN.with_borrow_mut(|own| {
                        let all_rows = rows;
                        let job = Back { linear, g, row, rows: these, all_rows, packed, a: &a, dx, dx2, sums, own };
                        simd::run(level, job);
                    });
                } else {
                    let (map, at) = bands[index];
                    // SAFETY: the stage that wrote it is over.
                    let a = unsafe { a.whole() };
                    // SAFETY: every band comes once.
                    let (dweight, dbias) = unsafe { (dweights[map].piece(at / band), dbiases[map].piece(at / band)) };
                    OWN.with_borrow_mut(|own| {
                        simd::run(
                            level,
                            ByWeight { ins, rows, outs: outs[map], at, g: g[map], a, dweight, dbias, own },
                        );
                    });
                }
            });
        }
        for to in dnorm.iter_mut() {
            to.fill(0.0);
        }
        for sums in sums.chunks(summed.max(1)) {
            let (weight, bias) = sums.split_at(norms[0]);
            for (to, from) in dnorm.iter_mut().zip([weight, bias]) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to += from;
                }
            }
        }
    });
}

/// [`STEP`] rows of W, transposed: panels of ins × two vectors.
#[inline(always)]
fn pack_transposed<L: Lanes>(lanes: L, ins: usize, weight: &[f32], to: &mut [f32]) {
    let panel = 2 * L::WIDTH;
    assert!(weight.len() == STEP * ins && to.len() == STEP * ins && ins.is_multiple_of(8));
    for out in (0..STEP).step_by(8) {
        let (first, column) = (out / panel * panel, out % panel);
        for i in (0..ins).step_by(8) {
            // SAFETY: eight rows of eight numbers of both, whose sizes were asserted; a panel is a multiple of 8 wide
            // and divides STEP.
            unsafe {
                let from = weight.as_ptr().add(out * ins + i);
                lanes.turn(from, ins, to.as_mut_ptr().add(first * ins + i * panel + column), panel);
            }
        }
    }
}

/// [`STEP`] columns of several W of the same width, one W behind the other: panels of all outs × two vectors.
#[inline(always)]
fn pack<L: Lanes>(_: L, ins: usize, maps: &[Map<'_>], column: usize, to: &mut [f32]) {
    let panel = 2 * L::WIDTH;
    let len = to.len() / (STEP / panel);
    for (index, to) in to.chunks_exact_mut(len).enumerate() {
        let column = column + index * panel;
        let rows = maps.iter().flat_map(|map| map.weight.chunks_exact(ins));
        for (to, from) in to.chunks_exact_mut(panel).zip(rows) {
            to.copy_from_slice(&from[column..column + panel]);
        }
    }
}

/// y = a Wᵀ + b (+ residual) of a block of rows, W packed and transposed.
#[inline(always)]
pub(crate) fn forward_rows<L: Lanes>(
    lanes: L,
    ins: usize,
    a: &[f32],
    packed: &[f32],
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    y: &mut [f32],
) {
    let (rows, outs) = (a.len() / ins, packed.len() / ins);
    match residual {
        Some(residual) => y.copy_from_slice(residual),
        None => y.fill(0.0),
    }
    if let Some(bias) = bias {
        for y in y.chunks_exact_mut(outs) {
            for (y, b) in y.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
    add_product(lanes, rows, a, ins, packed, (ins, 0), y, outs);
}

/// A block's rows into panels two vectors wide of all rows: what [`ByWeight`] reads.
///
/// # Safety
/// Nobody else has these rows of the panels, which hold `all_rows` × `ins` numbers.
#[inline(always)]
pub(crate) unsafe fn to_panels<L: Lanes>(
    _: L,
    ins: usize,
    made: &[f32],
    panels: &Pieces<'_>,
    row: usize,
    all_rows: usize,
) {
    let panel = 2 * L::WIDTH;
    let rows = made.len() / ins;
    for column in (0..ins).step_by(panel) {
        // SAFETY: the caller's.
        let to = unsafe { panels.from(column * all_rows + row * panel, rows * panel) };
        for (to, from) in to.chunks_exact_mut(panel).zip(made.chunks_exact(ins)) {
            to.copy_from_slice(&from[column..column + panel]);
        }
    }
}

/// [`pack_transposed`].
pub(crate) struct PackTransposed<'a> {
    pub(crate) ins: usize,
    pub(crate) weight: &'a [f32],
    pub(crate) to: &'a mut [f32],
}

impl Job for PackTransposed<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        pack_transposed(lanes, self.ins, self.weight, self.to);
    }
}

/// [`pack`].
pub(crate) struct Pack<'a> {
    pub(crate) ins: usize,
    pub(crate) maps: &'a [Map<'a>],
    pub(crate) column: usize,
    pub(crate) to: &'a mut [f32],
}

impl Job for Pack<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        pack(lanes, self.ins, self.maps, self.column, self.to);
    }
}

/// c += a b of a block: `a` has rows of `depth` numbers, `b` is in panels of `b_depth` rows, of which those from `first`
/// on are taken; `columns` of c.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a matrix product")]
pub(crate) fn add_product<L: Lanes>(
    lanes: L,
    rows: usize,
    a: &[f32],
    depth: usize,
    b: &[f32],
    (b_depth, first): (usize, usize),
    c: &mut [f32],
    columns: usize,
) {
    let panel = 2 * L::WIDTH;
    for from in (0..depth).step_by(DEPTH) {
        let deep = DEPTH.min(depth - from);
        for column in (0..columns).step_by(panel) {
            let b = &b[column * b_depth + (first + from) * panel..][..deep * panel];
            for row in (0..rows).step_by(ROWS) {
                let left = Left { numbers: &a[row * depth + from..], row: depth, column: 1 };
                let size = (ROWS.min(rows - row), deep, panel);
                multiply::<L, true>(lanes, size, left, b, panel, &mut c[row * columns + column..], columns);
            }
        }
    }
}

struct Forward<'a> {
    linear: &'a Linear<'a>,
    row: usize,
    rows: usize,
    packed: &'a [f32],
    residual: Option<&'a [f32]>,
    y: Vec<&'a mut [f32]>,
    own: &'a mut Vec<f32>,
}

impl Job for Forward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { linear, row, rows, packed, residual, y, own } = self;
        let ins = linear.ins;
        let x = linear.numbers(0, row, rows);
        let a = match linear.before {
            Before::Nothing => x,
            Before::Norm(norm) => {
                let a = lines(own, rows * ins);
                for (x, a) in x.chunks_exact(ins).zip(a.chunks_exact_mut(ins)) {
                    norm::of_row(lanes, norm, x, a);
                }
                a
            }
            Before::Activation(kind) => {
                let a = lines(own, rows * ins);
                activation::of_piece(lanes, kind, x, a);
                a
            }
            Before::Swiglu => {
                let a = lines(own, rows * ins);
                activation::swiglu_of_piece(lanes, x, linear.numbers(1, row, rows), a);
                a
            }
        };
        let mut packed = packed;
        for (map, y) in linear.maps.iter().zip(y) {
            let outs = linear.outs(map);
            let (these, rest) = packed.split_at(outs * ins);
            packed = rest;
            let residual = residual.map(|residual| &residual[row * outs..(row + rows) * outs]);
            forward_rows(lanes, ins, a, these, map.bias, residual, y);
        }
    }
}

struct Back<'a> {
    linear: &'a Linear<'a>,
    g: &'a [&'a [f32]],
    row: usize,
    rows: usize,
    all_rows: usize,
    packed: &'a [f32],
    a: &'a Pieces<'a>,
    dx: &'a mut [f32],
    dx2: &'a mut [f32],
    /// Of the norm's weight and bias, of these rows.
    sums: &'a mut [f32],
    own: &'a mut Vec<f32>,
}

impl Job for Back<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { linear, g, row, rows, all_rows, packed, a: panels, dx, dx2, sums, own } = self;
        let (ins, all) = (linear.ins, linear.all_outs());
        let (a, da) = lines(own, 2 * rows * ins).split_at_mut(rows * ins);
        let x = linear.numbers(0, row, rows);
        da.fill(0.0);
        let mut first = 0;
        for (map, g) in linear.maps.iter().zip(g) {
            let outs = linear.outs(map);
            add_product(lanes, rows, &g[row * outs..(row + rows) * outs], outs, packed, (all, first), da, ins);
            first += outs;
        }
        let made: &[f32] = match linear.before {
            Before::Nothing => {
                dx.copy_from_slice(da);
                x
            }
            Before::Norm(norm) => {
                let rows = x.chunks_exact(ins).zip(da.chunks_exact(ins));
                for ((x, da), (a, dx)) in rows.zip(a.chunks_exact_mut(ins).zip(dx.chunks_exact_mut(ins))) {
                    norm::both_of_row(lanes, norm, da, x, a, dx, sums);
                }
                a
            }
            Before::Activation(kind) => {
                activation::both_of_piece(lanes, kind, da, x, a, dx);
                a
            }
            Before::Swiglu => {
                activation::both_of_swiglu(lanes, [da, x, linear.numbers(1, row, rows)], a, [dx, dx2]);
                a
            }
        };
        // SAFETY: these rows are this job's.
        unsafe { to_panels(lanes, ins, made, panels, row, all_rows) }
    }
}

/// A band of dW = gᵀ f(x), and of the bias's gradient.
pub(crate) struct ByWeight<'a> {
    pub(crate) ins: usize,
    pub(crate) rows: usize,
    pub(crate) outs: usize,
    pub(crate) at: usize,
    pub(crate) g: &'a [f32],
    pub(crate) a: &'a [f32],
    pub(crate) dweight: &'a mut [f32],
    pub(crate) dbias: &'a mut [f32],
    pub(crate) own: &'a mut Vec<f32>,
}

impl Job for ByWeight<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { ins, rows, outs, at, g, a, dweight, dbias, own } = self;
        let (panel, band) = (2 * L::WIDTH, dweight.len() / ins);
        dweight.fill(0.0);
        dbias.fill(0.0);
        let columns = lines(own, DEPTH * ROWS * cut(band, ROWS));
        for from in (0..rows).step_by(DEPTH) {
            let deep = DEPTH.min(rows - from);
            // Columns of g, six by six beside each other.
            for (index, to) in columns.chunks_exact_mut(DEPTH * ROWS).enumerate() {
                let (first, wide) = (at + index * ROWS, ROWS.min(band - index * ROWS));
                for (row, to) in to.chunks_exact_mut(ROWS).take(deep).enumerate() {
                    let from = &g[(from + row) * outs + first..][..wide];
                    if let Ok(from) = <&[f32; ROWS]>::try_from(from) {
                        to.copy_from_slice(from);
                    } else {
                        to[..wide].copy_from_slice(from);
                    }
                }
                if let Some(dbias) = dbias.get_mut(index * ROWS..index * ROWS + wide) {
                    // Sixteen rows first, then their sums: one after the other the rounding of all would add up.
                    for rows in to[..deep * ROWS].chunks(16 * ROWS) {
                        let mut sums = [0.0; ROWS];
                        for row in rows.chunks_exact(ROWS) {
                            for (sum, g) in sums.iter_mut().zip(row) {
                                *sum += g;
                            }
                        }
                        for (to, sum) in dbias.iter_mut().zip(sums) {
                            *to += sum;
                        }
                    }
                }
            }
            for column in (0..ins).step_by(panel) {
                let b = &a[column * rows + from * panel..][..deep * panel];
                for (index, left) in columns.chunks_exact(DEPTH * ROWS).enumerate() {
                    let size = (ROWS.min(band - index * ROWS), deep, panel);
                    let left = Left { numbers: left, row: 1, column: ROWS };
                    multiply::<L, true>(lanes, size, left, b, panel, &mut dweight[index * ROWS * ins + column..], ins);
                }
            }
        }
    }
}
