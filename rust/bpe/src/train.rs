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
//! *Postings ascend.* The first ones are written in the order of the cells; a merge takes its postings in order
//! and adds new ones in order. Overlapping occurrences of `a a` are therefore taken from the left.

use std::cmp::Ordering;
use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::error::{Error, Result};
use crate::hash;
use crate::progress::{Progress, Stage, drop_beside};

/// Number of a token in its vocabulary.
pub type TokenId = u32;
/// Two neighbouring tokens.
pub type Pair = (TokenId, TokenId);

/// Which pair merges first among the most frequent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TieBreak {
    /// The greatest pair of byte strings.
    #[default]
    Lexicographic,
    /// The smallest pair of ids, single bytes numbered as in Hugging Face's alphabet.
    HuggingFace,
}

impl TieBreak {
    /// The rule of a name: `lexicographic` or `huggingface`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "lexicographic" => Ok(Self::Lexicographic),
            "huggingface" => Ok(Self::HuggingFace),
            _ => Err(Error::Config(format!("tie_break: found {name:?}; expected lexicographic or huggingface"))),
        }
    }
}

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

/// Orders pairs of equal count; `Greater` merges first.
struct TieOrder {
    rule: TieBreak,
    alphabet_rank: [u32; 256],
}

impl TieOrder {
    fn new(rule: TieBreak) -> Self {
        let alphabet = byte_alphabet();
        let mut alphabet_rank = [0; 256];
        for (byte, rank) in alphabet_rank.iter_mut().enumerate() {
            *rank = alphabet.iter().filter(|&&c| c < alphabet[byte]).count() as u32;
        }
        Self { rule, alphabet_rank }
    }

    fn number(&self, id: TokenId) -> u32 {
        self.alphabet_rank.get(id as usize).copied().unwrap_or(id)
    }

    fn cmp(&self, tokens: &[Vec<u8>], a: Pair, b: Pair) -> Ordering {
        match self.rule {
            TieBreak::Lexicographic => {
                let bytes = |p: Pair| (&tokens[p.0 as usize], &tokens[p.1 as usize]);
                bytes(a).cmp(&bytes(b))
            }
            TieBreak::HuggingFace => {
                let numbers = |p: Pair| (self.number(p.0), self.number(p.1));
                numbers(b).cmp(&numbers(a))
            }
        }
    }
}

/// A binary heap whose order needs the tokens' bytes, which `std`'s heap cannot be given.
struct Queue {
    heap: Vec<(u64, Pair)>,
    ties: TieOrder,
}

impl Queue {
    fn before(&self, tokens: &[Vec<u8>], a: usize, b: usize) -> bool {
        let (x, y) = (self.heap[a], self.heap[b]);
        x.0.cmp(&y.0).then_with(|| self.ties.cmp(tokens, x.1, y.1)) == Ordering::Greater
    }

    fn push(&mut self, tokens: &[Vec<u8>], count: u64, pair: Pair) {
        self.heap.push((count, pair));
        let mut at = self.heap.len() - 1;
        while at > 0 && self.before(tokens, at, (at - 1) / 2) {
            self.heap.swap(at, (at - 1) / 2);
            at = (at - 1) / 2;
        }
    }

    fn pop(&mut self, tokens: &[Vec<u8>]) -> Option<(u64, Pair)> {
        if self.heap.is_empty() {
            return None;
        }
        let top = self.heap.swap_remove(0);
        let mut at = 0;
        loop {
            let left = 2 * at + 1;
            if left >= self.heap.len() {
                return Some(top);
            }
            let right = left + 1;
            let best = if right < self.heap.len() && self.before(tokens, right, left) { right } else { left };
            if !self.before(tokens, best, at) {
                return Some(top);
            }
            self.heap.swap(at, best);
            at = best;
        }
    }
}

/// A cell inside a token or between words; no token has this id.
const DEAD: TokenId = TokenId::MAX;

/// Where a pair occurs, and how often in all.
#[derive(Default)]
struct PairState {
    count: u64,
    /// (cell where the left token begins, word), live ones and stale ones.
    postings: Vec<(u32, u32)>,
}

struct Trainer {
    cells: Vec<TokenId>,
    word_counts: Vec<u64>,
    pairs: HashMap<Pair, PairState, FixedState>,
    tokens: Vec<Vec<u8>>,
}

/// Learns up to `wanted` merges from distinct words and their counts; fewer where no pair is left.
pub fn train(words: &[(Vec<u8>, u64)], wanted: usize, rule: TieBreak, progress: &Progress) -> Result<Merges> {
    progress.begin(Stage::Merge, wanted as u64);
    let mut trainer = Trainer::new(words, progress)?;
    let merges = trainer.run(wanted, rule, progress);
    let tokens = std::mem::take(&mut trainer.tokens);
    drop_beside(trainer);
    Ok(Merges { pairs: merges?, tokens })
}

