//! Ids as they are held while encoding: two bytes each where the vocabulary allows it, else four.
//!
//! Half the bytes are half the memory touched, and twice as many ids a register. In: ids. Out: [`Id`], for which the
//! tables are written once, and [`Out`], where ids go.

use std::fmt::Debug;

use bytekiln_simd::Level;

use super::lockstep::PLACES;
#[cfg(target_arch = "x86_64")]
use super::registers::InRegisters;
use super::simd;
use super::window::WINDOW;
use crate::error::{Error, Result};
use crate::tokens::Dtype;
use crate::train::TokenId;

/// Nothing more is asked of an id where there are no such registers.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait InRegisters {}
#[cfg(not(target_arch = "x86_64"))]
impl<I> InRegisters for I {}

/// An id, or the rank of a merge.
pub(crate) trait Id: InRegisters + Copy + Ord + Default + Debug + Send + Sync + 'static {
    /// Two neighbours as one number.
    type Pair: Copy + Eq + Debug + Default + Into<u64> + Send + Sync;
    /// What a slot of the word table has behind its key, 16 bytes: ids, and their number in the last place.
    type Row: Copy + Debug + Default + AsRef<[Self]> + AsMut<[Self]> + Send + Sync;
    /// Places of a row.
    const ROW: usize = 16 / size_of::<Self>();
    /// Of pairs that do not merge: more than every rank.
    const NONE: Self;
    /// A row of no ids.
    const FREE: Self::Row;

    /// The number; what does not fit is cut, so the caller sees to it.
    fn of(n: u32) -> Self;
    /// The number.
    fn number(self) -> u32;
    /// As a place in a table.
    fn place(self) -> usize {
        self.number() as usize
    }
    /// Two neighbours.
    fn pair(left: Self, right: Self) -> Self::Pair;
    /// Appends ids.
    fn put(ids: &[Self], out: &mut impl Out) -> Result<()>;
    /// The lowest of the ranks, and where it stands.
    fn lowest(ranks: &[Self; WINDOW], level: Level) -> (Self, u64);
    /// The lowest of a few ranks, and the first place where it stands.
    fn lowest_of_few(ranks: &[Self; PLACES]) -> (Self, usize);
}

impl Id for u16 {
    type Pair = u32;
    type Row = [Self; 8];
    const NONE: Self = Self::MAX;
    const FREE: Self::Row = [0; 8];

    fn of(n: u32) -> Self {
        n as Self
    }

    fn number(self) -> u32 {
        self.into()
    }

    #[inline]
    fn pair(left: Self, right: Self) -> u32 {
        u32::from(left) << 16 | u32::from(right)
    }

    #[inline]
    fn put(ids: &[Self], out: &mut impl Out) -> Result<()> {
        out.put_narrow(ids)
    }

    #[inline]
    fn lowest(ranks: &[Self; WINDOW], level: Level) -> (Self, u64) {
        simd::lowest_narrow(ranks, level)
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "takes on the instructions of whoever calls it")]
    fn lowest_of_few(ranks: &[Self; PLACES]) -> (Self, usize) {
        // The place below the rank: one minimum of numbers finds both.
        let lowest = (0u32..).zip(ranks).map(|(at, &rank)| u32::from(rank) << 16 | at).min().unwrap_or(u32::MAX);
        ((lowest >> 16) as Self, (lowest & 0xffff) as usize)
    }
}

impl Id for u32 {
    type Pair = u64;
    type Row = [Self; 4];
    const NONE: Self = Self::MAX;
    const FREE: Self::Row = [0; 4];

    fn of(n: u32) -> Self {
        n
    }

    fn number(self) -> u32 {
        self
    }

    #[inline]
    fn pair(left: Self, right: Self) -> u64 {
        u64::from(left) << 32 | u64::from(right)
    }

    #[inline]
    fn put(ids: &[Self], out: &mut impl Out) -> Result<()> {
        out.put_wide(ids)
    }

    #[inline]
    fn lowest(ranks: &[Self; WINDOW], level: Level) -> (Self, u64) {
        simd::lowest_wide(ranks, level)
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "takes on the instructions of whoever calls it")]
    fn lowest_of_few(ranks: &[Self; PLACES]) -> (Self, usize) {
        let lowest = ranks.iter().copied().min().unwrap_or(Self::NONE);
        let places = (0u32..).zip(ranks).fold(0u32, |places, (at, &rank)| places | u32::from(rank == lowest) << at);
        (lowest, places.trailing_zeros() as usize)
    }
}

