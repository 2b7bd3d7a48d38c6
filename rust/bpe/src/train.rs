//! Word counts → ordered merges, by keeping pair counts up to date instead of counting again after each merge.
//!
//! In: distinct words with counts. Out: [`Merges`]. Called by the binding; `naive` is the specification.
//!
//! # Why the updates are exact
//! All words lie in one arena of cells, one cell a byte, a border cell between words. A token that spans cells
//! `p ..= e` has its id in cell `p` and in cell `e`; the cells between them hold [`DEAD`].
//!
//! *Edges.* Two tokens that are neighbours form an edge, known by where its left token begins. Merging `a b`
//! at `p` between neighbours `l` and `r` removes the edges `l a`, `a b`, `b r` and adds `l n`, `n r`; nothing
//! else changes. A pair's count is the sum of its edges' word counts, so subtracting the removed and adding
//! the new edges keeps every count exact, overlaps such as `aaa` included.
//!
//! *Stale postings.* A posting `(p, a b)` was written when a token `a` began at `p`. Tokens only grow. If cell
//! `p` still holds `a`, the token there is still that one: a token that covers the old `a` and more is longer
//! and so has another id. Then the cell behind `a` begins the right neighbour, and the edge lives if and only
//! if that cell holds `b`. An edge that died never comes back, as one of its tokens has grown.
//!
//! *No token is reached in two ways*, so each merge makes a new token and a pair's count never rises once its
//! newer token's merge is done. As long as no merge crosses the two borders of a stretch of bytes, the stretch
//! is merged as it would be alone (occurrences are taken from the left, and a run cut at an intact border is cut
//! between two taken pairs). So when a token `t = l r` appears, every stretch with `t`'s bytes and intact
//! borders is `l r` at that moment and becomes `t`; no other pair can later join to the same bytes.
//!
//! *Rare pairs are left out.* Let `c` be the count of the `wanted`-th most frequent word of two bytes or more. Once no
//! pair has a count of `c` or more, each of those `wanted` words is one token, for a pair inside of it would have its
//! count at least. Different words are different tokens and each took a merge; so `wanted` merges are done by then, and
//! a pair that is rarer than `c` when it appears, whose count never rises, is never merged.
//!
//! *Postings ascend.* The first ones are written in the order of the cells; a merge takes its postings in order
//! and adds new ones in order. Overlapping occurrences of `a a` are therefore taken from the left.

use crate::error::Result;
use crate::merge::{Cell, Merger};
use crate::progress::{Progress, Stage};
use crate::queue::Queue;
pub use crate::ties::TieBreak;
use crate::ties::Ties;
use crate::words::Words;

/// Number of a token in its vocabulary.
pub type TokenId = u32;
/// Two neighbouring tokens.
pub type Pair = (TokenId, TokenId);

/// The outcome of training: ids 0–255 are the bytes, the merged tokens follow in order of appearance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merges {
    /// The pairs, in the order in which they were merged.
    pub pairs: Vec<Pair>,
    /// The bytes of every token: 256 + merges of them.
    pub tokens: Vec<Vec<u8>>,
}

/// The printable character that stands for a byte in GPT-2's files, for every byte.
pub(crate) fn byte_alphabet() -> [char; 256] {
    let mut table = ['\0'; 256];
    let mut next = 256u32;
    for (byte, slot) in (0u32..).zip(&mut table) {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { byte } else { next };
        next += u32::from(!printable);
        *slot = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
    }
    table
}

/// Learns up to `wanted` merges from distinct words and their counts; fewer where no pair is left.
pub fn train(words: &Words, wanted: usize, rule: TieBreak, progress: &Progress) -> Result<Merges> {
    progress.begin(Stage::Merge, wanted as u64);
    // Each merge makes the words a token shorter at least: tables by id need no room for more.
    let wanted = wanted.min(words.bytes());
    if 256 + wanted < usize::from(u16::MAX) {
        run::<u16>(words, wanted, rule, progress)
    } else {
        run::<u32>(words, wanted, rule, progress)
    }
}

fn run<C: Cell>(words: &Words, wanted: usize, rule: TieBreak, progress: &Progress) -> Result<Merges> {
    let (mut ties, mut queue) = (Ties::new(rule), Queue::new(least_count(words, wanted)));
    let mut merger = Merger::<C>::new(words, 256 + wanted, &ties, &mut queue, progress)?;
    let mut pairs = Vec::new();
    while pairs.len() < wanted {
        progress.check()?;
        let Some(index) = queue.pop(&ties) else { break };
        let entry = *queue.entry(index);
        let id = ties.join(entry.pair);
        merger.merge(&ties, &mut queue, entry, id, progress)?;
        pairs.push(entry.pair);
        progress.add(1);
    }
    Ok(Merges { pairs, tokens: ties.into_tokens() })
}

/// A count that no merge will fall below: that of the `wanted`-th most frequent word of two bytes or more.
fn least_count(words: &Words, wanted: usize) -> u64 {
    let mut counts: Vec<u64> = words.iter().filter(|(word, _)| word.len() > 1).map(|(_, count)| count).collect();
    if wanted == 0 || counts.len() < wanted {
        return 1;
    }
    *counts.select_nth_unstable_by(wanted - 1, |a, b| b.cmp(a)).1
}
