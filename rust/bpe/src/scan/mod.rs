//! The ends of pre-tokens by GPT-2's, cl100k's and o200k's patterns, in text of any script.
//!
//! In: valid UTF-8. Out: the ends of its pre-tokens, many at a time. Called by `pretokenize`.
//!
//! Floors: `classes` (what a character is) < `by_character` (the patterns, plainly) and `lanes` (64 comparisons at
//! once; `x86` and `neon` have faster ones) < `blocks` (the loop over the text) < `gpt2`, `tail`, `cl100k`, `o200k`
//! (a pattern's borders by algebra on masks).

#![allow(clippy::inline_always, reason = "what is not inlined does not get the level's instructions")]

mod blocks;
mod by_character;
mod cl100k;
pub(crate) mod classes;
mod gpt2;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod o200k;
mod tail;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use bytekiln_simd::Level;

use blocks::{Hand, Rules, ends_with};

/// A pattern that has a scanner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scanner {
    Gpt2,
    Cl100k,
    O200k,
}

impl Scanner {
    /// Calls `f` with the ends of the pre-tokens of `bytes`, in order, many at a time: a base, and what to add to it
    /// for each end.
    pub(crate) fn ends(self, level: Level, bytes: &[u8], f: Hand<'_>) {
        match self {
            Self::Gpt2 => at_level::<gpt2::Gpt2>(level, bytes, f),
            Self::Cl100k => at_level::<cl100k::Cl100k>(level, bytes, f),
            Self::O200k => at_level::<o200k::O200k>(level, bytes, f),
        }
    }
}

#[cfg(test)]
impl Scanner {
    const ALL: [Self; 3] = [Self::Gpt2, Self::Cl100k, Self::O200k];

    fn end(self, bytes: &[u8], at: usize) -> usize {
        match self {
            Self::Gpt2 => by_character::gpt2_end(bytes, at),
            Self::Cl100k => by_character::cl100k_end(bytes, at),
            Self::O200k => by_character::o200k_end(bytes, at),
        }
    }

    fn source(self) -> &'static str {
        match self {
            Self::Gpt2 => crate::pretokenize::GPT2,
            Self::Cl100k => crate::pretokenize::CL100K,
            Self::O200k => crate::pretokenize::O200K,
        }
    }
}

fn at_level<R: Rules>(level: Level, bytes: &[u8], f: Hand<'_>) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a level of the process is one that the processor has.
        Level::Avx512Vbmi2 => unsafe { x86::ends_avx512_vbmi2::<R>(bytes, f) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx512 => unsafe { x86::ends_avx512::<R>(bytes, f) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::ends_avx2::<R>(bytes, f) },
        #[cfg(target_arch = "aarch64")]
        Level::Neon => ends_with::<R>(neon::Neon, bytes, f),
        _ => ends_with::<R>(lanes::Words, bytes, f),
    }
}
