//! A whole block of a pre-norm Transformer, forward and backward, at which threads meet once:
//! h = x + Wo attention(norm x), y = h + W2 act(W1 norm h), in float32.
//!
//! In a small model's step, threads that sleep between a hundred products and are woken for each cost more than a tenth
//! of it, and what every product leaves in memory for the next one as much again. Here they stay awake from a block's
//! first row to its last. Rows go through it in jobs of 48 that stay in a core's cache from one norm to the next; what
//! the stages hand each other is read soon after it was written.
//!
//! Kept for the backward: queries, keys and values as attention saw them, its output and log sums, h, and what W1 (and
//! W3) made: [`Block::kept`] numbers. The rest is worked out again.

use crate::activation::{self, Kind};
use crate::attention::{self, Input, Output, Shape, Sight, Strides};
use crate::linear::{self, BLOCK, ByWeight, Map, OWN, Pack, PackTransposed, STEP, cut, lines};
use crate::norm::{self, Norm};
use crate::simd::{self, Job, Lanes, Level};
use crate::threads::{self, Pieces};
use crate::tile::ROWS;

/// The maps of a block, in this order; the gate is `SwiGLU`'s W3.
#[derive(Clone, Copy, Debug)]
pub struct Maps<'a> {
    /// From the first norm's rows.
    pub qkv: [Map<'a>; 3],
    /// From the heads back to the residual stream.
    pub out: Map<'a>,
    /// W1, from the second norm's rows.
    pub up: Map<'a>,
    /// W3.
    pub gate: Option<Map<'a>>,
    /// W2.
    pub down: Map<'a>,
}

