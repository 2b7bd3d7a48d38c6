//! Binding of `bytekiln-kernels`: tensors arrive as addresses, sizes and strides, and `kernels.py` vouches for them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use bytekiln_bpe::Error;
use bytekiln_kernels::activation::{self, Kind};
use bytekiln_kernels::attention::{self, Input, Output, Shape, Sight, Strides};
use bytekiln_kernels::block::{self, Block, Maps};
use bytekiln_kernels::dropout::dropout as dropped;
use bytekiln_kernels::linear::{self, Before, Gradients, Linear, Map, OutOfMemory};
use bytekiln_kernels::norm::{self, Norm};
use bytekiln_kernels::number::Bf16;
use bytekiln_kernels::simd::Level;
use bytekiln_kernels::threads::{self, Parallel};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;

use crate::error::to_python;

/// Address of float32 numbers, or bf16 ones where that is said.
type Address = usize;
/// A tensor that is read: its address, and its strides in numbers by batch, head and place.
type Strided = (Address, (usize, usize, usize));
/// (batch, heads, kv_heads, queries, keys, width)
type Sizes = (usize, usize, usize, usize, usize, usize);

fn level(py: Python<'_>) -> PyResult<Level> {
    Level::of_process().map_err(|what| to_python(py, &Error::Config(what)))
}

/// # Safety
/// `len` numbers of this type stand at the address for as long as the slice is used, and nobody writes them.
unsafe fn read<'a, T>(address: Address, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    assert!(address != 0 && address.is_multiple_of(align_of::<T>()), "kernels: found address {address}");
    // SAFETY: the caller's word, for everything that could not be asserted.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

/// # Safety
/// As for [`read`], and nobody else reads or writes them.
unsafe fn write<'a, T>(address: Address, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    assert!(address != 0 && address.is_multiple_of(align_of::<T>()), "kernels: found address {address}");
    // SAFETY: the caller's word, for everything that could not be asserted.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, len) }
}

fn shape_of((batch, heads, kv_heads, queries, keys, width): Sizes) -> Shape {
    Shape { batch, heads, kv_heads, queries, keys, width }
}

/// # Safety
/// As for [`read`], over the extent of the strides.
unsafe fn input<'a>((address, (batch, head, time)): Strided, shape: Shape, heads: usize, times: usize) -> Input<'a> {
    let strides = Strides { batch, head, time };
    let extent = strides.extent(shape.batch, heads, times, shape.width);
    // SAFETY: the caller's.
    Input::new(unsafe { read(address, extent) }, strides, shape, heads, times)
}

/// # Safety
/// As for [`write`], over the tensor's numbers.
unsafe fn output<'a>(address: Address, shape: Shape, heads: usize, times: usize) -> Output<'a> {
    // SAFETY: the caller's.
    let numbers = unsafe { write(address, shape.batch * times * heads * shape.width) };
    Output::new(numbers, shape, heads, times)
}

