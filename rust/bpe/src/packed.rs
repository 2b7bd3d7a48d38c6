//! Short words as numbers of 16 bytes: keys of the tables of `word_counts` and `encode`.

/// Longest word that is packed with its length into 16 bytes.
pub(crate) const PACKED: usize = 15;

/// A word of at most 15 bytes with its length in the top byte; 0 is no word.
pub(crate) fn pack(word: &[u8]) -> Option<u128> {
    let n = word.len();
    let u64_at = |i: usize| -> u64 {
        let mut b = [0; 8];
        b.copy_from_slice(&word[i..i + 8]);
        u64::from_le_bytes(b)
    };
    let u32_at = |i: usize| -> u64 {
        let mut b = [0; 4];
        b.copy_from_slice(&word[i..i + 4]);
        u64::from(u32::from_le_bytes(b))
    };
    // Two loads that overlap instead of a copy of variable length: the copy is a call, which costs as much as
    // the look-up.
    let (low, high) = match n {
        0 => return None,
        1..=3 => {
            let (first, middle, last) = (word[0], word[n / 2], word[n - 1]);
            let bytes = u64::from(first) | u64::from(middle) << (8 * (n / 2)) | u64::from(last) << (8 * (n - 1));
            (bytes, 0)
        }
        4..=7 => (u32_at(0) | u32_at(n - 4) << (8 * (n - 4)), 0),
        8 => (u64_at(0), 0),
        9..=PACKED => (u64_at(0), u64_at(n - 8) >> (8 * (16 - n))),
        _ => return None,
    };
    Some(u128::from(low) | u128::from(high) << 64 | (n as u128) << 120)
}

/// [`pack`] of a word in a text; 0 where it is too long. One load whatever the length, where the text goes on for so long.
#[inline]
pub(crate) fn pack_at(text: &[u8], start: usize, len: usize) -> u128 {
    match text.get(start..).and_then(|rest| rest.first_chunk()) {
        Some(bytes) if len <= PACKED => u128::from_le_bytes(*bytes) & FIRST[len] | (len as u128) << 120,
        _ => pack(&text[start..start + len]).unwrap_or_default(),
    }
}

/// Bytes of a packed word.
pub(crate) fn packed_len(key: u128) -> usize {
    (key >> 120) as usize
}

/// A hash of a packed word: one multiplication of its two halves, folded.
pub(crate) fn hash_packed(key: u128) -> u64 {
    let product =
        u128::from(key as u64 ^ 0x9e37_79b9_7f4a_7c15) * u128::from((key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03);
    product as u64 ^ (product >> 64) as u64
}

/// All bits of the first so many bytes.
const FIRST: [u128; 16] = {
    let mut masks = [0; 16];
    let mut n = 1;
    while n < 16 {
        masks[n] = u128::MAX >> (128 - 8 * n);
        n += 1;
    }
    masks
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_is_injective(word in prop::collection::vec(any::<u8>(), 1..=PACKED)) {
            let key = pack(&word).unwrap();
            prop_assert_eq!(&key.to_le_bytes()[..packed_len(key)], word);
        }
    }
}