/// What is computed: the same for the forward and the backward.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// Of the attention; as many queries as keys.
    pub shape: Shape,
    /// Of the attention.
    pub sight: Sight,
    /// Width of the residual stream.
    pub width: usize,
    /// Before the attention and before the feed-forward.
    pub norms: [Option<Norm<'a>>; 2],
    /// Cosines and sines by place and pair of neighbouring numbers of a head, as queries and keys are turned.
    pub rotary: Option<[&'a [f32]; 2]>,
    /// ε of the norm (RMS, without weights) of each head's queries and keys behind that.
    pub qk_norm: Option<f32>,
    /// None: silu(W1 n) · W3 n.
    pub activation: Option<Kind>,
    /// The matrices.
    pub maps: Maps<'a>,
}

/// Where a backward's results go.
pub struct Gradients<'a> {
    /// By x.
    pub x: &'a mut [f32],
    /// By weight and bias of q, k, v, out, up, gate where there is one, down; a bias that is not there is empty.
    pub maps: Vec<[&'a mut [f32]; 2]>,
    /// By weight and bias of both norms; empty where there are none.
    pub norms: [[&'a mut [f32]; 2]; 2],
}

/// Lengths of what is kept, in the order in which it lies.
struct Kept {
    /// q, k, v, the attention's output, its log sums, h, W1's rows, W3's, the scales of `qk_norm`.
    lens: [usize; 9],
}

impl<'a> Block<'a> {
    /// All maps, with the width of what they take.
    fn maps(&self) -> Vec<(Map<'a>, usize)> {
        let Maps { qkv, out, up, gate, down } = self.maps;
        let (heads, wide) = (self.shape.heads * self.shape.width, up.weight.len() / self.width);
        let mut all: Vec<_> = qkv.into_iter().map(|map| (map, self.width)).collect();
        all.extend([(out, heads), (up, self.width)]);
        all.extend(gate.map(|gate| (gate, self.width)));
        all.push((down, wide));
        all
    }

    fn rows(&self) -> usize {
        self.shape.batch * self.shape.queries
    }

    fn check(&self, x: &[f32]) {
        let Shape { heads, kv_heads, queries, keys, width, .. } = self.shape;
        self.shape.check();
        assert!(queries == keys && queries > 0 && x.len() == self.rows() * self.width);
        let wide = self.maps.up.weight.len() / self.width;
        let outs = [heads * width, kv_heads * width, kv_heads * width, self.width, wide];
        let outs = outs.into_iter().chain(self.maps.gate.map(|_| wide)).chain([self.width]);
        for ((map, ins), outs) in self.maps().into_iter().zip(outs) {
            assert!(
                ins.is_multiple_of(STEP) && ins > 0 && outs.is_multiple_of(STEP) && outs > 0,
                "block: {ins}, {outs}"
            );
            assert!(map.weight.len() == ins * outs && map.bias.is_none_or(|bias| bias.len() == outs));
        }
        assert_eq!(self.activation.is_none(), self.maps.gate.is_some());
        for norm in self.norms.into_iter().flatten() {
            norm.check(self.width);
        }
        for table in self.rotary.into_iter().flatten() {
            assert_eq!(table.len(), queries * width / 2);
        }
    }

    fn parts(&self) -> Kept {
        let (rows, shape) = (self.rows(), self.shape);
        let (q, kv) = (rows * shape.heads * shape.width, rows * shape.kv_heads * shape.width);
        let wide = rows * (self.maps.up.weight.len() / self.width);
        let scales = if self.qk_norm.is_some() { rows * (shape.heads + shape.kv_heads) } else { 0 };
        let gate = if self.maps.gate.is_some() { wide } else { 0 };
        Kept { lens: [q, kv, kv, q, rows * shape.heads, rows * self.width, wide, gate, scales] }
    }

    /// Numbers that a forward keeps for the backward.
    pub fn kept(&self) -> usize {
        self.parts().lens.iter().sum()
    }

    fn input(&self, numbers: &'a [f32], heads: usize) -> Input<'a> {
        let Shape { queries, width, .. } = self.shape;
        Input::new(numbers, Strides::contiguous(queries, heads, width), self.shape, heads, queries)
    }
}

/// What is left of a slice that is cut up.
struct Rest<'a>(&'a mut [f32]);

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (piece, left) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = left;
        piece
    }
}

/// Job number `index` of those that pack: the map, and the group in it.
fn located(groups: &[usize], mut index: usize) -> (usize, usize) {
    let mut map = 0;
    while index >= groups[map] {
        index -= groups[map];
        map += 1;
    }
    (map, index)
}

/// y, and what the backward will want, [`Block::kept`] numbers.
///
/// # Panics
/// Lengths differ, or widths are no multiples of [`STEP`].
pub fn forward(level: Level, threads: usize, block: &Block<'_>, x: &[f32], kept: &mut [f32], y: &mut [f32]) {
    block.check(x);
    assert!(kept.len() == block.kept() && y.len() == x.len());
    let (rows, width, shape) = (block.rows(), block.width, block.shape);
    let mut rest = Rest(kept);
    let parts = block.parts().lens.map(|len| Pieces::new(rest.take(len), 1));
    let [q, k, v, mixed, logs, h, up, gate, scales] = parts;
    let y = Pieces::new(y, 1);
    let maps = block.maps();
    let groups: Vec<usize> = maps.iter().map(|(map, ins)| map.weight.len() / ins / STEP).collect();
    linear::with_shared(|shared| {
        let mut rest = Rest(lines(shared, maps.iter().map(|(map, _)| map.weight.len()).sum()));
        let packed: Vec<Pieces<'_>> =
            maps.iter().map(|(map, ins)| Pieces::new(rest.take(map.weight.len()), STEP * ins)).collect();
        let stages = [groups.iter().sum(), cut(rows, BLOCK), shape.batch * shape.kv_heads, cut(rows, BLOCK)];
        threads::share_in_stages(threads, stages, |stage, index| {
            let row = index * BLOCK;
            // What is read was written in stages that are over; what is written is this job's: every index comes once.
            match stage {
                0 => {
                    let (map, group) = located(&groups, index);
                    let (weight, ins) = (maps[map].0.weight, maps[map].1);
                    let weight = &weight[group * STEP * ins..][..STEP * ins];
                    // SAFETY: see above, here and below.
                    simd::run(level, PackTransposed { ins, weight, to: unsafe { packed[map].piece(group) } });
                }
                // SAFETY: see above.
                1 => OWN.with_borrow_mut(|own| unsafe {
                    let count = BLOCK.min(rows - row);
                    let packed = [0, 1, 2].map(|i| packed[i].whole());
                    let qkv = [&q, &k, &v].map(|pieces| pieces.rows(row, count, rows));
                    let (x, scales) = (&x[row * width..(row + count) * width], scales.rows(row, count, rows));
                    simd::run(level, Enter { block, row, x, packed, qkv, scales, own });
                }),
                // SAFETY: see above.
                2 => unsafe {
                    let heads = [shape.heads, shape.kv_heads, shape.kv_heads];
                    let inputs = [q.whole(), k.whole(), v.whole()];
                    let inputs = [0, 1, 2].map(|i| block.input(inputs[i], heads[i]));
                    let out = Output::of_pieces(&mixed, shape, shape.heads, shape.queries);
                    let logs = Output::of_pieces(&logs, Shape { width: 1, ..shape }, shape.heads, shape.queries);
                    attention::forward_job(level, shape, block.sight, index, inputs, &out, &logs);
                },
                // SAFETY: see above.
                _ => OWN.with_borrow_mut(|own| unsafe {
                    let count = BLOCK.min(rows - row);
                    let packed: Vec<&[f32]> = packed[3..].iter().map(|packed| packed.whole()).collect();
                    let x = &x[row * width..(row + count) * width];
                    let [mixed, h, up, gate, y] =
                        [&mixed, &h, &up, &gate, &y].map(|pieces| pieces.rows(row, count, rows));
                    simd::run(level, Leave { block, x, packed, mixed, h, up, gate, y, own });
                }),
            }
        });
    });
}

/// From the residual stream to queries, keys and values.
struct Enter<'a> {
    block: &'a Block<'a>,
    row: usize,
    x: &'a [f32],
    packed: [&'a [f32]; 3],
    qkv: [&'a mut [f32]; 3],
    scales: &'a mut [f32],
    own: &'a mut Vec<f32>,
}

impl Job for Enter<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { block, row, x, packed, qkv, scales, own } = self;
        let (width, shape) = (block.width, block.shape);
        let normed = normed(lanes, block.norms[0], width, x, lines(own, x.len()));
        let [q, k, v] = qkv;
        for ((y, packed), map) in [&mut *q, &mut *k, v].into_iter().zip(packed).zip(block.maps.qkv) {
            linear::forward_rows(lanes, width, normed, packed, map.bias, None, y);
        }
        let heads = shape.heads + shape.kv_heads;
        for (index, (q, k)) in
            rows_of(q, shape.heads, shape.width).zip(rows_of(k, shape.kv_heads, shape.width)).enumerate()
        {
            let place = (row + index) % shape.queries;
            let mut scales = scales.get_mut(index * heads..(index + 1) * heads).unwrap_or_default().iter_mut();
            for head in q.chunks_exact_mut(shape.width).chain(k.chunks_exact_mut(shape.width)) {
                if let Some([cos, sin]) = block.rotary {
                    turn(head, place, cos, sin, 1.0);
                }
                if let (Some(eps), Some(scale)) = (block.qk_norm, scales.next()) {
                    *scale = norm::to_unit(lanes, head, eps);
                }
            }
        }
    }
}