/// The instructions that the kernels use: scalar, avx2 or avx512.
#[pyfunction]
pub fn simd_level(py: Python<'_>) -> PyResult<&'static str> {
    Ok(level(py)?.name())
}

/// Kernels run on the threads of the OpenMP whose `GOMP_parallel` is at this address; with 0 on the core's own.
#[pyfunction]
pub fn borrow_threads(gomp_parallel: Address) {
    // SAFETY: `kernels.py` found it in the library that torch itself runs on, which stays loaded.
    unsafe {
        let parallel = (gomp_parallel != 0).then(|| std::mem::transmute::<Address, Parallel>(gomp_parallel));
        threads::borrow(parallel);
    }
}

/// Runs what is generic over the numbers' type for the one that is meant.
macro_rules! of_type {
    ($bf16:expr, |$number:ident| $work:expr) => {
        if $bf16 {
            type $number = Bf16;
            $work
        } else {
            type $number = f32;
            $work
        }
    };
}

fn kind_of(py: Python<'_>, name: &str) -> PyResult<Kind> {
    Kind::from_name(name).ok_or_else(|| {
        to_python(py, &Error::Config(format!("activation: found {name}; expected gelu, gelu_tanh, silu or relu2")))
    })
}

/// y = f(x) over `len` numbers.
#[pyfunction]
pub fn activation_forward(
    py: Python<'_>,
    threads: usize,
    kind: &str,
    bf16: bool,
    len: usize,
    x: Address,
    y: Address,
) -> PyResult<()> {
    let (kind, level) = (kind_of(py, kind)?, level(py)?);
    py.detach(|| {
        of_type!(bf16, |Number| {
            // SAFETY: `kernels.py` holds the tensors, contiguous and of this length and type, and has just made y.
            let (x, y) = unsafe { (read::<Number>(x, len), write(y, len)) };
            activation::forward(level, threads, kind, x, y);
        });
    });
    Ok(())
}

/// dx = g f'(x) over `len` numbers.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "an operator of torch has as many")]
pub fn activation_backward(
    py: Python<'_>,
    threads: usize,
    kind: &str,
    bf16: bool,
    len: usize,
    g: Address,
    x: Address,
    dx: Address,
) -> PyResult<()> {
    let (kind, level) = (kind_of(py, kind)?, level(py)?);
    py.detach(|| {
        of_type!(bf16, |Number| {
            // SAFETY: as in `activation_forward`.
            let (g, x, dx) = unsafe { (read::<Number>(g, len), read(x, len), write(dx, len)) };
            activation::backward(level, threads, kind, g, x, dx);
        });
    });
    Ok(())
}

/// y = x / (1 - rate) or 0 over `len` numbers, as the seed and their places say; bf16 ones, or float32.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "an operator of torch has as many")]
pub fn dropout(
    py: Python<'_>,
    threads: usize,
    seed: u64,
    rate: f64,
    bf16: bool,
    len: usize,
    x: Address,
    y: Address,
) -> PyResult<()> {
    let level = level(py)?;
    py.detach(|| {
        of_type!(bf16, |Number| {
            // SAFETY: as in `activation_forward`.
            let (x, y) = unsafe { (read::<Number>(x, len), write(y, len)) };
            dropped(level, threads, seed, rate, x, y);
        });
    });
    Ok(())
}

/// y = silu(a) · b over `len` numbers.
#[pyfunction]
pub fn swiglu_forward(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    len: usize,
    a: Address,
    b: Address,
    y: Address,
) -> PyResult<()> {
    let level = level(py)?;
    py.detach(|| {
        of_type!(bf16, |Number| {
            // SAFETY: as in `activation_forward`.
            let (a, b, y) = unsafe { (read::<Number>(a, len), read(b, len), write(y, len)) };
            activation::swiglu(level, threads, a, b, y);
        });
    });
    Ok(())
}

/// Gradients of `swiglu_forward` by a and b.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "five tensors")]
pub fn swiglu_backward(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    len: usize,
    g: Address,
    a: Address,
    b: Address,
    da: Address,
    db: Address,
) -> PyResult<()> {
    let level = level(py)?;
    py.detach(|| {
        of_type!(bf16, |Number| {
            // SAFETY: as in `activation_forward`.
            let ((g, a, b), da, db) =
                unsafe { ((read::<Number>(g, len), read(a, len), read(b, len)), write(da, len), write(db, len)) };
            activation::swiglu_backward(level, threads, g, a, b, da, db);
        });
    });
    Ok(())
}

/// Attention; writes `out` as B×T×H×K and `log_sums` as B×T×H.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "five tensors")]
pub fn attention_forward(
    py: Python<'_>,
    threads: usize,
    sizes: Sizes,
    causal: bool,
    window: usize,
    q: Strided,
    k: Strided,
    v: Strided,
    out: Address,
    log_sums: Address,
) -> PyResult<()> {
    let (level, shape) = (level(py)?, shape_of(sizes));
    let Shape { batch, heads, kv_heads, queries, keys, .. } = shape;
    py.detach(|| {
        // SAFETY: `kernels.py` holds the tensors, of these sizes and strides, and has just made the outputs.
        unsafe {
            let (k, v) = (input(k, shape, kv_heads, keys), input(v, shape, kv_heads, keys));
            let (q, mut out) = (input(q, shape, heads, queries), output(out, shape, heads, queries));
            let log_sums = write(log_sums, batch * queries * heads);
            attention::forward(level, threads, shape, Sight { causal, window }, q, k, v, &mut out, log_sums);
        }
    });
    Ok(())
}

/// Gradients of `attention_forward` by q (B×T×H×K), k and v (B×S×G×K).
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "nine tensors")]
pub fn attention_backward(
    py: Python<'_>,
    threads: usize,
    sizes: Sizes,
    causal: bool,
    window: usize,
    dout: Strided,
    q: Strided,
    k: Strided,
    v: Strided,
    out: Strided,
    log_sums: Address,
    dq: Address,
    dk: Address,
    dv: Address,
) -> PyResult<()> {
    let (level, shape) = (level(py)?, shape_of(sizes));
    let Shape { batch, heads, kv_heads, queries, keys, .. } = shape;
    py.detach(|| {
        // SAFETY: as in `attention_forward`.
        unsafe {
            let (k, v) = (input(k, shape, kv_heads, keys), input(v, shape, kv_heads, keys));
            let [q, dout, out] = [q, dout, out].map(|x| input(x, shape, heads, queries));
            let log_sums = read(log_sums, batch * queries * heads);
            let (mut dq, mut dk, mut dv) = (
                output(dq, shape, heads, queries),
                output(dk, shape, kv_heads, keys),
                output(dv, shape, kv_heads, keys),
            );
            let sight = Sight { causal, window };
            attention::backward(level, threads, shape, sight, dout, q, k, v, out, log_sums, &mut dq, &mut dk, &mut dv);
        }
    });
    Ok(())
}

