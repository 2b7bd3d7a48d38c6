//! The words as tokens, and what a merge changes in them.
//!
//! In: distinct words with counts. Out: every merge applied, pair counts in `queue` exact. Called by `train`, which
//! says why.
//!
//! What decides the time is memory: cells are as narrow as the ids, a posting is eight bytes, and the postings of a
//! pair lie side by side and ascend, so that a merge walks the cells in one direction. Counts gained and lost are added
//! up per neighbour first: one look-up of a pair for each distinct neighbour, not for each occurrence.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::hash::prefetch;
use crate::pages;
use crate::progress::Progress;
use crate::queue::{Entry, Queue};
use crate::ties::Ties;
use crate::train::{Pair, TokenId};

mod layout;

/// A cell of the arena: as wide as the largest id asks for.
pub(crate) trait Cell: Copy + Eq + Send {
    /// Between words, and inside of tokens.
    const DEAD: Self;
    /// The cell of an id.
    fn of(id: TokenId) -> Self;
    /// The id in a cell; for [`Self::DEAD`] one that no token has.
    fn id(self) -> TokenId;
}

impl Cell for u16 {
    const DEAD: Self = Self::MAX;
    fn of(id: TokenId) -> Self {
        id as Self
    }
    fn id(self) -> TokenId {
        self.into()
    }
}

impl Cell for u32 {
    const DEAD: Self = Self::MAX;
    fn of(id: TokenId) -> Self {
        id
    }
    fn id(self) -> TokenId {
        self
    }
}

/// Where a token began that has a neighbour on its right, and how often its word occurs.
#[derive(Clone, Copy)]
struct Posting {
    at: u32,
    /// `u32::MAX`: so many or more, see `heavy`.
    count: u32,
}

/// What a merge does to the pairs with one neighbour.
#[derive(Clone, Copy, Default)]
struct Neighbour {
    count: u64,
    /// Occurrences that were added up.
    edges: u32,
    /// Where the next posting of the new pair goes; `NOWHERE`: it is too rare for any.
    to: u32,
}

const NOWHERE: u32 = u32::MAX;
/// Postings ahead of the one in work whose cells are asked for.
const AHEAD: usize = 24;
/// Occurrences between two looks at whether to stop.
const LOOK_EVERY: usize = 1 << 16;

/// Where the posting `end` goes. Not every place of a merged pair's is taken again: there can be up to three for each byte.
fn place(end: usize) -> Result<u32> {
    u32::try_from(end).ok().filter(|&place| place != NOWHERE).ok_or_else(|| {
        Error::Config(
            "training: found more than 4 billion occurrences of pairs in distinct pre-tokens; expected fewer: less text, or a pattern \
             that cuts it into words that repeat".into(),
        )
    })
}

/// Makes room for `len` postings. Fresh memory of gigabytes takes a while, in which someone may want to stop.
fn lengthen(postings: &mut Vec<Posting>, len: usize, progress: &Progress) -> Result<()> {
    if len > postings.capacity() {
        postings.reserve(len - postings.len());
        pages::large(postings);
    }
    while postings.len() < len {
        progress.check()?;
        postings.resize(len.min(postings.len() + (1 << 20)), Posting { at: 0, count: 0 });
    }
    Ok(())
}

pub(crate) struct Merger<C> {
    cells: Vec<C>,
    postings: Vec<Posting>,
    /// (first cell, count) of words that occur `u32::MAX` times or more, ascending.
    heavy: Vec<(u32, u64)>,
    /// Postings of merged pairs, whose places can be taken: the largest range that was left and what is left of it.
    hole: Range<usize>,
    /// Left and right neighbour of each occurrence that is being merged.
    neighbours: Vec<(TokenId, TokenId)>,
    left: Vec<Neighbour>,
    right: Vec<Neighbour>,
    lefts: Vec<TokenId>,
    rights: Vec<TokenId>,
}

impl<C: Cell> Merger<C> {
    fn count_of(&self, posting: Posting) -> u64 {
        if posting.count < u32::MAX {
            return posting.count.into();
        }
        let after = self.heavy.partition_point(|&(start, _)| start <= posting.at);
        self.heavy[after - 1].1
    }

    /// Replaces every occurrence of `pair`, whose postings are given, by the token `id`.
    ///
    /// # Errors
    /// More postings than have a place; [`Error::Interrupted`].
    pub(crate) fn merge(
        &mut self,
        ties: &Ties,
        queue: &mut Queue,
        entry: Entry,
        id: TokenId,
        progress: &Progress,
    ) -> Result<()> {
        let Entry { pair, from, len, .. } = entry;
        let (a, b) = pair;
        let (len_a, len_b) = (ties.len_of(a), ties.len_of(b));
        let from = from as usize;
        let live = self.find_live(from..from + len as usize, pair, len_a, progress)?;
        self.replace(from..from + live, pair, (len_a, len_b), id, progress)?;
        self.settle(ties, queue, pair, id, progress)?;
        self.post(from, ties, progress)?;
        if len as usize > self.hole.len() {
            self.hole = from..from + len as usize;
        }
        for id in self.lefts.drain(..) {
            self.left[id as usize] = Neighbour::default();
        }
        for id in self.rights.drain(..) {
            self.right[id as usize] = Neighbour::default();
        }
        Ok(())
    }