fn rows_of(numbers: &mut [f32], heads: usize, width: usize) -> std::slice::ChunksExactMut<'_, f32> {
    numbers.chunks_exact_mut(heads * width)
}

/// The rows behind the norm, in `to`, or themselves where there is none.
#[inline(always)]
fn normed<'a, L: Lanes>(lanes: L, norm: Option<Norm<'_>>, width: usize, x: &'a [f32], to: &'a mut [f32]) -> &'a [f32] {
    let Some(norm) = norm else { return x };
    for (x, to) in x.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
        norm::of_row(lanes, norm, x, to);
    }
    to
}

/// Rotary positions (Su et al. 2021) of a head at a place: neighbouring numbers turned by its angles, times `sign`.
#[inline(always)]
fn turn(head: &mut [f32], place: usize, cos: &[f32], sin: &[f32], sign: f32) {
    let half = head.len() / 2;
    let (cos, sin) = (&cos[place * half..][..half], &sin[place * half..][..half]);
    for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b, sin) = (pair[0], pair[1], sign * sin);
        pair[0] = a * cos - b * sin;
        pair[1] = a * sin + b * cos;
    }
}

/// From the attention's output to the block's.
struct Leave<'a> {
    block: &'a Block<'a>,
    x: &'a [f32],
    /// Of out, up, gate where there is one, down.
    packed: Vec<&'a [f32]>,
    mixed: &'a [f32],
    h: &'a mut [f32],
    up: &'a mut [f32],
    gate: &'a mut [f32],
    y: &'a mut [f32],
    own: &'a mut Vec<f32>,
}