/// RMSNorm of rows of `width`, and a scale for each; `weight` 0: none.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "four tensors")]
pub fn rms_norm_forward(
    py: Python<'_>,
    threads: usize,
    width: usize,
    rows: usize,
    eps: f32,
    x: Address,
    weight: Address,
    y: Address,
    scales: Address,
) -> PyResult<()> {
    let level = level(py)?;
    py.detach(|| {
        // SAFETY: as in `activation_forward`.
        let (x, weight) = unsafe { (read(x, rows * width), (weight != 0).then(|| read(weight, width))) };
        // SAFETY: as above.
        let (y, scales) = unsafe { (write(y, rows * width), write(scales, rows)) };
        norm::forward(level, threads, width, eps, x, weight, y, scales);
    });
    Ok(())
}

/// Gradients of `rms_norm_forward` by x and, unless `weight` is 0, by the weights.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "six tensors")]
pub fn rms_norm_backward(
    py: Python<'_>,
    threads: usize,
    width: usize,
    rows: usize,
    g: Address,
    x: Address,
    scales: Address,
    weight: Address,
    dx: Address,
    dweight: Address,
) -> PyResult<()> {
    let level = level(py)?;
    let has_weight = weight != 0;
    py.detach(|| {
        // SAFETY: as in `activation_forward`.
        let (g, x, scales) = unsafe { (read(g, rows * width), read(x, rows * width), read(scales, rows)) };
        // SAFETY: as above.
        let weight = has_weight.then(|| unsafe { read(weight, width) });
        // SAFETY: as above.
        let (dx, dweight) = unsafe { (write(dx, rows * width), write(dweight, if has_weight { width } else { 0 })) };
        norm::backward(level, threads, width, g, x, scales, weight, dx, dweight);
    });
    Ok(())
}

/// Lets other threads of Python run meanwhile; where the core has no memory, that is a `MemoryError`.
fn without_python(py: Python<'_>, work: impl FnOnce() + Send) -> PyResult<()> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(()) => Ok(()),
        Err(panic) if panic.is::<OutOfMemory>() => Err(PyMemoryError::new_err("kernels: no memory to work in")),
        Err(panic) => resume_unwind(panic),
    }
}

/// (weight, bias or 0, rows of the weight)
type MapAt = (Address, Address, usize);

/// What stands before a linear map, by its name; `norm` holds a norm's weight and bias, 0 for none.
///
/// # Safety
/// As for [`read`], of `ins` numbers each.
unsafe fn before_of<'a>(
    py: Python<'_>,
    (name, eps): (&str, f32),
    norm: (Address, Address),
    ins: usize,
) -> PyResult<Before<'a>> {
    Ok(match name {
        "none" => Before::Nothing,
        "swiglu" => Before::Swiglu,
        "rms" | "layer" => {
            // SAFETY: the caller's.
            let (weight, bias) = unsafe { (read(norm.0, ins), (norm.1 != 0).then(|| read(norm.1, ins))) };
            Before::Norm(Norm { centred: name == "layer", eps, weight, bias })
        }
        kind => Before::Activation(kind_of(py, kind)?),
    })
}

/// # Safety
/// As for [`read`].
unsafe fn maps_of<'a>(maps: &[MapAt], ins: usize) -> Vec<Map<'a>> {
    // SAFETY: the caller's.
    let of = |&(weight, bias, outs): &MapAt| unsafe {
        Map { weight: read(weight, outs * ins), bias: (bias != 0).then(|| read(bias, outs)) }
    };
    maps.iter().map(of).collect()
}

