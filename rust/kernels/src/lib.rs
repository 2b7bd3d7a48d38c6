//! Attention, activations and norms of a Transformer on the CPU, in float32: what torch's own kernels take several times the
//! time of their arithmetic for. No Python, no printing.
//!
//! - [`attention`]: softmax(q kᵀ / √K) v, causal or not, with or without a window, and its gradients.
//! - [`number`]: float32 and bf16, as activations and dropout read them.
//! - [`activation`]: GELU, SiLU, squared ReLU with their derivatives in one pass; SwiGLU.
//! - [`dropout`]: of float32 and bf16, without a mask in memory.
//! - [`norm`]: RMSNorm and its gradients; LayerNorm as part of a linear map.
//! - [`block`]: a whole block, forward and backward, one meeting of the threads each.
//! - [`linear`]: linear maps with the norm or activation before and the residual behind them, and all gradients.
//! - [`naive`]: the same in float64, slow and readable: the specification.
//!
//! All arithmetic is written once, over the vectors of [`simd`]; which instructions they are is decided at run time.
//! Every result is a function of the arguments and the level alone: threads share the work in pieces whose borders
//! and order of sums do not depend on their number.

#![allow(clippy::inline_always, reason = "see `simd`: what is not inlined there does not get the level's instructions")]
#![allow(clippy::doc_markdown, reason = "SiLU and SwiGLU are names, not code")]
#![allow(clippy::many_single_char_names, clippy::similar_names, reason = "q, k, v, dq, dk, dv are the field's names")]

pub mod activation;
pub mod attention;
pub mod block;
pub mod dropout;
pub mod linear;
pub mod naive;
pub mod norm;
pub mod number;
pub mod simd;
pub mod threads;
mod tile;
