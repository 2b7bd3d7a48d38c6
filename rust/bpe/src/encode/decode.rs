//! Ids → bytes.
//!
//! In: ids of whatever width and place ([`Ids`]). Out: the bytes of their tokens, in room that the caller makes once it
//! knows how much ([`Decoding`]). Called by the binding, whose `bytes` are written in place.
//!
//! Two passes over the ids, both by blocks that are copied first: the first adds lengths and finds what is no id, the
//! second writes. Nothing is checked an id. Ids may lie in memory that somebody else writes meanwhile: the second pass
//! trusts no length of the first and ends in an error where they differ.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use super::Encoder;
use crate::error::{Error, Result};
use crate::pages;
use crate::train::TokenId;
use crate::vocab::Vocab;

/// What stands for a number that is no id: no vocabulary has so many tokens.
pub const NO_ID: TokenId = TokenId::MAX;
/// Ids that are copied, and then looked up, at a time.
const BLOCK: usize = 1024;
/// Ids that a thread takes at a time, and that make another one worth starting.
const PART: usize = 1 << 20;
/// The most bytes of a token that lies in its slot.
const SHORT: usize = 15;
/// In place of a length: the token is longer than a slot.
const LONG: u8 = 0xfe;
/// In place of a length: nobody's id.
const FREE: u8 = 0xff;

/// Ids, wherever they lie.
pub trait Ids: Sync {
    /// How many.
    fn len(&self) -> usize;
    /// Those from a place on, as many as `room` takes; [`NO_ID`] for what is none.
    fn copy(&self, from: usize, room: &mut [TokenId]);
    /// The number at a place, for the text of an error.
    fn number(&self, place: usize) -> i128;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Ids for &[TokenId] {
    fn len(&self) -> usize {
        (**self).len()
    }

    fn copy(&self, from: usize, room: &mut [TokenId]) {
        room.copy_from_slice(&self[from..from + room.len()]);
    }

    fn number(&self, place: usize) -> i128 {
        self[place].into()
    }
}

/// A token of up to 15 bytes and its length behind them.
#[derive(Debug, Clone, Copy)]
#[repr(align(16))]
struct Slot([u8; SHORT + 1]);

/// A slot for every id, and one for all that is none.
#[derive(Debug)]
pub(super) struct Slots(Vec<Slot>);

/// Those made so far: with special tokens, and with nothing in their place.
pub(super) type SlotsMade = [OnceLock<Slots>; 2];

impl Slots {
    fn new(vocab: &Vocab, skip_special: bool) -> Result<Self> {
        let mut slots = Vec::new();
        slots.try_reserve_exact(vocab.len() + 1).map_err(no_memory)?;
        pages::large(&slots);
        for id in 0..=vocab.len() as TokenId {
            let mut slot = [0; SHORT + 1];
            slot[SHORT] = match vocab.token(id) {
                None => FREE,
                Some(_) if skip_special && vocab.is_special(id) => 0,
                Some(token) if token.len() > SHORT => LONG,
                Some(token) => {
                    slot[..token.len()].copy_from_slice(token);
                    token.len() as u8
                }
            };
            slots.push(Slot(slot));
        }
        Ok(Self(slots))
    }

    #[inline]
    fn of(&self, id: TokenId) -> &Slot {
        &self.0[(id as usize).min(self.0.len() - 1)]
    }

    /// All bytes of a token; none of what is no id.
    fn token<'a>(&'a self, vocab: &'a Vocab, id: TokenId) -> Option<&'a [u8]> {
        let slot = &self.of(id).0;
        match slot[SHORT] {
            FREE => None,
            LONG => vocab.token(id),
            len => Some(&slot[..usize::from(len)]),
        }
    }
}

/// Ids whose bytes are counted and not written yet.
pub struct Decoding<'a> {
    vocab: &'a Vocab,
    slots: &'a Slots,
    ids: &'a dyn Ids,
    threads: usize,
    /// Bytes of each part.
    lengths: Vec<usize>,
}

impl Encoder {
    /// Counts the bytes of `ids`, on up to `threads` threads if they are many.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that is no token's id, with its place; [`Error::Memory`].
    pub fn decoding<'a>(&'a self, ids: &'a dyn Ids, skip_special: bool, threads: usize) -> Result<Decoding<'a>> {
        let made = &self.slots[usize::from(skip_special)];
        let slots = if let Some(slots) = made.get() {
            slots
        } else {
            // Made before the lock is taken, not within: a process may be forked off at any moment.
            let new = Slots::new(&self.vocab, skip_special)?;
            made.get_or_init(|| new)
        };
        let threads = threads.min(ids.len() / PART).max(1);
        let mut lengths = Vec::new();
        lengths.try_reserve_exact(ids.len().div_ceil(PART)).map_err(no_memory)?;
        let mut this = Decoding { vocab: &self.vocab, slots, ids, threads, lengths };
        this.lengths.extend(this.parts().map(|_| 0));
        let mut lengths = std::mem::take(&mut this.lengths);
        let counted = work(threads, this.parts().zip(&mut lengths), |(part, length)| {
            *length = this.count(part)?;
            Ok(())
        });
        counted.map_err(|place| self.no_token(ids, place))?;
        this.lengths = lengths;
        Ok(this)
    }

    /// Appends the bytes of `ids`.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that is no token's id, with its place; [`Error::Memory`].
    pub fn decode(&self, ids: &[TokenId], skip_special: bool, out: &mut Vec<u8>) -> Result<()> {
        self.decoding(&ids, skip_special, 1)?.append(out)
    }