impl Job for Leave<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { block, x, packed, mixed, h, up, gate, y, own } = self;
        let (width, maps) = (block.width, block.maps);
        let wide = maps.up.weight.len() / width;
        linear::forward_rows(lanes, block.shape.heads * block.shape.width, mixed, packed[0], maps.out.bias, Some(x), h);
        let (own, a) = lines(own, h.len() + up.len()).split_at_mut(h.len());
        let n = normed(lanes, block.norms[1], width, h, own);
        linear::forward_rows(lanes, width, n, packed[1], maps.up.bias, None, up);
        if let Some(map) = maps.gate {
            linear::forward_rows(lanes, width, n, packed[2], map.bias, None, gate);
        }
        match block.activation {
            Some(kind) => activation::of_piece(lanes, kind, up, a),
            None => activation::swiglu_of_piece(lanes, up, gate, a),
        }
        linear::forward_rows(lanes, wide, a, packed[packed.len() - 1], maps.down.bias, Some(h), y);
    }
}

/// What a backward's stages hand each other; rows but for the panels, which are columns two vectors wide.
struct Between<'a> {
    /// f of the four groups of maps: norm x, attention, norm h, the activation.
    panels: [Pieces<'a>; 4],
    /// Gradients by q, k, v, by h, by W1's and W3's rows, by the attention's output.
    q: Pieces<'a>,
    k: Pieces<'a>,
    v: Pieces<'a>,
    h: Pieces<'a>,
    up: Pieces<'a>,
    gate: Pieces<'a>,
    mixed: Pieces<'a>,
}

