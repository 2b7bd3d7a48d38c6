//! The one matrix product everything is made of: a few rows of A, broadcast number by number, times rows of B.

use crate::simd::Lanes;

/// Rows of a tile at most: with two vectors a row, twelve sums and what they need fill AVX2's sixteen registers, and
/// twelve independent sums hide the latency of two FMAs a cycle.
pub(crate) const ROWS: usize = 6;

/// A matrix whose numbers are read one by one, so that its transpose costs nothing.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    /// Begins with the first number of the tile.
    pub numbers: &'a [f32],
    /// Steps from row to row, and from column to column.
    pub row: usize,
    /// See `row`.
    pub column: usize,
}

/// c[r][j] (+)= Σ a[r][d] b[d][j] over `depth` d, for `rows` ≤ [`ROWS`] rows and `columns` j, a multiple of the
/// vector's width. Rows of b and c are `b_row` and `c_row` apart.
#[inline(always)]
pub(crate) fn multiply<L: Lanes, const ADD: bool>(
    lanes: L,
    (rows, depth, columns): (usize, usize, usize),
    a: Left<'_>,
    b: &[f32],
    b_row: usize,
    c: &mut [f32],
    c_row: usize,
) {
    match rows {
        6 => strips::<L, ADD, 6>(lanes, depth, columns, a, b, b_row, c, c_row),
        5 => strips::<L, ADD, 5>(lanes, depth, columns, a, b, b_row, c, c_row),
        4 => strips::<L, ADD, 4>(lanes, depth, columns, a, b, b_row, c, c_row),
        3 => strips::<L, ADD, 3>(lanes, depth, columns, a, b, b_row, c, c_row),
        2 => strips::<L, ADD, 2>(lanes, depth, columns, a, b, b_row, c, c_row),
        _ => {
            assert_eq!(rows, 1);
            strips::<L, ADD, 1>(lanes, depth, columns, a, b, b_row, c, c_row);
        }
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a matrix product")]
fn strips<L: Lanes, const ADD: bool, const R: usize>(
    lanes: L,
    depth: usize,
    columns: usize,
    a: Left<'_>,
    b: &[f32],
    b_row: usize,
    c: &mut [f32],
    c_row: usize,
) {
    assert!(depth > 0 && columns.is_multiple_of(L::WIDTH));
    assert!((R - 1) * a.row + (depth - 1) * a.column < a.numbers.len());
    assert!((depth - 1) * b_row + columns <= b.len() && (R - 1) * c_row + columns <= c.len());
    let mut at = 0;
    // SAFETY: what is read and written ends at the places just asserted; `at` plus the strip's width ≤ columns.
    unsafe {
        while at + 2 * L::WIDTH <= columns {
            let (b, c) = (b.as_ptr().add(at), c.as_mut_ptr().add(at));
            strip::<L, ADD, R, 2>(lanes, depth, a, b, b_row, c, c_row);
            at += 2 * L::WIDTH;
        }
        if at < columns {
            let (b, c) = (b.as_ptr().add(at), c.as_mut_ptr().add(at));
            strip::<L, ADD, R, 1>(lanes, depth, a, b, b_row, c, c_row);
        }
    }
}

/// R rows of N vectors, all of whose sums stay in registers.
///
/// # Safety
/// R × `depth` numbers of `a`, `depth` × N vectors at `b` and R × N vectors at `c` are there.
#[inline(always)]
unsafe fn strip<L: Lanes, const ADD: bool, const R: usize, const N: usize>(
    lanes: L,
    depth: usize,
    a: Left<'_>,
    mut b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
) {
    let mut sums = [[lanes.splat(0.0); N]; R];
    let mut from = a.numbers.as_ptr();
    // SAFETY: the caller's. The last step leaves the pointers behind what is read, where they are not used.
    unsafe {
        for _ in 0..depth {
            let mut right = [lanes.splat(0.0); N];
            for (n, vector) in right.iter_mut().enumerate() {
                *vector = lanes.load(b.add(n * L::WIDTH));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let left = lanes.splat(*from.add(r * a.row));
                for (sum, vector) in row.iter_mut().zip(right) {
                    *sum = lanes.mul_add(left, vector, *sum);
                }
            }
            from = from.wrapping_add(a.column);
            b = b.wrapping_add(b_row);
        }
        for (r, row) in sums.iter().enumerate() {
            for (n, &sum) in row.iter().enumerate() {
                let to = c.add(r * c_row + n * L::WIDTH);
                lanes.store(to, if ADD { lanes.add(lanes.load(to), sum) } else { sum });
            }
        }
    }
}