    /// What is the matter with an id.
    fn no_token(&self, ids: &dyn Ids, place: usize) -> Error {
        let (id, size) = (ids.number(place), self.vocab.len());
        Error::Config(if id < 0 {
            format!("ids[{place}]: found {id}; expected ids from 0 up to the vocabulary's size {size}")
        } else if id < size as i128 {
            format!("ids[{place}]: found {id}, an id that no token has; expected ids of tokens")
        } else {
            format!("ids[{place}]: found {id}; expected ids below the vocabulary's size {size}")
        })
    }
}

impl Decoding<'_> {
    /// How many bytes there will be.
    pub fn len(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Whether there will be none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends them.
    ///
    /// # Errors
    /// As [`Self::write`]; [`Error::Memory`].
    pub fn append(&self, out: &mut Vec<u8>) -> Result<()> {
        let len = self.len();
        out.try_reserve(len).map_err(no_memory)?;
        self.write(&mut out.spare_capacity_mut()[..len])?;
        // SAFETY: there is room, and `write` has written all of it.
        unsafe { out.set_len(out.len() + len) };
        Ok(())
    }

    /// Writes them all: behind this, every byte of `room` is initialised.
    ///
    /// # Errors
    /// [`Error::Config`] if the ids are not those any more that were counted.
    ///
    /// # Panics
    /// If `room` is not of [`Self::len`].
    pub fn write(&self, room: &mut [MaybeUninit<u8>]) -> Result<()> {
        assert_eq!(room.len(), self.len(), "room for what was counted");
        pages::large_room(room);
        let mut rest = room;
        let rooms = self.lengths.iter().map(|&length| rest.split_off_mut(..length).unwrap_or_default());
        work(self.threads, self.parts().zip(rooms), |(part, room)| self.write_part(part, room)).map_err(|place| {
            Error::Config(format!("ids[{place}]: changed while it was decoded; expected ids that nobody writes"))
        })
    }

    fn parts(&self) -> impl Iterator<Item = Range<usize>> + Send + use<> {
        let len = self.ids.len();
        (0..len).step_by(PART).map(move |from| from..len.min(from + PART))
    }

    /// Bytes of a part; or where it has what is no id.
    fn count(&self, part: Range<usize>) -> Result<usize, usize> {
        let (mut block, mut total) = ([0; BLOCK], 0usize);
        for from in part.clone().step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(part.end - from)];
            self.ids.copy(from, block);
            let (mut sum, mut most) = (0u32, 0);
            for &id in &*block {
                let len = self.slots.of(id).0[SHORT];
                sum = sum.wrapping_add(len.into());
                most = most.max(len);
            }
            if usize::from(most) <= SHORT {
                total += sum as usize;
                continue;
            }
            for (place, &id) in (from..).zip(&*block) {
                total += self.slots.token(self.vocab, id).ok_or(place)?.len();
            }
        }
        Ok(total)
    }

    /// Writes the bytes of a part, all of `room`; or where the ids do not fill it.
    fn write_part(&self, part: Range<usize>, room: &mut [MaybeUninit<u8>]) -> Result<(), usize> {
        let (mut block, mut at) = ([0; BLOCK], 0);
        for from in part.clone().step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(part.end - from)];
            self.ids.copy(from, block);
            let mut done = 0;
            while done < block.len() {
                // So many take a slot's size each and no more.
                let safe = ((room.len() - at) / size_of::<Slot>()).min(block.len() - done);
                let mut short = 0;
                for &id in &block[done..done + safe] {
                    let slot = self.slots.of(id);
                    let len = usize::from(slot.0[SHORT]);
                    if len > SHORT {
                        break;
                    }
                    // SAFETY: `short` ids have moved `at` by less than a slot's size each, and there was room for `safe`
                    // slots, `short` < `safe`.
                    unsafe { room.as_mut_ptr().add(at).cast::<[u8; SHORT + 1]>().write_unaligned(slot.0) };
                    at = at.wrapping_add(len);
                    short += 1;
                }
                done += short;
                // A long one; or the last few, whose stores would be too wide.
                if let Some(&id) = block.get(done).filter(|_| short < safe || safe == 0) {
                    let token = self.slots.token(self.vocab, id).ok_or(from + done)?;
                    let room = room.get_mut(at..at + token.len()).ok_or(from + done)?;
                    room.iter_mut().zip(token).for_each(|(room, &byte)| _ = room.write(byte));
                    at += token.len();
                    done += 1;
                }
            }
        }
        if at == room.len() { Ok(()) } else { Err(part.end - 1) }
    }
}

/// Each part, on some threads, this one among them; the first place that fails.
fn work<T: Send>(
    threads: usize,
    parts: impl Iterator<Item = T> + Send,
    work: impl Fn(T) -> Result<(), usize> + Sync,
) -> Result<(), usize> {
    let (parts, failed) = (Mutex::new(parts), Mutex::new(None::<usize>));
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let all = || {
        while let Some(part) = next() {
            if let Err(place) = work(part) {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                *failed = Some(failed.map_or(place, |first| first.min(place)));
                // Parts are taken in order: what comes behind is no first place.
                return;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // A thread that cannot be had is one less.
            let _ = thread::Builder::new().spawn_scoped(scope, all);
        }
        all();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Room for as many ids, which is not touched yet.
///
/// # Errors
/// [`Error::Memory`].
pub fn room_for(ids: usize) -> Result<Vec<TokenId>> {
    let mut room = Vec::new();
    room.try_reserve_exact(ids).map_err(no_memory)?;
    pages::large(&room);
    Ok(room)
}

fn no_memory<E>(_: E) -> Error {
    Error::Memory("no memory to decode; expected more, or fewer ids".into())
}
