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
//! All of this holds whatever the order of the merges is, as long as each is done everywhere before the next one and
//! joins tokens that are there: for merges that came before (`prior`), and with pairs that are never merged, too.
//!
//! *Rare pairs are left out.* Let `c` be the count of the `merges`-th most frequent word among those of two bytes or more
//! that may become one token (no longer than the longest token). Once no pair that may be merged has a count of `c` or
//! more, each of those words is one token: a pair inside of it would have its count at least, and no more bytes than the
//! word. Different words are different tokens and each took a merge, a prior one or a new one; so all `merges` are done
//! by then, and a pair that is rarer than `c` when it appears, whose count never rises, is never merged.
//!
//! *Postings ascend.* The first ones are written in the order of the cells; a merge takes its postings in order
//! and adds new ones in order. Overlapping occurrences of `a a` are therefore taken from the left.

use crate::error::{Error, Result};
use crate::merge::{Cell, Merger};
use crate::prior::Prior;
use crate::progress::{MergeShown, Progress, SHOWN_BYTES, Stage};
use crate::queue::Queue;
pub use crate::ties::TieBreak;
use crate::ties::Ties;
use crate::token_bytes::TokenBytes;
use crate::words::Words;

/// Number of a token in its vocabulary.
pub type TokenId = u32;
/// Two neighbouring tokens.
pub type Pair = (TokenId, TokenId);

/// What is learnt.
#[derive(Debug, Clone)]
pub struct Options {
    /// Merges in all, prior ones included; fewer come out where no pair is left.
    pub merges: usize,
    /// Which of equally frequent pairs merges first.
    pub rule: TieBreak,
    /// Words that occur less often are left out, and pairs that do (in the words that are left) are never merged.
    pub min_frequency: u64,
    /// A pair whose token would have more bytes is never merged.
    pub max_token_length: usize,
    /// Merges that are done before the first pair is counted.
    pub prior: Prior,
    /// Threads that lay out the words; the result does not depend on them.
    pub threads: usize,
}

impl Options {
    /// So many merges of whatever occurs, of any length.
    pub fn new(merges: usize, rule: TieBreak) -> Self {
        Self { merges, rule, min_frequency: 1, max_token_length: usize::MAX, prior: Prior::default(), threads: 1 }
    }
}

/// The outcome of training: ids 0–255 are the bytes, the merged tokens follow in order of appearance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merges {
    /// The pairs, in the order in which they were merged; prior ones first.
    pub pairs: Vec<Pair>,
    /// The bytes of every token: 256 + merges of them.
    pub tokens: TokenBytes,
    /// How often each pair occurred when it was merged; of new ones only, so the last counts belong to the last pairs.
    pub counts: Vec<u64>,
    /// New merges at which another pair was as frequent, so that the rule decided.
    pub ties: u64,
}