/// y = f(x) Wᵀ + b of several W, plus `residual` unless it is 0; x's second is `SwiGLU`'s.
#[pyfunction]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "what Python hands over")]
pub fn linear_forward(
    py: Python<'_>,
    threads: usize,
    sizes: (usize, usize),
    before: (&str, f32),
    x: (Address, Address),
    norm: (Address, Address),
    maps: Vec<MapAt>,
    residual: Address,
    y: Vec<Address>,
) -> PyResult<()> {
    let level = level(py)?;
    let (rows, ins) = sizes;
    // SAFETY: as in `activation_forward`, here and below.
    let before = unsafe { before_of(py, before, norm, ins)? };
    without_python(py, || {
        let second = if matches!(before, Before::Swiglu) { rows * ins } else { 0 };
        // SAFETY: as above.
        let (x, made) = unsafe { ([read(x.0, rows * ins), read(x.1, second)], maps_of(&maps, ins)) };
        let linear = Linear { ins, before, x, maps: &made };
        // SAFETY: as above.
        let residual = (residual != 0).then(|| unsafe { read(residual, rows * maps[0].2) });
        // SAFETY: as above.
        let mut y: Vec<&mut [f32]> = y.iter().zip(&maps).map(|(y, map)| unsafe { write(*y, rows * map.2) }).collect();
        linear::forward(level, threads, &linear, residual, &mut y);
    })
}

/// Gradients of `linear_forward` by x, by each map's weight and bias, and by the norm's; `residual`'s is g.
#[pyfunction]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "what Python hands over")]
pub fn linear_backward(
    py: Python<'_>,
    threads: usize,
    sizes: (usize, usize),
    before: (&str, f32),
    x: (Address, Address),
    norm: (Address, Address),
    maps: Vec<MapAt>,
    g: Vec<Address>,
    dx: (Address, Address),
    dmaps: Vec<(Address, Address)>,
    dnorm: (Address, Address),
) -> PyResult<()> {
    let level = level(py)?;
    let (rows, ins) = sizes;
    // SAFETY: as in `activation_forward`, here and below.
    let before = unsafe { before_of(py, before, norm, ins)? };
    without_python(py, || {
        let second = if matches!(before, Before::Swiglu) { rows * ins } else { 0 };
        // SAFETY: as above.
        let (x, made) = unsafe { ([read(x.0, rows * ins), read(x.1, second)], maps_of(&maps, ins)) };
        let linear = Linear { ins, before, x, maps: &made };
        // SAFETY: as above.
        let g: Vec<&[f32]> = g.iter().zip(&maps).map(|(g, map)| unsafe { read(*g, rows * map.2) }).collect();
        let len = |address: Address| if address == 0 { 0 } else { ins };
        // SAFETY: as above.
        let mut to = unsafe {
            Gradients {
                x: [write(dx.0, rows * ins), write(dx.1, second)],
                weights: dmaps.iter().zip(&maps).map(|(to, map)| write(to.0, map.2 * ins)).collect(),
                biases: dmaps
                    .iter()
                    .zip(&maps)
                    .map(|(to, map)| write(to.1, if map.1 == 0 { 0 } else { map.2 }))
                    .collect(),
                norm: [write(dnorm.0, len(norm.0)), write(dnorm.1, len(norm.1))],
            }
        };
        linear::backward(level, threads, &linear, &g, &mut to);
    })
}

/// (batch, places, width of the stream, heads, `kv_heads`, width of a head, width of the feed-forward)
type BlockSizes = (usize, usize, usize, usize, usize, usize, usize);
/// (causal, window, norm: none, rms or layer, its ε, norm of queries and keys, activation or swiglu)
type BlockKind<'a> = (bool, usize, &'a str, f32, bool, &'a str);

