//! Pair of tokens → rank and result, in one look-up whether it merges or not.
//!
//! A perfect hash (hash and displace: Belazzougui, Botelho and Dietzfelbinger, "Hash, displace, and compress", ESA
//! 2009): keys fall into small buckets, each of which has a displacement that puts its keys where nobody else is. The
//! displacements stay in the first cache; the pairs of GPT-2's vocabulary are 512 KB, which a second cache holds.

use std::hint::select_unpredictable;

use super::ids::Id;
use crate::hash::prefetch;
use crate::pages;
use crate::vocab::Merge;

/// Keys of a bucket, on average.
const BUCKET: usize = 4;

/// A pair and what it merges to; free where the rank is [`Id::NONE`].
#[derive(Debug, Clone, Copy, Default)]
struct Slot<I: Id> {
    pair: I::Pair,
    rank: I,
    id: I,
}

/// All pairs that merge.
#[derive(Debug)]
pub(super) struct Pairs<I: Id> {
    slots: Vec<Slot<I>>,
    displacements: Vec<u16>,
}

impl<I: Id> Pairs<I> {
    /// The pairs of `merges`, whose ranks are made `dense` by the caller; of a pair that is listed twice the first counts.
    pub(super) fn new(merges: &[Merge], dense: &[u32]) -> Self {
        let buckets = (merges.len() / BUCKET + 1).next_power_of_two();
        let mut size = (merges.len() * 5 / 4 + 2).next_power_of_two();
        loop {
            if let Some(this) = Self::try_new(merges, dense, buckets, size) {
                return this;
            }
            size *= 2;
        }
    }

    fn try_new(merges: &[Merge], dense: &[u32], buckets: usize, size: usize) -> Option<Self> {
        let free = Slot { rank: I::NONE, ..Slot::default() };
        let mut slots = Vec::with_capacity(size);
        pages::large(&slots);
        slots.resize(size, free);
        let mut this = Self { slots, displacements: vec![0; buckets] };
        // Merges by bucket: how many there are in those before, then their numbers.
        let mut ends = vec![0u32; buckets + 1];
        for merge in merges {
            ends[this.bucket(hash_of::<I>(merge)) + 1] += 1;
        }
        for bucket in 0..buckets {
            ends[bucket + 1] += ends[bucket];
        }
        let (mut next, mut sorted) = (ends.clone(), vec![0u32; merges.len()]);
        for (n, merge) in (0..).zip(merges) {
            let at = &mut next[this.bucket(hash_of::<I>(merge))];
            sorted[*at as usize] = n;
            *at += 1;
        }
        // The fullest first, while there is room to choose.
        let mut order: Vec<u32> = (0..buckets as u32).collect();
        let len = |bucket: u32| ends[bucket as usize + 1] - ends[bucket as usize];
        order.sort_by_key(|&bucket| std::cmp::Reverse(len(bucket)));
        let (mut keys, mut places): (Vec<(u32, u64)>, Vec<usize>) = (Vec::new(), Vec::new());
        // A bit for each place that is taken: they stay in the first cache, which the slots do not.
        let mut taken = vec![0u64; size.div_ceil(64)];
        for bucket in order.into_iter().take_while(|&bucket| len(bucket) > 0) {
            keys.clear();
            for &n in &sorted[ends[bucket as usize] as usize..ends[bucket as usize + 1] as usize] {
                // In the order of the list, since counting kept it. Pairs that differ have different hashes.
                let hash = hash_of::<I>(&merges[n as usize]);
                if keys.iter().all(|&(_, other)| other != hash) {
                    keys.push((n, hash));
                }
            }
            let fits = |displacement: &u16| {
                places.clear();
                keys.iter().all(|&(_, hash)| {
                    let place = this.place(hash, *displacement);
                    let fits = taken[place / 64] >> (place % 64) & 1 == 0 && !places.contains(&place);
                    places.push(place);
                    fits
                })
            };
            let displacement = (0..=u16::MAX).find(fits)?;
            this.displacements[bucket as usize] = displacement;
            for (&(n, _), &place) in keys.iter().zip(&places) {
                let Merge { pair: (left, right), id, .. } = merges[n as usize];
                taken[place / 64] |= 1 << (place % 64);
                this.slots[place] =
                    Slot { pair: I::pair(I::of(left), I::of(right)), rank: I::of(dense[n as usize]), id: I::of(id) };
            }
        }
        Some(this)
    }