impl Merges {
    /// The merges of a smaller vocabulary: the first `len`, all where there are no more.
    #[must_use]
    pub fn first(mut self, len: usize) -> Self {
        let len = len.min(self.pairs.len());
        let prior = self.pairs.len() - self.counts.len();
        self.pairs.truncate(len);
        self.tokens.truncate(256 + len);
        self.counts.truncate(len.saturating_sub(prior));
        self
    }
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

/// Is told of the pairs merged so far (prior ones too), the counts of the new ones and the ties met: after each merge,
/// and once more, with `true`, when training is interrupted.
pub(crate) type Keep<'k> = dyn FnMut(&[Pair], &[u64], u64, bool) -> Result<()> + 'k;

/// Learns merges from distinct words and their counts; fewer than asked for where no pair is left.
pub fn train(words: &Words, options: &Options, progress: &Progress) -> Result<Merges> {
    train_and_keep(words, options, progress, None)
}

/// As [`train`], for a caller that keeps what is done.
pub(crate) fn train_and_keep(
    words: &Words,
    options: &Options,
    progress: &Progress,
    keep: Option<&mut Keep<'_>>,
) -> Result<Merges> {
    progress.begin(Stage::Layout, 0);
    let frequent;
    // Counts mostly leave rare words out already: then there is nothing to copy.
    let words = if words.iter().any(|word| word.1 < options.min_frequency) {
        frequent = words.at_least(options.min_frequency);
        &frequent
    } else {
        words
    };
    // Each merge makes the words a token shorter at least: tables by id need no room for more.
    let prior = options.prior.pairs().len();
    let wanted = options.merges.min(prior.saturating_add(words.bytes())).max(prior);
    if 256 + wanted < usize::from(u16::MAX) {
        run::<u16>(words, wanted, options, progress, keep)
    } else {
        run::<u32>(words, wanted, options, progress, keep)
    }
}

fn run<C: Cell>(
    words: &Words,
    wanted: usize,
    options: &Options,
    progress: &Progress,
    mut keep: Option<&mut Keep<'_>>,
) -> Result<Merges> {
    let longest = options.max_token_length;
    let mut ties = Ties::new(options.rule);
    let mut queue = Queue::new(least_count(words, wanted, longest).max(options.min_frequency), longest);
    let mut pairs = options.prior.pairs().to_vec();
    for &pair in &pairs {
        ties.join(pair);
    }
    let mut merger = Merger::<C>::new(words, options, 256 + wanted, &ties, &mut queue, progress)?;
    progress.begin(Stage::Merge, options.merges.saturating_sub(pairs.len()) as u64);
    let (mut counts, mut ruled) = (Vec::new(), 0);
    while pairs.len() < wanted {
        let done = step(&mut merger, &mut queue, &mut ties, progress);
        if let (Err(Error::Interrupted), Some(keep)) = (&done, &mut keep) {
            keep(&pairs, &counts, ruled, true)?;
        }
        let Some((pair, count, tie)) = done? else { break };
        pairs.push(pair);
        counts.push(count);
        ruled += u64::from(tie);
        progress.add(1);
        if let Some(keep) = &mut keep {
            keep(&pairs, &counts, ruled, false)?;
        }
    }
    Ok(Merges { pairs, tokens: ties.into_tokens(), counts, ties: ruled })
}

/// Merges the most frequent pair: which one, how often it occurred, and whether the rule chose it among equals.
fn step<C: Cell>(
    merger: &mut Merger<C>,
    queue: &mut Queue,
    ties: &mut Ties,
    progress: &Progress,
) -> Result<Option<(Pair, u64, bool)>> {
    progress.check()?;
    let Some(index) = queue.pop(ties) else { return Ok(None) };
    let entry = *queue.entry(index);
    let tie = queue.tied(ties, entry.count);
    let shown = |id| ties.bytes_of(id)[..ties.len_of(id).min(SHOWN_BYTES)].to_vec();
    let (a, b) = entry.pair;
    progress.show(|| MergeShown { left: shown(a), right: shown(b), count: entry.count });
    let id = ties.join(entry.pair);
    merger.merge(ties, queue, entry, id, progress)?;
    Ok(Some((entry.pair, entry.count, tie)))
}

/// A count that no merge will fall below: that of the `wanted`-th most frequent word of two to `longest` bytes.
fn least_count(words: &Words, wanted: usize, longest: usize) -> u64 {
    // Words of each small count, and the others: sorting all took a tenth of the time until the first merge.
    let (mut of_count, mut frequent) = (vec![0; 1 << 12], Vec::new());
    for (_, count) in words.iter().filter(|(word, _)| (2..=longest).contains(&word.len())) {
        match of_count.get_mut(count as usize) {
            Some(words) => *words += 1,
            None => frequent.push(count),
        }
    }
    if wanted == 0 {
        return 1;
    }
    if wanted <= frequent.len() {
        return *frequent.select_nth_unstable_by(wanted - 1, |a, b| b.cmp(a)).1;
    }
    let mut left = wanted - frequent.len();
    for (count, &words) in of_count.iter().enumerate().rev() {
        if left <= words {
            return count as u64;
        }
        left -= words;
    }
    1
}
