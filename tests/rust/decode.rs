//! Ids → bytes, held to `naive::decode`: vocabularies with free ids and tokens around the size of a slot, ids of every
//! kind, threads, and ids that change while they are decoded.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytekiln_bpe::Error;
use bytekiln_bpe::encode::{Encoder, Ids, NO_ID};
use bytekiln_bpe::naive;
use bytekiln_bpe::train::TokenId;
use bytekiln_bpe::vocab::Vocab;
use proptest::prelude::*;

/// 256 bytes, tokens of 2 to 40 bytes, special tokens of 3 to 40 with free ids between them.
fn vocab() -> impl Strategy<Value = Vocab> {
    let tokens = prop::collection::vec(2usize..40, 0..60);
    let specials = prop::collection::vec((0u32..3, 3usize..40), 0..6);
    (tokens, specials).prop_map(|(tokens, specials)| {
        let mut all: Vec<(Vec<u8>, TokenId)> = (0..=255u8).map(|byte| (vec![byte], byte.into())).collect();
        for (id, len) in (256u32..).zip(tokens) {
            // Two bytes of its own each; the rest tells where a copy went wrong.
            let own = [(id / 250) as u8, (id % 250) as u8];
            all.push((own.into_iter().chain((2..len).map(|at| b'a' + at as u8 % 26)).collect(), id));
        }
        let mut id = all.len() as u32;
        let specials = (0..).zip(specials).map(|(number, (free, len))| {
            id += free + 1;
            (format!("<{number}{}", "|".repeat(len - 2)), id - 1)
        });
        let specials: Vec<_> = specials.collect();
        Vocab::new(&all, vec![], specials, "gpt2", false).unwrap()
    })
}

fn decoded(encoder: &Encoder, ids: &[TokenId], skip_special: bool, threads: usize) -> Result<Vec<u8>, Error> {
    let mut out = b"before".to_vec();
    encoder.decoding(&ids, skip_special, threads)?.append(&mut out)?;
    assert_eq!(&out[..6], b"before");
    Ok(out.split_off(6))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn decoder_equals_the_specification(
        vocab in vocab(),
        places in prop::collection::vec(any::<prop::sample::Index>(), 0..3000),
        wrong in prop::option::weighted(0.3, (any::<prop::sample::Index>(), any::<TokenId>())),
        skip_special: bool,
    ) {
        let encoder = Encoder::new(vocab.clone()).unwrap();
        let known: Vec<TokenId> = (0..vocab.len() as u32).filter(|&id| vocab.token(id).is_some()).collect();
        let mut ids: Vec<TokenId> = places.iter().map(|place| known[place.index(known.len())]).collect();
        if let (Some((place, id)), false) = (wrong, ids.is_empty()) {
            let place = place.index(ids.len());
            // Any number, or one that may be free.
            ids[place] = if id % 2 == 0 { id } else { 256 + id % (vocab.len() as u32 - 250) };
        }
        let found = decoded(&encoder, &ids, skip_special, 1);
        match naive::decode(&vocab, &ids, skip_special) {
            Ok(expected) => prop_assert_eq!(found.unwrap(), expected),
            Err(place) => {
                let error = found.unwrap_err().to_string();
                let what = if (ids[place] as usize) < vocab.len() { ", an id that no token has" } else { "; expected ids below" };
                prop_assert!(error.starts_with(&format!("ids[{place}]: found {}{what}", ids[place])), "{}", error);
            }
        }
    }

    /// Each look at the ids may find others: what comes out is an error or bytes, and never more than there is room for.
    #[test]
    fn ids_that_change_are_no_danger(vocab in vocab(), seed: u64, len in 1usize..3000, calm in 0u64..4000) {
        let encoder = Encoder::new(vocab.clone()).unwrap();
        let ids = Changing { size: vocab.len() as u64 + 1, seed, len, calm, looks: AtomicUsize::new(0) };
        if let Ok(decoding) = encoder.decoding(&ids, false, 1) {
            let mut room = vec![MaybeUninit::new(0xff); decoding.len() + 64];
            let (inside, outside) = room.split_at_mut(decoding.len());
            let _ = decoding.write(inside);
            // SAFETY: all of it was initialised when it was made.
            let untouched = outside.iter().all(|byte| unsafe { byte.assume_init() } == 0xff);
            prop_assert!(untouched);
        }
    }
}