    /// Moves the postings whose pair is still there to the beginning of their range, which is not read again later, and
    /// returns how many they are.
    fn find_live(&mut self, range: Range<usize>, (a, b): Pair, len_a: usize, progress: &Progress) -> Result<usize> {
        let (a, b) = (C::of(a), C::of(b));
        let postings = &mut self.postings[range];
        let mut found = 0;
        for i in 0..postings.len() {
            if i % LOOK_EVERY == 0 {
                progress.check()?;
            }
            if let Some(later) = postings.get(i + AHEAD) {
                prefetch(&self.cells, later.at as usize);
            }
            let posting = postings[i];
            let at = posting.at as usize;
            postings[found] = posting;
            // Without a branch: half of the postings are stale, and no predictor knows which.
            found += usize::from(self.cells[at] == a) & usize::from(self.cells[at + len_a] == b);
        }
        Ok(found)
    }

    /// Writes the new token, and adds up what is lost and gained by neighbour. Postings of what was merged are moved to
    /// the beginning of `live`, their neighbours noted.
    fn replace(
        &mut self,
        live: Range<usize>,
        (a, b): Pair,
        (len_a, len_b): (usize, usize),
        id: TokenId,
        progress: &Progress,
    ) -> Result<()> {
        let nobody = self.left.len() as TokenId - 1;
        let neighbour = |cell: C| if cell == C::DEAD { nobody } else { cell.id() };
        self.neighbours.clear();
        for i in live.clone() {
            if i % LOOK_EVERY == 0 {
                progress.check()?;
            }
            let posting = self.postings[i];
            let p = posting.at as usize;
            let q = p + len_a;
            // Of overlapping occurrences of one token twice, the second is gone once the first is merged.
            if a == b && (self.cells[p] != C::of(a) || self.cells[q] != C::of(b)) {
                continue;
            }
            let (left, right) = (neighbour(self.cells[p - 1]), neighbour(self.cells[q + len_b]));
            self.cells[q - 1] = C::DEAD;
            self.cells[q] = C::DEAD;
            self.cells[p] = C::of(id);
            self.cells[q + len_b - 1] = C::of(id);
            let count = self.count_of(posting);
            for (sums, seen, id) in
                [(&mut self.left, &mut self.lefts, left), (&mut self.right, &mut self.rights, right)]
            {
                let sum = &mut sums[id as usize];
                if sum.edges == 0 {
                    seen.push(id);
                }
                sum.count += count;
                sum.edges += 1;
            }
            self.postings[live.start + self.neighbours.len()] = posting;
            self.neighbours.push((left, right));
        }
        Ok(())
    }

    /// Takes the lost edges off their pairs and enters the new pairs, each with room for its postings.
    fn settle(&mut self, ties: &Ties, queue: &mut Queue, pair: Pair, id: TokenId, progress: &Progress) -> Result<()> {
        let (a, b) = pair;
        let nobody = self.left.len() as TokenId - 1;
        // An occurrence directly behind another: its left neighbour is the new token, and the edge (new, a) that the
        // one before had gained is lost again.
        let behind = self.left[id as usize].count;
        let (mut hole, mut end) = (self.hole.clone(), self.postings.len());
        let mut take = |edges: u32| {
            let room = if edges as usize <= hole.len() { &mut hole.start } else { &mut end };
            let to = place(*room);
            *room += edges as usize;
            to
        };
        for pair in self.lefts.iter().map(|&left| (left, a)).chain(self.rights.iter().map(|&right| (b, right))) {
            queue.ask(pair);
        }
        for &left in &self.lefts {
            let sum = &mut self.left[left as usize];
            sum.to = NOWHERE;
            if left == nobody {
                continue;
            }
            if left != id && (left, a) != pair {
                queue.lose((left, a), sum.count);
            }
            if queue.wants(ties, (left, id), sum.count) {
                sum.to = take(sum.edges)?;
                queue.insert(ties, (left, id), sum.count, sum.to, sum.edges);
            }
        }
        for &right in &self.rights {
            let sum = &mut self.right[right as usize];
            sum.to = NOWHERE;
            if right == nobody {
                continue;
            }
            if (b, right) != pair {
                queue.lose((b, right), sum.count);
            }
            let count = if right == a { sum.count - behind } else { sum.count };
            if queue.wants(ties, (id, right), count) {
                sum.to = take(sum.edges)?;
                queue.insert(ties, (id, right), count, sum.to, sum.edges);
            }
        }
        self.hole = hole;
        lengthen(&mut self.postings, end, progress)
    }

    /// Writes the postings of the new pairs, in the order of the cells.
    fn post(&mut self, from: usize, ties: &Ties, progress: &Progress) -> Result<()> {
        for (i, &(left, right)) in self.neighbours.iter().enumerate() {
            if i % LOOK_EVERY == 0 {
                progress.check()?;
            }
            let Posting { at, count } = self.postings[from + i];
            let sum = &mut self.left[left as usize];
            if sum.to != NOWHERE {
                self.postings[sum.to as usize] = Posting { at: at - ties.len_of(left) as u32, count };
                sum.to += 1;
            }
            let sum = &mut self.right[right as usize];
            if sum.to != NOWHERE {
                self.postings[sum.to as usize] = Posting { at, count };
                sum.to += 1;
            }
        }
        Ok(())
    }
}