/// The gradients of Σ y · g, from x and what [`forward`] kept.
///
/// # Panics
/// As [`forward`].
#[expect(clippy::too_many_lines, reason = "five stages, each a few lines")]
pub fn backward(
    level: Level,
    threads: usize,
    block: &Block<'_>,
    x: &[f32],
    kept: &[f32],
    g: &[f32],
    to: &mut Gradients<'_>,
) {
    block.check(x);
    let maps = block.maps();
    assert!(kept.len() == block.kept() && g.len() == x.len() && to.x.len() == x.len() && to.maps.len() == maps.len());
    for ((map, _), to) in maps.iter().zip(&to.maps) {
        assert!(to[0].len() == map.weight.len() && to[1].len() == map.bias.map_or(0, <[f32]>::len));
    }
    let lens = block.norms.map(|norm| norm.map_or([0, 0], Norm::lens));
    assert!((0..4).all(|i| to.norms[i / 2][i % 2].len() == lens[i / 2][i % 2]));
    let (rows, width, shape) = (block.rows(), block.width, block.shape);
    let mut rest = kept;
    let [q, k, v, mixed, logs, h, up, gate, scales] = block.parts().lens.map(|len| {
        let (piece, left) = rest.split_at(len);
        rest = left;
        piece
    });
    // Those of the same input stand behind one another: their gradients add up inside the products.
    let Maps { qkv, out, up: up_map, gate: gate_map, down } = block.maps;
    let ups: Vec<Map<'_>> = [up_map].into_iter().chain(gate_map).collect();
    let (wide, heads) = (up.len() / rows, shape.heads * shape.width);
    let sets: [(&[Map<'_>], usize); 4] = [(&qkv, width), (&[out], heads), (&ups, width), (&[down], wide)];
    let weights = sets.map(|(maps, _)| maps.iter().map(|map| map.weight.len()).sum::<usize>());
    let groups = sets.map(|(_, ins)| ins / STEP);
    let blocks = cut(rows, BLOCK);
    let summed: usize = lens.iter().flatten().sum();
    let bands = bands(&maps, threads);
    let Gradients { x: dx, maps: dmaps, norms: dnorms } = to;
    let dx = Pieces::new(dx, 1);
    let dmaps: Vec<[Pieces<'_>; 2]> =
        dmaps.iter_mut().map(|[weight, bias]| [Pieces::new(weight, 1), Pieces::new(bias, 1)]).collect();
    linear::with_shared(|shared| {
        let between = [q.len(), k.len(), v.len(), h.len(), up.len(), gate.len(), mixed.len()];
        let panels = [x.len(), mixed.len(), h.len(), up.len()];
        let all = weights.iter().chain(&between).chain(&panels).sum::<usize>() + blocks * summed;
        let mut rest = Rest(lines(shared, all));
        let packed: [Pieces<'_>; 4] = std::array::from_fn(|i| {
            let pieces = rest.take(weights[i]);
            Pieces::new(pieces, STEP * weights[i] / sets[i].1)
        });
        let panels = panels.map(|len| Pieces::new(rest.take(len), 1));
        let [dq, dk, dv, dh, dup, dgate, dmixed] = between.map(|len| Pieces::new(rest.take(len), 1));
        let between = Between { panels, q: dq, k: dk, v: dv, h: dh, up: dup, gate: dgate, mixed: dmixed };
        rest.0.fill(0.0);
        let sums = Pieces::new(rest.0, summed);
        let stages = [groups.iter().sum(), blocks, shape.batch * shape.kv_heads, blocks, bands.len()];
        threads::share_in_stages(threads, stages, |stage, index| {
            let row = index * BLOCK;
            // As in `forward`: what is read is finished, what is written is this job's.
            match stage {
                0 => {
                    let (set, group) = located(&groups, index);
                    let (maps, ins) = sets[set];
                    // SAFETY: see above.
                    simd::run(level, Pack { ins, maps, column: group * STEP, to: unsafe { packed[set].piece(group) } });
                }
                // SAFETY: see above.
                1 => OWN.with_borrow_mut(|own| unsafe {
                    let rows = row..rows.min(row + BLOCK);
                    let (_, sums) = sums.piece(index).split_at_mut(lens[0][0] + lens[0][1]);
                    let packed = [1, 2, 3].map(|i| packed[i].whole());
                    let kept = [mixed, h, up, gate];
                    simd::run(level, BackFromEnd { block, rows, g, kept, packed, between: &between, sums, own });
                }),
                // SAFETY: see above.
                2 => unsafe {
                    let inputs =
                        [block.input(q, shape.heads), block.input(k, shape.kv_heads), block.input(v, shape.kv_heads)];
                    let (dout, out) =
                        (block.input(between.mixed.whole(), shape.heads), block.input(mixed, shape.heads));
                    let [dq, dk, dv] =
                        [(&between.q, shape.heads), (&between.k, shape.kv_heads), (&between.v, shape.kv_heads)]
                            .map(|(pieces, heads)| Output::of_pieces(pieces, shape, heads, shape.queries));
                    attention::backward_job(level, shape, block.sight, index, dout, inputs, out, logs, [&dq, &dk, &dv]);
                },
                // SAFETY: see above.
                3 => OWN.with_borrow_mut(|own| unsafe {
                    let rows = row..rows.min(row + BLOCK);
                    let (sums, _) = sums.piece(index).split_at_mut(lens[0][0] + lens[0][1]);
                    let dx = dx.from(rows.start * width, rows.len() * width);
                    let (kept, packed) = ([q, k, scales], packed[0].whole());
                    simd::run(level, BackToStart { block, rows, x, kept, packed, between: &between, dx, sums, own });
                }),
                // SAFETY: see above.
                _ => OWN.with_borrow_mut(|own| unsafe {
                    let Band { map, at, len } = bands[index];
                    let ins = maps[map].1;
                    let (dh, up, gate) = (&between.h, &between.up, &between.gate);
                    let last = maps.len() - 1;
                    let (g, set) = match map {
                        0 => (between.q.whole(), 0),
                        1 => (between.k.whole(), 0),
                        2 => (between.v.whole(), 0),
                        3 => (dh.whole(), 1),
                        4 => (up.whole(), 2),
                        _ if map == last => (g, 3),
                        _ => (gate.whole(), 2),
                    };
                    let [dweight, dbias] = &dmaps[map];
                    let dweight = dweight.from(at * ins, len * ins);
                    let dbias = if dbias.len() == 0 { &mut [] } else { dbias.from(at, len) };
                    let (a, outs) = (between.panels[set].whole(), g.len() / rows);
                    simd::run(level, ByWeight { ins, rows, outs, at, g, a, dweight, dbias, own });
                }),
            }
        });
        let mut at = 0;
        for to in dnorms.iter_mut().flatten() {
            to.fill(0.0);
            // SAFETY: all stages are over.
            for sums in unsafe { sums.whole() }.chunks_exact(summed.max(1)) {
                for (to, from) in to.iter_mut().zip(&sums[at..]) {
                    *to += from;
                }
            }
            at += to.len();
        }
    });
}

/// Rows of a weight whose gradient is one job.
#[derive(Clone, Copy)]
struct Band {
    map: usize,
    at: usize,
    len: usize,
}

/// A few bands a thread, of about the same work: the last one to end is not long alone. No sum depends on them.
fn bands(maps: &[(Map<'_>, usize)], threads: usize) -> Vec<Band> {
    let all: usize = maps.iter().map(|(map, _)| map.weight.len()).sum();
    let mut bands = Vec::new();
    for (map, &(Map { weight, .. }, ins)) in maps.iter().enumerate() {
        let outs = weight.len() / ins;
        let most = (all / (12 * threads.max(1)) / ins).next_multiple_of(ROWS).clamp(ROWS, BLOCK);
        bands.extend((0..outs).step_by(most).map(|at| Band { map, at, len: most.min(outs - at) }));
    }
    bands
}

/// From the block's gradient to the attention's.
struct BackFromEnd<'a> {
    block: &'a Block<'a>,
    rows: std::ops::Range<usize>,
    g: &'a [f32],
    /// The attention's output, h, W1's and W3's rows.
    kept: [&'a [f32]; 4],
    /// Of out, of up and gate, of down.
    packed: [&'a [f32]; 3],
    between: &'a Between<'a>,
    /// Of the second norm.
    sums: &'a mut [f32],
    own: &'a mut Vec<f32>,
}

impl<'a> Job for BackFromEnd<'a> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { block, rows, g, kept, packed, between, sums, own } = self;
        let (first, count, all_rows) = (rows.start, rows.len(), block.rows());
        let (width, heads) = (block.width, block.shape.heads * block.shape.width);
        let wide = block.maps.up.weight.len() / width;
        let of = |wide: usize| first * wide..(first + count) * wide;
        let [mixed, h, up, gate] = kept;
        let (g, mixed, h, up) = (&g[of(width)], &mixed[of(heads)], &h[of(width)], &up[of(wide)]);
        let [_, mixed_panels, h_panels, up_panels] = &between.panels;
        let scratch = lines(own, 2 * count * (wide + width));
        let (da, scratch) = scratch.split_at_mut(count * wide);
        let (a, scratch) = scratch.split_at_mut(count * wide);
        let (dn, n) = scratch.split_at_mut(count * width);
        // SAFETY: these rows are this job's, here and below.
        let (dup, dh, dmixed) = unsafe {
            let of = |pieces: &'a Pieces<'a>| pieces.rows(first, count, all_rows);
            (of(&between.up), of(&between.h), of(&between.mixed))
        };
        da.fill(0.0);
        linear::add_product(lanes, count, g, width, packed[2], (width, 0), da, wide);
        dn.fill(0.0);
        let depth = if block.maps.gate.is_some() { 2 * wide } else { wide };
        if let Some(kind) = block.activation {
            activation::both_of_piece(lanes, kind, da, up, a, dup);
        } else {
            // SAFETY: as above.
            let dgate = unsafe { between.gate.from(first * wide, count * wide) };
            activation::both_of_swiglu(lanes, [da, up, &gate[of(wide)]], a, [dup, dgate]);
            linear::add_product(lanes, count, dgate, wide, packed[1], (depth, wide), dn, width);
        }
        linear::add_product(lanes, count, dup, wide, packed[1], (depth, 0), dn, width);
        let n: &[f32] = if let Some(norm) = block.norms[1] {
            back_of_norm(lanes, norm, width, [dn, h], n, dh, sums);
            n
        } else {
            dh.copy_from_slice(dn);
            h
        };
        add(lanes, g, dh);
        dmixed.fill(0.0);
        linear::add_product(lanes, count, dh, width, packed[0], (width, 0), dmixed, heads);
        // SAFETY: as above.
        unsafe {
            linear::to_panels(lanes, wide, a, up_panels, first, all_rows);
            linear::to_panels(lanes, width, n, h_panels, first, all_rows);
            linear::to_panels(lanes, heads, mixed, mixed_panels, first, all_rows);
        }
    }
}

/// Norms of rows x into `n`, and the gradients by them, from those by n, into `dx`.
#[inline(always)]
fn back_of_norm<L: Lanes>(
    lanes: L,
    norm: Norm<'_>,
    width: usize,
    [dn, x]: [&[f32]; 2],
    n: &mut [f32],
    dx: &mut [f32],
    sums: &mut [f32],
) {
    let given = dn.chunks_exact(width).zip(x.chunks_exact(width));
    for ((dn, x), (n, dx)) in given.zip(n.chunks_exact_mut(width).zip(dx.chunks_exact_mut(width))) {
        norm::both_of_row(lanes, norm, dn, x, n, dx, sums);
    }
}

/// `to` += `from`.
#[inline(always)]
fn add<L: Lanes>(lanes: L, from: &[f32], to: &mut [f32]) {
    for (from, to) in from.chunks_exact(L::WIDTH).zip(to.chunks_exact_mut(L::WIDTH)) {
        // SAFETY: the chunks are a vector long; rows are a multiple of it.
        unsafe { lanes.store(to.as_mut_ptr(), lanes.add(lanes.load(to.as_ptr()), lanes.load(from.as_ptr()))) }
    }
}

/// From the gradients by queries, keys and values to that by x.
struct BackToStart<'a> {
    block: &'a Block<'a>,
    rows: std::ops::Range<usize>,
    x: &'a [f32],
    /// q, k, and the scales of their norms.
    kept: [&'a [f32]; 3],
    /// Of q, k and v.
    packed: &'a [f32],
    between: &'a Between<'a>,
    dx: &'a mut [f32],
    /// Of the first norm.
    sums: &'a mut [f32],
    own: &'a mut Vec<f32>,
}

impl<'a> Job for BackToStart<'a> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { block, rows, x, kept: [q, k, scales], packed, between, dx, sums, own } = self;
        let (first, count, width, shape) = (rows.start, rows.len(), block.width, block.shape);
        let (heads, kv) = (shape.heads * shape.width, shape.kv_heads * shape.width);
        // SAFETY: these rows are this job's, here and below.
        let of = |pieces: &'a Pieces<'a>| unsafe { pieces.rows(first, count, block.rows()) };
        let (dq, dk, dv, dh) = (of(&between.q), of(&between.k), of(&between.v), of(&between.h));
        let of_row = shape.heads + shape.kv_heads;
        for index in 0..count {
            let row = first + index;
            let mut scales = scales.get(row * of_row..(row + 1) * of_row).unwrap_or_default().iter();
            for (d, kept, wide) in [(&mut *dq, q, heads), (&mut *dk, k, kv)] {
                let kept = &kept[row * wide..(row + 1) * wide];
                let d = &mut d[index * wide..(index + 1) * wide];
                for (d, kept) in d.chunks_exact_mut(shape.width).zip(kept.chunks_exact(shape.width)) {
                    if let Some(&scale) = scales.next() {
                        norm::back_from_unit(lanes, d, kept, scale);
                    }
                    if let Some([cos, sin]) = block.rotary {
                        turn(d, row % shape.queries, cos, sin, -1.0);
                    }
                }
            }
        }
        let (dn, n) = lines(own, 2 * count * width).split_at_mut(count * width);
        dn.fill(0.0);
        let depth = heads + 2 * kv;
        for (d, wide, from) in [(&*dq, heads, 0), (dk, kv, heads), (dv, kv, heads + kv)] {
            linear::add_product(lanes, count, d, wide, packed, (depth, from), dn, width);
        }
        let x = &x[first * width..(first + count) * width];
        let n: &[f32] = if let Some(norm) = block.norms[0] {
            back_of_norm(lanes, norm, width, [dn, x], n, dx, sums);
            n
        } else {
            dx.copy_from_slice(dn);
            x
        };
        add(lanes, dh, dx);
        // SAFETY: as above.
        unsafe { linear::to_panels(lanes, width, n, &between.panels[0], first, block.rows()) }
    }
}