/// Ids of which one in `calm` is another one at every look.
struct Changing {
    size: u64,
    seed: u64,
    len: usize,
    calm: u64,
    looks: AtomicUsize,
}

impl Ids for Changing {
    fn len(&self) -> usize {
        self.len
    }

    fn copy(&self, from: usize, room: &mut [TokenId]) {
        let look = self.looks.fetch_add(1, Relaxed) as u64;
        for (place, id) in (from as u64..).zip(room) {
            let mixed = |n: u64| (n ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            let other = mixed(place << 20 | look << 1);
            *id = if other % (self.calm + 1) == 0 { other % self.size } else { mixed(place) % 256 } as TokenId;
        }
    }

    fn number(&self, _: usize) -> i128 {
        0
    }
}

/// Ids that are others after as many looks.
struct Once(AtomicUsize, [TokenId; 2]);
impl Ids for Once {
    fn len(&self) -> usize {
        100
    }
    fn copy(&self, _: usize, room: &mut [TokenId]) {
        room.fill(self.1[self.0.fetch_add(1, Relaxed).min(1)]);
    }
    fn number(&self, _: usize) -> i128 {
        0
    }
}

#[test]
fn ids_that_change_are_an_error() {
    let tokens: Vec<_> = (0..=255u8).map(|byte| (vec![byte], byte.into())).chain([(vec![b'a'; 200], 256)]).collect();
    let encoder = Encoder::new(Vocab::new(&tokens, vec![], vec![], "gpt2", false).unwrap()).unwrap();
    for (first, then, place) in [(65, 256, 0), (256, 65, 99), (65, 257, 0), (65, NO_ID, 0)] {
        let ids = Once(AtomicUsize::new(0), [first, then]);
        let error = encoder.decoding(&ids, false, 1).unwrap().append(&mut Vec::new()).unwrap_err().to_string();
        assert_eq!(error, format!("ids[{place}]: changed while it was decoded; expected ids that nobody writes"));
    }
}

#[test]
fn threads_change_nothing() {
    let tokens: Vec<_> = (0..=255u8).map(|byte| (vec![byte], byte.into())).chain([(vec![b'x'; 17], 256)]).collect();
    let vocab = Vocab::new(&tokens, vec![], vec![("<|end|>".into(), 259)], "gpt2", false).unwrap();
    let encoder = Encoder::new(vocab.clone()).unwrap();
    // Parts of a million ids, three and a half of them.
    let mut ids: Vec<TokenId> = (0..3_600_000u32).map(|n| n.wrapping_mul(2_654_435_761) >> 16 & 0xff).collect();
    ids.iter_mut().step_by(1000).for_each(|id| *id = 256);
    ids.iter_mut().step_by(1777).for_each(|id| *id = 259);
    for skip_special in [false, true] {
        let expected = naive::decode(&vocab, &ids, skip_special).unwrap();
        for threads in [1, 2, 3, 8] {
            assert!(decoded(&encoder, &ids, skip_special, threads).unwrap() == expected, "{threads} threads");
        }
    }
    // The first error, whichever thread is first.
    (ids[3_500_000], ids[2_200_000], ids[1_048_575]) = (257, 1000, 258);
    for threads in [1, 2, 3, 8] {
        let error = decoded(&encoder, &ids, false, threads).unwrap_err().to_string();
        assert_eq!(error, "ids[1048575]: found 258, an id that no token has; expected ids of tokens");
    }
}