/// What the block's parameters are, from their addresses (0: none): weight and bias of both norms, of q, k, v, out, up,
/// gate, down.
///
/// # Safety
/// As for [`read`].
unsafe fn block_of<'a>(
    py: Python<'_>,
    sizes: BlockSizes,
    kind: BlockKind<'_>,
    parameters: &[Address],
    tables: (Address, Address),
) -> PyResult<Block<'a>> {
    let (batch, places, width, heads, kv_heads, head, wide) = sizes;
    let (causal, window, norm, eps, qk_norm, activation) = kind;
    assert_eq!(parameters.len(), 18, "kernels: weights and biases of two norms and seven maps");
    // SAFETY: the caller's, here and below.
    let bias = |at: usize, len| unsafe { (parameters[at] != 0).then(|| read(parameters[at], len)) };
    let norm_of = |at: usize| {
        bias(at, width).map(|weight| Norm { centred: norm == "layer", eps, weight, bias: bias(at + 1, width) })
    };
    let map = |at: usize, outs: usize, ins: usize| Map {
        // SAFETY: as above.
        weight: unsafe { read(parameters[at], outs * ins) },
        bias: bias(at + 1, outs),
    };
    let kv = kv_heads * head;
    let activation = if activation == "swiglu" { None } else { Some(kind_of(py, activation)?) };
    // SAFETY: as above.
    let table = |at: Address| unsafe { read(at, places * head / 2) };
    Ok(Block {
        shape: Shape { batch, heads, kv_heads, queries: places, keys: places, width: head },
        sight: Sight { causal, window },
        width,
        norms: [norm_of(0), norm_of(2)],
        rotary: (tables.0 != 0).then(|| [table(tables.0), table(tables.1)]),
        qk_norm: qk_norm.then_some(eps),
        activation,
        maps: Maps {
            qkv: [map(4, heads * head, width), map(6, kv, width), map(8, kv, width)],
            out: map(10, width, heads * head),
            up: map(12, wide, width),
            gate: activation.is_none().then(|| map(14, wide, width)),
            down: map(16, width, wide),
        },
    })
}

/// A whole block of a Transformer: y, and what the backward wants of it.
#[pyfunction]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "what Python hands over")]
pub fn block_forward(
    py: Python<'_>,
    threads: usize,
    sizes: BlockSizes,
    kind: BlockKind<'_>,
    parameters: Vec<Address>,
    tables: (Address, Address),
    x: Address,
    kept: (Address, usize),
    y: Address,
) -> PyResult<()> {
    let level = level(py)?;
    // SAFETY: as in `activation_forward`, here and below.
    let block = unsafe { block_of(py, sizes, kind, &parameters, tables)? };
    without_python(py, || {
        let len = sizes.0 * sizes.1 * sizes.2;
        // SAFETY: as above.
        let (x, kept, y) = unsafe { (read(x, len), write(kept.0, kept.1), write(y, len)) };
        block::forward(level, threads, &block, x, kept, y);
    })
}

/// Gradients of `block_forward` by x and by all parameters that are there.
#[pyfunction]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "what Python hands over")]
pub fn block_backward(
    py: Python<'_>,
    threads: usize,
    sizes: BlockSizes,
    kind: BlockKind<'_>,
    parameters: Vec<Address>,
    tables: (Address, Address),
    x: Address,
    kept: (Address, usize),
    g: Address,
    dx: Address,
    dparameters: Vec<Address>,
) -> PyResult<()> {
    let level = level(py)?;
    // SAFETY: as in `activation_forward`, here and below.
    let block = unsafe { block_of(py, sizes, kind, &parameters, tables)? };
    assert_eq!(dparameters.len(), parameters.len());
    without_python(py, || {
        let (batch, places, width, heads, kv_heads, head, wide) = sizes;
        let len = batch * places * width;
        let (q, kv) = (heads * head, kv_heads * head);
        let gradient = |at: usize, len: usize| {
            // SAFETY: as above.
            unsafe { write(dparameters[at], if parameters[at] == 0 { 0 } else { len }) }
        };
        let maps = [
            (4, q, width),
            (6, kv, width),
            (8, kv, width),
            (10, width, q),
            (12, wide, width),
            (14, wide, width),
            (16, width, wide),
        ];
        let maps = maps.into_iter().filter(|&(at, ..)| parameters[at] != 0);
        // SAFETY: as above.
        let (x, kept, g, dx) = unsafe { (read(x, len), read(kept.0, kept.1), read(g, len), write(dx, len)) };
        let mut to = block::Gradients {
            x: dx,
            maps: maps.map(|(at, outs, ins)| [gradient(at, outs * ins), gradient(at + 1, outs)]).collect(),
            norms: [0, 2].map(|at| [gradient(at, width), gradient(at + 1, width)]),
        };
        block::backward(level, threads, &block, x, kept, g, &mut to);
    })
}