/// Where ids go.
pub trait Out {
    /// Appends ids.
    ///
    /// # Errors
    /// [`Error::Memory`].
    fn put_narrow(&mut self, ids: &[u16]) -> Result<()>;
    /// The same of wider ones.
    ///
    /// # Errors
    /// [`Error::Memory`].
    fn put_wide(&mut self, ids: &[u32]) -> Result<()>;
}

/// What an allocation that failed becomes.
pub(super) fn no_memory<E>(_: E) -> Error {
    Error::Memory("no memory for more ids; expected more, or a shorter text".into())
}

impl Out for Vec<TokenId> {
    #[inline]
    fn put_narrow(&mut self, ids: &[u16]) -> Result<()> {
        self.try_reserve(ids.len()).map_err(no_memory)?;
        self.extend(ids.iter().map(|&id| TokenId::from(id)));
        Ok(())
    }

    #[inline]
    fn put_wide(&mut self, ids: &[u32]) -> Result<()> {
        self.try_reserve(ids.len()).map_err(no_memory)?;
        self.extend_from_slice(ids);
        Ok(())
    }
}

impl Out for Vec<u16> {
    #[inline]
    fn put_narrow(&mut self, ids: &[u16]) -> Result<()> {
        self.try_reserve(ids.len()).map_err(no_memory)?;
        self.extend_from_slice(ids);
        Ok(())
    }

    /// Of a vocabulary whose ids have two bytes.
    #[inline]
    fn put_wide(&mut self, ids: &[u32]) -> Result<()> {
        self.try_reserve(ids.len()).map_err(no_memory)?;
        self.extend(ids.iter().map(|&id| id as u16));
        Ok(())
    }
}

/// Ids as a token file has them: little-endian.
#[derive(Debug, Clone)]
pub struct Packed {
    /// How each is stored.
    pub dtype: Dtype,
    /// One behind the other.
    pub bytes: Vec<u8>,
}

impl Packed {
    /// None yet.
    pub fn new(dtype: Dtype) -> Self {
        Self { dtype, bytes: Vec::new() }
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The greatest id behind the first `from`.
    pub fn max(&self, from: usize) -> Option<TokenId> {
        let bytes = &self.bytes[from * self.dtype.size()..];
        match self.dtype {
            Dtype::Uint16 => bytes.as_chunks().0.iter().map(|&id| u16::from_le_bytes(id)).max().map(TokenId::from),
            Dtype::Uint32 => bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id)).max(),
        }
    }

    #[inline]
    fn extend<const N: usize>(&mut self, ids: impl ExactSizeIterator<Item = [u8; N]>) -> Result<()> {
        let (begin, more) = (self.bytes.len(), ids.len() * N);
        self.bytes.try_reserve(more).map_err(no_memory)?;
        self.bytes.resize(begin + more, 0);
        for (room, id) in self.bytes[begin..].as_chunks_mut().0.iter_mut().zip(ids) {
            *room = id;
        }
        Ok(())
    }
}

impl Out for Packed {
    #[inline]
    fn put_narrow(&mut self, ids: &[u16]) -> Result<()> {
        match self.dtype {
            // They are bytes already, where the least one comes first.
            Dtype::Uint16 if cfg!(target_endian = "little") => {
                self.bytes.try_reserve(size_of_val(ids)).map_err(no_memory)?;
                self.bytes.extend_from_slice(bytemuck::cast_slice(ids));
                Ok(())
            }
            Dtype::Uint16 => self.extend(ids.iter().map(|id| id.to_le_bytes())),
            Dtype::Uint32 => self.extend(ids.iter().map(|&id| u32::from(id).to_le_bytes())),
        }
    }

    #[inline]
    fn put_wide(&mut self, ids: &[u32]) -> Result<()> {
        match self.dtype {
            // Narrowing is exact: `Dtype::from_name` and `Dtype::for_vocab` hold ids below 65,536 here.
            Dtype::Uint16 => self.extend(ids.iter().map(|&id| (id as u16).to_le_bytes())),
            Dtype::Uint32 => self.extend(ids.iter().map(|id| id.to_le_bytes())),
        }
    }
}