impl Trainer {
    fn new(words: &[(Vec<u8>, u64)], progress: &Progress) -> Result<Self> {
        let size = 1 + words.iter().map(|(word, _)| word.len() + 1).sum::<usize>();
        if size >= DEAD as usize {
            return Err(Error::Config(format!(
                "training: found {size} bytes of distinct pre-tokens; expected fewer than {DEAD} (4 GiB)"
            )));
        }
        let mut cells = Vec::with_capacity(size);
        let mut pairs: HashMap<Pair, PairState, FixedState> = HashMap::with_hasher(hash::state());
        cells.push(DEAD);
        for (word, (bytes, count)) in (0u32..).zip(words) {
            if word % 4096 == 0 {
                progress.check()?;
            }
            for pair in bytes.windows(2) {
                // The left byte of this window is about to get cell `cells.len()`.
                let state = pairs.entry((pair[0].into(), pair[1].into())).or_default();
                state.count += count;
                state.postings.push((cells.len() as u32, word));
                cells.push(pair[0].into());
            }
            cells.extend(bytes.last().map(|&b| TokenId::from(b)));
            cells.push(DEAD);
        }
        let word_counts = words.iter().map(|&(_, count)| count).collect();
        let tokens = (0..=255u8).map(|b| vec![b]).collect();
        Ok(Self { cells, word_counts, pairs, tokens })
    }

    /// Merges the most frequent pair until there are `wanted` merges or no pair is left.
    fn run(&mut self, wanted: usize, rule: TieBreak, progress: &Progress) -> Result<Vec<Pair>> {
        let mut queue = Queue { heap: Vec::new(), ties: TieOrder::new(rule) };
        let mut initial: Vec<(u64, Pair)> = self.pairs.iter().map(|(&pair, state)| (state.count, pair)).collect();
        initial.sort_unstable();
        for (count, pair) in initial {
            queue.push(&self.tokens, count, pair);
        }

        let mut merges = Vec::new();
        while merges.len() < wanted {
            progress.check()?;
            let Some((count, pair)) = queue.pop(&self.tokens) else { break };
            let now = self.pairs.get(&pair).map_or(0, |state| state.count);
            if now != count {
                // Edges were lost since the entry was made.
                if now > 0 {
                    queue.push(&self.tokens, now, pair);
                }
                continue;
            }
            let id = self.tokens.len() as TokenId;
            let joined = [self.tokens[pair.0 as usize].as_slice(), &self.tokens[pair.1 as usize]].concat();
            self.tokens.push(joined);
            merges.push(pair);
            for gained in self.merge(pair, id) {
                if let Some(state) = self.pairs.get(&gained) {
                    queue.push(&self.tokens, state.count, gained);
                }
            }
            progress.add(1);
        }
        Ok(merges)
    }

    fn len_of(&self, id: TokenId) -> usize {
        self.tokens[id as usize].len()
    }

    /// Replaces every `a b` by `id`; returns the pairs that gained edges, in order of appearance.
    fn merge(&mut self, (a, b): Pair, id: TokenId) -> Vec<Pair> {
        let Some(state) = self.pairs.remove(&(a, b)) else { return Vec::new() };
        debug_assert!(state.postings.is_sorted());
        let (len_a, len_b) = (self.len_of(a), self.len_of(b));
        let mut gained = Vec::new();
        for (begin, word) in state.postings {
            let p = begin as usize;
            let q = p + len_a;
            if self.cells[p] != a || self.cells[q] != b {
                continue;
            }
            let count = self.word_counts[word as usize];
            let (left, right) = (self.cells[p - 1], self.cells[q + len_b]);
            if left != DEAD {
                self.lose((left, a), count, (a, b));
                let begin = p - self.len_of(left);
                self.gain((left, id), count, (begin as u32, word), &mut gained);
            }
            if right != DEAD {
                self.lose((b, right), count, (a, b));
                self.gain((id, right), count, (begin, word), &mut gained);
            }
            self.cells[q - 1] = DEAD;
            self.cells[q] = DEAD;
            self.cells[p] = id;
            self.cells[q + len_b - 1] = id;
        }
        gained
    }

    fn lose(&mut self, pair: Pair, count: u64, merging: Pair) {
        // Edges of the pair that is being merged vanish with it.
        if pair != merging
            && let Some(state) = self.pairs.get_mut(&pair)
        {
            state.count -= count;
            if state.count == 0 {
                self.pairs.remove(&pair);
            }
        }
    }

    fn gain(&mut self, pair: Pair, count: u64, posting: (u32, u32), gained: &mut Vec<Pair>) {
        let state = self.pairs.entry(pair).or_default();
        state.count += count;
        if state.postings.is_empty() {
            gained.push(pair);
        }
        state.postings.push(posting);
    }
}