    #[inline]
    fn bucket(&self, hash: u64) -> usize {
        hash as usize & (self.displacements.len() - 1)
    }

    #[inline]
    fn place(&self, hash: u64, displacement: u16) -> usize {
        let (base, step) = (hash >> 40, hash >> 20 | 1);
        (base.wrapping_add(u64::from(displacement).wrapping_mul(step))) as usize & (self.slots.len() - 1)
    }

    #[inline]
    fn place_of(&self, pair: I::Pair) -> usize {
        let hash = hash(pair.into());
        self.place(hash, self.displacements[self.bucket(hash)])
    }

    /// Rank and result of a pair; [`Id::NONE`] where it does not merge.
    #[inline]
    pub(super) fn get(&self, left: I, right: I) -> (I, I) {
        let pair = I::pair(left, right);
        let slot = &self.slots[self.place_of(pair)];
        if slot.pair == pair { (slot.rank, slot.id) } else { (I::NONE, I::default()) }
    }

    /// The rank alone.
    #[inline]
    pub(super) fn rank(&self, left: I, right: I) -> I {
        let pair = I::pair(left, right);
        self.rank_at(self.place_of(pair) as u32, pair)
    }

    /// Where a pair stands if it stands anywhere, which is asked for.
    #[inline]
    pub(super) fn ask(&self, pair: I::Pair) -> u32 {
        let place = self.place_of(pair);
        prefetch(&self.slots, place);
        place as u32
    }

    /// The rank of a pair that [`Self::ask`] was asked for.
    #[inline]
    pub(super) fn rank_at(&self, place: u32, pair: I::Pair) -> I {
        let slot = &self.slots[place as usize];
        // Without a branch: whether two ids merge no processor can foretell.
        select_unpredictable(slot.pair == pair, slot.rank, I::NONE)
    }
}

/// A hash of a pair: one multiplication, folded. Each step can be undone, so no two pairs share one.
#[inline]
fn hash(pair: u64) -> u64 {
    let product = (pair ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 32
}

fn hash_of<I: Id>(merge: &Merge) -> u64 {
    hash(I::pair(I::of(merge.pair.0), I::of(merge.pair.1)).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn holds<I: Id>(pairs: &[(u32, u32)], ids: u32) {
        let merges: Vec<_> = (0..).zip(pairs).map(|(rank, &pair)| Merge { pair, id: rank % ids, rank }).collect();
        let dense: Vec<u32> = (0..pairs.len() as u32).collect();
        let table = Pairs::<I>::new(&merges, &dense);
        let mut plain = BTreeMap::new();
        for (rank, &pair) in (0..).zip(pairs) {
            plain.entry(pair).or_insert((I::of(rank), I::of(rank % ids)));
        }
        for &(a, b) in pairs {
            for pair in [(a, b), (b, a), (a, a), (0, b), (a, ids - 1)] {
                let expected = plain.get(&pair).copied().unwrap_or((I::NONE, I::default()));
                assert_eq!(table.get(I::of(pair.0), I::of(pair.1)), expected, "{pair:?}");
            }
        }
        assert_eq!(table.get(I::of(0), I::of(0)), plain.get(&(0, 0)).copied().unwrap_or((I::NONE, I::default())));
    }

    proptest! {
        #[test]
        fn look_ups_equal_a_plain_map(pairs in prop::collection::vec((0u32..300, 0u32..300), 0..3000)) {
            holds::<u16>(&pairs, 300);
            holds::<u32>(&pairs, 300);
        }
    }

    #[test]
    fn as_many_pairs_as_ids_of_two_bytes_allow() {
        let pairs: Vec<_> = (0..65_000u32).map(|n| (n.wrapping_mul(40_503) & 0xffff, n)).collect();
        holds::<u16>(&pairs, 65_536);
        let pairs: Vec<_> = (0..200_000u32).map(|n| (n / 7, n.wrapping_mul(2_654_435_761) >> 14)).collect();
        holds::<u32>(&pairs, 1 << 20);
    }
}
